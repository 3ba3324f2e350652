"""Made-up routing traces in ESFT's form, and ESFT's scores and choice computed from them the plain way."""

import json
import random

NUM_EXPERTS, TOP_K = 16, 3


def write_traces(folder, seed, *, layers=(1, 2, 3), lengths=(40, 1, 23)):
    """One file a layer; the experts' popularity falls, so that scores differ, and some are never chosen."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for layer in layers:
        popularity = {expert: draw.random() ** 3 for expert in range(NUM_EXPERTS - 2)}
        lines = [_line(draw, popularity, length) for length in lengths]
        (folder / f"layer_{layer}.txt").write_text("".join(lines), "utf-8")
    return folder


def _line(draw, popularity, length):
    ids, weights = [], []
    for _ in range(length):
        ids += sorted(popularity, key=lambda expert: draw.random() * popularity[expert])[-TOP_K:]
        weights += [f"{draw.random() / TOP_K:.4f}" for _ in range(TOP_K)]
    return "\t".join(map(str, ids)) + "\t\t" + "\t".join(weights) + "\n"


def released_scores(folder, num_experts=NUM_EXPERTS, top_k=TOP_K):
    """`{"token": {layer: [...]}, "gate": {layer: [...]}}`, rounded, summed as floats in the order of the files."""
    scores = {"token": {}, "gate": {}}
    for path in sorted(folder.iterdir()):
        gates, shares = [0.0] * num_experts, [0.0] * num_experts
        for line in path.read_text("utf-8").splitlines():
            ids, weights = (half.split("\t") for half in line.split("\t\t"))
            for expert, weight in zip(map(int, ids), map(float, weights), strict=True):
                gates[expert] += weight
                shares[expert] += 1.0 / top_k
        total = 0.0
        for share in shares:
            total += share
        layer = int(path.stem.rpartition("_")[2])
        scores["token"][layer] = [round(share / total, 4) for share in shares]
        scores["gate"][layer] = [round(gate / total, 4) for gate in gates]
    return scores


def released_choice(scores, top_p):
    """`{layer: expert ids}`: the best first, until what is already taken reaches `top_p`."""
    choice = {}
    for layer, values in scores.items():
        taken, total = [], 0.0
        for value, expert in sorted(((-value, expert) for expert, value in enumerate(values))):
            if total < top_p:
                taken.append(expert)
                total -= value
        choice[layer] = taken
    return choice


def read_released(task_folder):
    """`(scores in the form of released_scores, expert_config.json)` of a task that ESFT released."""
    released = json.loads((task_folder / "expert_scores.json").read_text("utf-8"))
    scores = {
        kind: {
            int(layer): [values[str(expert)] for expert in range(len(values))]
            for layer, values in released[f"{kind}_scores"].items()
        }
        for kind in ("token", "gate")
    }
    return scores, json.loads((task_folder / "expert_config.json").read_text("utf-8"))
