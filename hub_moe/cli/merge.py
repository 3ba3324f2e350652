"""`hub-moe merge`: contributed expert patches into their base, or beside it."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .output import print_json, print_table, print_text, say
from .patch_combining import print_conflicts

if TYPE_CHECKING:
    from ..collaboration.merge_plan import Merged, MergePlan


def merge(  # noqa: PLR0913 (a parameter is a flag)
    references: Annotated[list[str], typer.Argument(metavar="REPO#N...", help="Pull requests of one repo.")],
    method: Annotated[
        Literal["refuse", "mean", "ties", "dare", "slerp"],
        typer.Option(help="What becomes of experts that several patches change."),
    ] = "refuse",
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Add patches/NAME with weights; leave the base alone.")
    ] = False,
    accept_losses: Annotated[
        bool, typer.Option("--accept-losses", help="Merge although somebody's gain is lost, or not known.")
    ] = False,
    without_review: Annotated[
        bool,
        typer.Option(
            "--without-review/--reviewed-only", help="Whether a head that no owner accepted in a review may be merged."
        ),
    ] = False,
    tolerance: Annotated[
        float, typer.Option(metavar="SHARE", help="A task may get worse by this share of the base's value.")
    ] = 0.0,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Files in place of the Hub's datasets.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0.", show_default="a GPU if there is one")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 16,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do all but write.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Merge one or several contributions into their base by one commit on main.

    Patches of different experts merge exactly, byte for byte; where they change the same experts METHOD decides, after
    a table of the conflicts. A patch for an older commit is rebased if nothing that it changes has changed since.
    Before anything is written the merged model is asked every contributor's suite and the base's own, and compared
    with the base and with each patch alone: a gain that is gone, or of which less than half is kept, refuses the merge,
    and so does a task that gets worse by more than --tolerance.

    Then one commit, if main is still what was checked, with the changed weights, their records in place of the old
    ones, the card and patches/NAME; a tag merge-1, merge-2, ...; and every pull request is told and closed. After an
    interruption run it again.

    \b
    Examples:
      hub-moe merge alice/base#3
      hub-moe merge alice/base#3 alice/base#5 --method ties --dry-run
      hub-moe merge alice/base#7 --side-by-side --yes
    """
    from contextlib import redirect_stdout

    from huggingface_hub import HfApi

    from ..bars import quiet_bars
    from ..collaboration.merge import apply_merge, finish_merge, prepare_merge, refuse_losses
    from ..collaboration.merge_plan import MergeOptions
    from ..patches import CombinationMethod

    if not (dry_run or yes or sys.stdin.isatty()):
        raise typer.BadParameter("Without a terminal to ask at, this needs --yes or --dry-run.")
    api = HfApi()
    chosen = CombinationMethod(method)
    options = MergeOptions(chosen, side_by_side, accept_losses, without_review, data_dir, device, batch_size, tolerance)
    done = finish_merge(api, references, dry_run=dry_run, say=say)
    if done is not None:
        _print_merged(done, as_json=as_json, state="merged before")
        return
    stdout = sys.stderr if as_json else sys.stdout

    def show(table: Any) -> None:
        with redirect_stdout(stdout):
            print_conflicts(table)

    with tempfile.TemporaryDirectory(prefix="hub-moe-merge-") as folder, quiet_bars():
        with redirect_stdout(sys.stderr):  # libraries that print must not spoil what is meant for machines
            plan = prepare_merge(api, references, options, work=Path(folder), say=say, show=show)
        if not as_json:
            _print_plan(plan)
        elif dry_run or (plan.losses and not accept_losses):
            print_json({"state": "planned", **plan.to_dict()})
        if not accept_losses:
            refuse_losses(plan)
        if dry_run:
            return
        if not yes:
            typer.confirm(f"Write this to {plan.repo}?", abort=True, err=True)
        merged = apply_merge(api, plan, say=say)
    _print_merged(merged, as_json=as_json, state="merged", **plan.to_dict())


def _print_merged(merged: "Merged", *, as_json: bool, **facts: Any) -> None:
    if as_json:
        print_json({**facts, "commit": merged.commit, "tag": merged.tag})
    else:
        print_text(f"{merged.tag} {merged.commit}" if merged.tag else merged.commit)


def _print_plan(plan: "MergePlan") -> None:
    rows = [
        (
            each.contribution.name,
            f"#{each.pull_request.number}",
            each.pull_request.author,
            each.reviewer or "nobody",
            "rebased" if each.was_stale else "as made",
        )
        for each in plan.candidates
    ]
    print_table(("Patch", "pull request", "by", "accepted by", "base"), rows)
    if plan.gains:
        print_text()
        gains = [
            (
                each.patch,
                f"{each.task} {each.metric}",
                f"{each.base:.3f}",
                f"{each.own:.3f}",
                f"{each.merged:.3f}",
                each.outcome,
            )
            for each in plan.gains
        ]
        print_table(("Patch", "task", "base", "patch", "merged", "gain"), gains)
        for note in plan.notes:
            print_text(note)
    print_text()
    print_text(f"Into {plan.repo} at {plan.parent[:12]}, {plan.method}: {len(plan.files)} files")
