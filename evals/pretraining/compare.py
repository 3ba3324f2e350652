"""Small pretraining runs at equal training FLOPs: dense, coarse and fine-grained experts, three ways to balance them.

    python evals/pretraining/compare.py [--text stdlib|FILE] [--seeds 3] [--out evals/results/pretraining]

A finished run is a JSON file in `OUT/runs` and is not computed again. `figures.md`, `summary.json` and `comparison.png`
in OUT are made anew from all files there at each call; `step_times.json` is measured once.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from arms import ARMS, MAIN_ARMS, SHARED_FIELDS
from plot import plot_comparison
from report import render_report
from single_run import plan_run, run_or_read, write_json
from step_times import measure_step_times
from summary import read_records, summarise
from texts import Text, read_text

from hub_moe.errors import HubMoeError

ROOT = Path(__file__).resolve().parents[2]
BLOCK_LENGTH = 256


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # another number rounds differently, and waits for its threads on a busy machine
    try:
        compare(arguments)
    except HubMoeError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted; finished runs are kept, and the same command makes the others.")


def positive(value: str) -> int:
    """A whole number from 1 on."""
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value} is no whole number from 1 on")
    return int(value)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="stdlib", help="stdlib, or a UTF-8 file whose last tenth is held out")
    parser.add_argument("--name", help="what records call the text; the file's name by default")
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in MAIN_ARMS], choices=ARMS, metavar="ARM")
    parser.add_argument("--seeds", type=positive, default=3, help="seeds 0, 1, ... of each arm")
    parser.add_argument("--steps", type=positive, default=600)
    parser.add_argument("--batch-size", type=positive, default=8, help=f"blocks of {BLOCK_LENGTH} tokens per step")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--held-out-blocks", type=positive, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "evals" / "results" / "pretraining")
    return parser.parse_args()


def compare(arguments: argparse.Namespace) -> None:
    """Make the runs that are missing, seed by seed, so that an early end leaves whole pairs."""
    text = read_text(
        arguments.text,
        name=arguments.name or Path(arguments.text).stem,
        vocab_size=SHARED_FIELDS["vocab_size"],
        block_length=BLOCK_LENGTH,
        held_out_blocks=arguments.held_out_blocks,
    )
    for seed in range(arguments.seeds):
        for arm in (ARMS[name] for name in arguments.arms):
            plan = plan_run(
                arm,
                steps=arguments.steps,
                batch_size=arguments.batch_size,
                learning_rate=arguments.learning_rate,
                seed=seed,
            )
            path = arguments.out / "runs" / f"{text.name}-{arm.name}-seed{seed}.json"
            print(f"{path.stem}: {'found' if path.exists() else 'training'}", file=sys.stderr, flush=True)
            run_or_read(arm, text, plan, path)
    write_results(arguments.out, read_step_times(arguments.out / "step_times.json", text, arguments.batch_size))


def read_step_times(path: Path, text: Text, batch_size: int) -> dict[str, float]:
    """Relative step times from `path`, measured where there are none."""
    if not path.exists():
        print("measuring step times, the arms in turns", file=sys.stderr)
        write_json(measure_step_times(MAIN_ARMS, text.train_blocks[:batch_size]), path)
    step_times: dict[str, float] = json.loads(path.read_text("utf-8"))
    return step_times


def write_results(out: Path, step_times: dict[str, float]) -> None:
    """Everything that is made from the records."""
    records = read_records(out / "runs")
    summary = summarise(records)
    write_json(summary, out / "summary.json")
    (out / "figures.md").write_text(render_report(summary, step_times), "utf-8")
    plot_comparison(records).savefig(out / "comparison.png")
    print(out / "figures.md")


if __name__ == "__main__":
    main()
