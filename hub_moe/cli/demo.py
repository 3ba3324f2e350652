"""`hub-moe demo`: the main job, offline and small."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .output import print_json, print_table, print_text, say


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model and the report.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(min=0.1, help="Training time; the rest takes about one more.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of the split, the weights and the batches.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew instead of resuming.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train, evaluate, publish and fine-tune a small model, offline.

    Takes minutes on two cores. The text, the running Python's own standard library, is pushed to an embedded Hub and
    loaded from it as a dataset; the model is published there and loaded back by its name. A contributor then trains
    the few experts that English prose uses most, and shares them as an expert patch. Ctrl-C leaves a checkpoint;
    running again resumes.

    \b
    Examples:
      hub-moe demo
      hub-moe demo --output runs/quick --minutes 1 --fresh
    """
    from ..demo import run_demo

    report = run_demo(output, minutes=minutes, seed=seed, fresh=fresh)
    if as_json:
        print_json(report.to_dict())
    else:
        print_table(("Result", ""), report.summary_rows())
        print_text(f"\n{report.prompt}{report.completion}\n")
        say(f"The model, the report and its pictures are in {output}. To see both repos in a browser:")
        say(f"  hub-moe hub serve --root {shlex.quote(str(output / 'hub'))}")
