"""What a fine-tune gains on its task and loses elsewhere: full tuning, expert tuning, and LoRA of the same size.

    python evals/fine_tuning/compare.py BASE ROWS [--seeds 3] [--out evals/results/fine_tuning]

BASE is the folder that `hub-moe demo` left, or `base.py` beside this file (a model trained on Python's standard library
among others, and a report which says how its files were split); ROWS is a file of task rows such as GSM8K's
train.jsonl, or BASE/rows/gsm8k.jsonl, which a base of `base.py` has not seen. Each method is given the
same rows, steps and learning rates, each keeps the rate that is best for the held-out rows of the task, and is then
repeated with other seeds. A finished run is kept in OUT/runs and not made again; figures and picture are made anew.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from plot import plot_trade_off
from summary import best_rates, render_index, render_table, summarise
from trial import Bench, Trial, find_equal_rank, read_base

from hub_moe.errors import HubMoeError
from hub_moe.files.json_files import read_json

METHODS = ("full", "experts", "lora")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="BASE", help="the output folder of hub-moe demo or base.py")
    parser.add_argument("rows", type=Path, help="task rows: json, jsonl, parquet or csv")
    parser.add_argument("--name", help="of the task; the file's folder by default")
    parser.add_argument("--limit", type=int, default=2000, help="rows that are read")
    parser.add_argument("--max-length", type=int, default=768)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4, help="packed rows per step")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=3)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--top-p", type=float, help="of the choice of experts by token score; 0.2 by default")
    choice.add_argument("--share", type=float, help="of all experts that are chosen, instead")
    parser.add_argument("--shared-experts", action="store_true", help="train the shared experts beside the chosen ones")
    parser.add_argument("--non-expert-modules", action="store_true", help="and all that is no expert")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="experts is always made")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results" / "fine_tuning")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    try:
        compare(arguments)
    except HubMoeError as error:
        sys.exit(str(error))


def compare(arguments: argparse.Namespace) -> None:
    """Make the runs that are missing, then sum up all of them."""
    out, name = arguments.out, arguments.name or arguments.rows.resolve().parent.name
    (out / "runs").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(read_base(arguments.base), arguments.rows, Path(scratch), settings=_settings(arguments))
        records, rank = [], None
        # experts first: LoRA's rank follows from how many numbers they are
        for method in ("experts", *(method for method in arguments.methods if method != "experts")):
            if method == "lora":
                rank = find_equal_rank(bench, records[0]["trained"])
            trials = [Trial(method, rate, seed=0, rank=rank if method == "lora" else None) for rate in arguments.rates]
            records += [read_or_make(bench, trial, out=out, name=name) for trial in trials]
        for method, rate in best_rates(records).items():
            for seed in range(1, arguments.seeds):
                trial = Trial(method, rate, seed=seed, rank=rank if method == "lora" else None)
                records.append(read_or_make(bench, trial, out=out, name=name))
    summary = summarise(records, name=name, settings=bench.settings)
    (out / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    (out / f"{name}.md").write_text(render_table(summary), "utf-8")
    plot_trade_off(summary).savefig(out / f"{name}.png", dpi=150)
    made = [file for file in out.glob("*.json") if any((out / "runs").glob(f"{file.stem}-*-seed0.json"))]
    (out / "comparisons.md").write_text(render_index([read_json(file, "a comparison") for file in made]), "utf-8")
    print(render_table(summary))


def read_or_make(bench: Bench, trial: Trial, *, out: Path, name: str) -> dict[str, Any]:
    """The record of a trial, from its file if it has been made with these settings.

    Raises:
        SystemExit: If the file is of other settings.
    """
    file = out / "runs" / f"{name}-{trial.name}.json"
    if file.exists():
        record: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if record["settings"] != bench.settings:
            sys.exit(f"{file} is of other settings; remove it, or give another --out.")
        return record
    print(f"{name}: {trial.name}", file=sys.stderr)
    record = bench.run(trial)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    unfinished.replace(file)
    return record


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    by_share = {"share": arguments.share} if arguments.share is not None else {"top_p": arguments.top_p or 0.2}
    others = {"non_expert_modules": True} if arguments.non_expert_modules else {}
    return {
        **{key: getattr(arguments, key) for key in ("limit", "max_length", "steps", "batch_size")},
        "choice": {**by_share, "shared_experts": arguments.shared_experts, **others},
    }


if __name__ == "__main__":
    main()
