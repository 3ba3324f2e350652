"""What the evidence costs: an evaluation with records, journal and statistics against lm_eval's `evaluate` alone.

    python evals/speed/records.py [--rounds 9] [--limit 60]

A HubMoe of about 25 M parameters answers the offline suite through the same class of model, HubMoeLM, in both. Building
the requests, every answer and the scores count; loading the model does not. The two must give the same numbers.
"""

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from rounds import add_options, compare, measure_in_turns, report, require_quiet
from step import SHAPE as STEP_SHAPE

SHAPE = {**STEP_SHAPE, "num_hidden_layers": 3, "n_routed_experts": 16}
GOALS = {"seconds": 1.05}


def save_model(folder: Path) -> None:
    """Random weights and a tokenizer learned from Python's standard library."""
    import torch

    from hub_moe.data import read_stdlib_corpus, train_bpe_tokenizer
    from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM

    corpus = read_stdlib_corpus(seed=0, held_out_share=0.05, max_bytes=1_000_000)
    tokenizer = train_bpe_tokenizer((document.text for document in corpus.train), vocab_size=4096)
    torch.manual_seed(0)
    HubMoeForCausalLM(HubMoeConfig(**SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def evaluate_once(method: str, model: str, limit: int) -> None:
    """Print the seconds and the main numbers."""
    from hub_moe.energy import prepare_metering
    from hub_moe.evals.models import ModelRequest, load_model

    if method == "record":
        prepare_metering()  # while the model loads, as `hub-moe eval` does
    loaded = load_model(ModelRequest(model))
    start = time.perf_counter()
    numbers = (_with_record if method == "record" else _alone)(loaded, limit)
    print(json.dumps({"seconds": time.perf_counter() - start, **numbers}))


def _with_record(loaded: Any, limit: int) -> dict[str, float]:
    from hub_moe.evals.run import RunFacts, evaluate_suite
    from hub_moe.evals.suites import load_suite
    from hub_moe.evals.tasks import build_suite

    with tempfile.TemporaryDirectory() as folder:
        built = build_suite(load_suite("offline", limit=limit), tokenizer=loaded.tokenizer)
        record = evaluate_suite(loaded, built, Path(folder), RunFacts(["benchmark"])).record
    return {entry.tasks[0].name: entry.main.value for entry in record.entries}


def _alone(loaded: Any, limit: int) -> dict[str, float]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from hub_moe.evals.suites import DECLARATIONS, load_suite

    suite = load_suite("offline")
    manager = TaskManager(include_path=str(DECLARATIONS / "tasks"), include_defaults=False)
    tasks = manager.load([name for entry in suite.entries for name in entry.tasks])
    for entry in suite.entries:
        for name in entry.tasks:
            tasks["tasks"][name].set_config(key="num_fewshot", value=entry.num_fewshot or 0)
            tasks["tasks"][name].set_fewshot_seed(seed=suite.fewshot_seed)
    results = lm_eval.evaluate(loaded.lm, tasks, limit=limit, bootstrap_iters=0, log_samples=True)["results"]
    return {name: results[name][f"{metric},none"] for name, metric in _main_metrics().items()}


def _main_metrics() -> dict[str, str]:
    from hub_moe.evals.suites import load_suite
    from hub_moe.evals.tasks import build_suite

    return {each.name: each.main_metric for each in build_suite(load_suite("offline", limit=1)).tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--limit", type=int, default=60, help="documents of each task")
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        evaluate_once(*arguments.once, arguments.limit)
        return
    busy = require_quiet(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        save_model(Path(scratch))
        options = [scratch, "--limit", str(arguments.limit)]
        programs = {name: [os.path.abspath(__file__), "--once", name, *options] for name in ("alone", "record")}
        figures = measure_in_turns(programs, rounds=arguments.rounds)
    for alone, record in zip(figures["alone"], figures["record"], strict=True):
        differ = [name for name in alone if name != "seconds" and not math.isclose(alone[name], record[name])]
        assert not differ, f"the two ways give other numbers for {differ}"
    ratios = {"seconds": compare(figures["record"], figures["alone"], "seconds")}
    report("records", ratios, GOALS, arguments, busy_share_before=busy, headline=["seconds"], figures=figures)


if __name__ == "__main__":
    main()
