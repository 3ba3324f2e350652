"""Multiple choice through lm_eval's own API: its Hugging Face model (HFLM) against HubMoeLM on the same model.

    python evals/speed/harness.py [--rounds 3] [--questions 6] [--device cpu] [--dtype float32] [--experts 64]

Two tasks, made from a seed: `few_shot` has a shared prefix of 640 tokens, questions of 96 and 4 choices of 16 tokens;
`zero_shot` has short questions and choices and no prefix. In each round HFLM and HubMoeLM take turns on both through
`lm_eval.evaluate`, at the same batch size, and HFLM also at the one that serves it best on two such questions. Ratios
are seconds of HubMoeLM over seconds of HFLM, so one sixth is six times faster; `_processor` is the same in processor
seconds, which a busy machine disturbs less. Scores are compared request by request.
"""

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rounds import add_options, report, require_quiet, spread
from step import SHAPE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hub_moe.evals.prefix_lm import HubMoeLM
from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM
from hub_moe.modeling.configuration_hub_moe import translate_native_config

GOALS = {"few_shot": 1 / 6, "few_shot_best_batch": 1 / 6, "zero_shot": 1.0}
LARGEST_DIFFERENCE = 1e-5
PREFIX, QUESTION, CHOICES, CHOICE = 640, 96, 4, 16
BATCH_SIZES = (1, 4, 8)
SAME = 4


def make_model(arguments: argparse.Namespace) -> Any:
    """A HubMoe with the shape of the other benchmarks, by default one layer deeper: 118 M parameters."""
    torch.manual_seed(0)
    shape = {**SHAPE, "n_routed_experts": arguments.experts, "num_hidden_layers": arguments.layers}
    config = HubMoeConfig(**translate_native_config({**shape, "model_type": "deepseek_v3"}))
    model = HubMoeForCausalLM(config).eval()
    return model.to(device=arguments.device, dtype=getattr(torch, arguments.dtype))


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {"<s>": 0, "<pad>": 1, **{f"w{index}": index for index in range(2, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<pad>")


def make_documents(questions: int) -> dict[str, list[dict[str, Any]]]:
    """Documents of both tasks, and of the one that finds a batch size for HFLM."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(2, SHAPE['vocab_size'])}" for _ in range(count))

    def document(context: str, lengths: list[int]) -> dict[str, Any]:
        return {"context": context, "choices": [words(length) for length in lengths], "answer": draw.randrange(4)}

    prefix = words(PREFIX)
    few_shot = [document(f"{prefix} {words(QUESTION)}", [CHOICE] * CHOICES) for _ in range(questions)]
    zero_shot = [
        document(words(draw.randint(6, 24)), [draw.randint(1, 4) for _ in range(CHOICES)]) for _ in range(4 * questions)
    ]
    return {"few_shot": few_shot, "zero_shot": zero_shot, "tuning": few_shot[:2]}


def load_tasks(folder: Path, documents: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Write each task as JSON and YAML, and load it as lm_eval loads any other."""
    for name, rows in documents.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return {name: manager.load([name]) for name in documents}


def run(lm: Any, name: str, task: Any) -> tuple[tuple[float, float], list[tuple[float, bool]]]:
    """Wall and processor seconds of one evaluation, and log-likelihood and greediness of each request."""
    start, cpu_start = time.perf_counter(), time.process_time()
    results = evaluate(lm=lm, task_dict=task, bootstrap_iters=0)
    seconds = time.perf_counter() - start, time.process_time() - cpu_start
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return seconds, [answer for sample in samples for answer in sample["filtered_resps"]]


def compare_scores(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> dict[str, float]:
    """Largest relative difference of log-likelihoods, and answers that changed: greedy, or the best of four choices."""
    pairs = list(zip(ours, theirs, strict=True))
    best = [
        [max(range(CHOICES), key=lambda choice: side[start + choice][0]) for start in range(0, len(side), CHOICES)]
        for side in (ours, theirs)
    ]
    return {
        "largest_relative_difference": max(abs(a - b) / abs(b) for (a, _), (b, _) in pairs),
        "flips": sum(a != b for (_, a), (_, b) in pairs) + sum(a != b for a, b in zip(*best, strict=True)),
    }


def count_tokens(lm: HubMoeLM, name: str, task: Any) -> dict[str, int]:
    """Tokens that one evaluation needs, and that it ran."""
    lm.num_prompt_tokens = lm.num_computed_tokens = 0
    run(lm, name, task)
    return {"prompt": lm.num_prompt_tokens, "computed": lm.num_computed_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    busy = require_quiet(arguments)
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    model = make_model(arguments)
    given = {"pretrained": model, "tokenizer": make_tokenizer(SHAPE["vocab_size"]), "max_length": 2048}
    ours = {size: HubMoeLM(**given, batch_size=size) for size in BATCH_SIZES}
    theirs = {size: HFLM(**given, batch_size=size) for size in BATCH_SIZES}
    with tempfile.TemporaryDirectory() as folder:
        tasks = load_tasks(Path(folder), make_documents(arguments.questions))
        tuning = tasks.pop("tuning")
        run(ours[SAME], "tuning", tuning)  # kernels, allocator, caches
        tried = {size: run(lm, "tuning", tuning)[0] for size, lm in theirs.items()}
        best = min(tried, key=lambda size: tried[size])
        print(f"HFLM seconds by batch size: {tried}", file=sys.stderr)
        pairs: dict[str, list[float]] = defaultdict(list)
        scores, draw = {}, random.Random(0)
        for index in range(arguments.rounds):
            for name, task in tasks.items():
                rivals = [("ours", ours[SAME]), ("same", theirs[SAME])]
                if name == "few_shot" and best != SAME:
                    rivals.append(("best", theirs[best]))
                seconds, answers = {}, {}
                for rival, lm in draw.sample(rivals, len(rivals)):
                    seconds[rival], answers[rival] = run(lm, name, task)
                print(f"round {index + 1}/{arguments.rounds} {name}: {seconds}", file=sys.stderr)
                if name == "few_shot":
                    seconds.setdefault("best", seconds["same"])
                for suffix, rival in {"": "same", "_best_batch": "best"}.items():
                    for clock, place in {"": 0, "_processor": 1}.items():
                        if rival in seconds:
                            ratio = seconds["ours"][place] / seconds[rival][place]
                            pairs[f"{name}{suffix}{clock}"].append(ratio)
                scores[name] = compare_scores(answers["ours"], answers["same"])
        ratios = {name: spread(values) for name, values in pairs.items()}
        tokens = {name: count_tokens(ours[SAME], name, task) for name, task in tasks.items()}
    report(
        "harness",
        {**ratios, **{f"{name}_difference": score["largest_relative_difference"] for name, score in scores.items()}},
        GOALS | ({f"{name}_difference": LARGEST_DIFFERENCE for name in scores} if arguments.dtype == "float32" else {}),
        arguments,
        scores=scores,
        tokens=tokens,
        batch_size=SAME,
        best_batch_size_of_hflm=best,
        num_parameters=model.num_parameters(),
        headline=["few_shot", "few_shot_best_batch"],
        busy_share_before=busy,
    )


if __name__ == "__main__":
    main()
