"""`hub-moe demo`: the main job, offline and small."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .output import print_json, print_table, print_text, say


def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything.")] = Path("runs/demo"),
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Training time of the base; the rest takes three more.")
    ] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of the split, the weights and the batches.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew instead of resuming.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """The whole loop on an embedded Hub, offline: publish a model, propose expert patches, review, merge, use.

    Takes minutes on two cores. A small model is trained on the running Python's own standard library and published.
    Alice and Bob train the few experts that their domains use and propose them; Mallory proposes a forged result. The
    owner reviews all three, merges the two that hold, and anybody loads the model by its name. Every step is a command
    that is shown, with who gives it. Ctrl-C loses nothing: the same command goes on.

    \b
    Examples:
      hub-moe demo
      hub-moe demo --output runs/quick --minutes 1 --fresh
    """
    from ..demo import run_demo
    from ..demo.local_hub import page_of

    report = run_demo(output, minutes=minutes, seed=seed, fresh=fresh)
    if as_json:
        print_json(report.to_dict())
        return
    print_text(f"\n{report.completion}")
    print_table(("Pull request", "patch", "by", "claim", "review"), report.proposal_rows())
    print_text()
    if report.gains:
        print_table(("Patch", "task", "base", "patch", "merged", "gain"), report.gain_rows())
        print_text()
    print_table(("Result", ""), report.summary_rows())
    people = shlex.quote(str(output / "people" / "alice.env"))
    say(f"To see it all in a browser, and go on by hand (in another terminal, after `. {people}`):")
    say(f"  hub-moe hub serve --root {shlex.quote(str(output / 'hub'))}")
    say(f"  {page_of(report.model['repo'])}")
