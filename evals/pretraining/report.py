"""The summary as Markdown. Every number in it comes from the records."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from arms import ARMS
from summary import CONFIDENCE, MEASURES


def render_report(summary: Mapping[str, Any], step_times: Mapping[str, float]) -> str:
    """Tables of arms and comparisons for every text.

    Args:
        summary: From `summarise`.
        step_times: Of each arm, relative to the dense model.
    """
    parts = [
        "# Pretraining in small: the figures\n\nWritten by `evals/pretraining/compare.py` from the files in `runs/`; "
        "how to read it stands in README.md.\n\n![Held-out loss and load imbalance](comparison.png)\n",
        _render_costs(summary, step_times),
    ]
    for text, facts in summary.items():
        parts.append(_render_arms(text, facts))
        if comparisons := facts["comparisons"]:
            parts += [_render_comparisons(comparisons), _render_reading(comparisons)]
    return "\n".join(parts)


def _render_costs(summary: Mapping[str, Any], step_times: Mapping[str, float]) -> str:
    arms = next(iter(summary.values()))["arms"]
    dense = arms.get("dense", next(iter(arms.values())))
    rows = [
        [
            arm["title"],
            f"{arm['parameters']:,}",
            f"{arm['active_parameters']:,}",
            f"{arm['router_parameters']:,}",
            f"{arm['training_flops_per_token'] / 1e6:.3f} M",
            f"{arm['training_flops_per_token'] / dense['training_flops_per_token'] - 1:+.2%}",
            f"{step_times[name]:.2f}" if name in step_times else "",
        ]
        for name, arm in arms.items()
        if ARMS[name].learning_rate_factor == 1
    ]
    head = ["arm", "parameters", "active", "router", "training FLOPs / token", "against dense", "step time"]
    return "## Cost\n\n" + _table(head, rows)


def _render_arms(text: str, facts: Mapping[str, Any]) -> str:
    corpus = facts["corpus"]
    rows = [
        [
            arm["title"],
            str(len(arm["seeds"])),
            _mean(arm["held_out_loss"], 4),
            _mean(arm["imbalance"], 2),
            _mean(arm["dead_experts"], 1),
        ]
        for arm in facts["arms"].values()
    ]
    return (
        f"\n## {text}\n\nTrained on {facts['tokens']:,} tokens of a text of {corpus['train_tokens']:,} "
        f"(`{corpus['source']}`, sha256 `{corpus['sha256'][:16]}`), held out {corpus['held_out_tokens']:,}. Mean and "
        "standard deviation over seeds.\n\n"
        + _table(["arm", "seeds", "held-out loss (nats / token)", "imbalance, worst layer", "dead experts"], rows)
    )


def _render_comparisons(comparisons: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"{ARMS[row['arm']].title} − {ARMS[row['against']].title}",
            MEASURES[row["measure"]],
            f"{row['difference']:+.4f}",
            "" if row["interval"] is None else f"{row['interval'][0]:+.4f} to {row['interval'][1]:+.4f}",
            row["claim"] or "",
            f"**{row['verdict']}**" if row["verdict"] == "contradicts" else row["verdict"],
        ]
        for row in comparisons
    ]
    return f"\nPaired by seed, with the {CONFIDENCE:.0%} t interval; below 0 favours the first.\n\n" + _table(
        ["difference", "of", "mean", "interval", "claim", "verdict"], rows
    )


def _render_reading(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Each claim with the verdicts on it, those that contradict it first."""
    verdicts: dict[str, Counter[str]] = {}
    for row in comparisons:
        if row["claim"]:
            verdicts.setdefault(row["claim"], Counter())[row["verdict"]] += 1
    ranked = sorted(verdicts.items(), key=lambda item: -item[1]["contradicts"])
    return "\nIn short:\n\n" + "".join(
        f"- {claim}: {', '.join(f'{verdict} ({count}×)' for verdict, count in counts.most_common())}\n"
        for claim, counts in ranked
    )


def _mean(value: Mapping[str, float | None] | None, decimals: int) -> str:
    if value is None:
        return "—"
    mean = f"{value['mean']:.{decimals}f}"
    return mean if value["deviation"] is None else f"{mean} ± {value['deviation']:.{decimals}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
