"""`hub-moe review`: check a contribution without trusting its author."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .compare import print_comparison
from .output import print_json, print_table, print_text, say

if TYPE_CHECKING:
    from ..collaboration.review import Review


def review(  # noqa: PLR0913 (a parameter is a flag)
    reference: Annotated[str, typer.Argument(metavar="REPO#N", help="The pull request; REPO with --all-open.")],
    suite: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Look for regressions by this.", show_default="the base's own records'"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many documents of each of its tasks.")] = None,
    documents: Annotated[int, typer.Option(min=0, help="How many of each record to ask again.")] = 59,
    nonce: Annotated[str | None, typer.Option(help="Chooses the documents.", show_default="drawn now")] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Files in place of the Hub's datasets.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0.", show_default="a GPU if there is one")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once, for regressions.")] = 16,
    tolerance: Annotated[
        float, typer.Option(metavar="SHARE", help="A task may get worse by this share of the base's value.")
    ] = 0.0,
    all_open: Annotated[
        bool, typer.Option("--all-open", help="Every open contribution whose head you have not reviewed.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="A new comment, also where you reviewed this head.")] = False,
    no_post: Annotated[bool, typer.Option("--no-post", help="Say nothing in the pull request.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Post without asking.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the report here, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Review a contributed expert patch: is it safe, what does it change, are its claims true, what does it cost?

    Refuses, before anything is loaded: pickles, code, files outside of patches/NAME, odd names, sizes and headers that
    do not fit, other tensors or hashes than declared, NaN. Then asks the claims again with documents that the author
    could not foresee, and compares patch and base on the base's own suites: what is worse there is a reason to reject,
    unless it is within --tolerance. Nothing of the pull request is run.

    The report becomes one comment on the pull request; repeated on the same head it is replaced. Exit codes: 0 accept,
    1 reject or a known error, 2 wrong usage, 3 incomplete (something could not be checked; the report says what).

    \b
    Examples:
      hub-moe review alice/base#3
      hub-moe review alice/base#3 --suite quick --documents 299 --no-post --json
      hub-moe review alice/base#3 --tolerance 0.02 --yes    # 2 % worse elsewhere is a note
      hub-moe review alice/base --all-open --yes            # one line for cron, or for a webhook's script
    """
    from huggingface_hub import HfApi

    from ..bars import quiet_bars
    from ..collaboration.review import EXIT_CODES, ReviewOptions, find_unreviewed, review_pull_request
    from ..files.json_files import write_json

    if not (no_post or yes or sys.stdin.isatty()):
        raise typer.BadParameter("Without a terminal to ask at, this needs --yes or --no-post.")
    if limit is not None and suite is None:
        raise typer.BadParameter("--limit is for the tasks of --suite; the base's own suites are asked as they are.")
    if all_open == ("#" in reference):
        raise ConfigError(f"{reference!r}: give REPO#N, or REPO with --all-open.")
    options = ReviewOptions(suite, limit, data_dir, documents, nonce, device, batch_size, tolerance)
    api = HfApi()
    references = find_unreviewed(api, reference) if all_open else [reference]
    found = []
    with quiet_bars():
        for each in references:
            with redirect_stdout(sys.stderr):  # libraries that print must not spoil what is meant for machines
                made = review_pull_request(api, each, options, say=say)
            found.append(made)
            if not as_json:
                _print(made)
            if not no_post:
                _post(made, again=again, ask=not yes)
    reports = [each.to_dict() for each in found]
    data = reports if all_open else reports[0]
    if out is not None:
        write_json(out, data)
    if as_json:
        print_json(data)
    if not references:
        say(f"{reference} has no open contribution that you have not reviewed.")
    worst = [each.verdict for each in found]
    raise typer.Exit(EXIT_CODES["reject" if "reject" in worst else "incomplete" if "incomplete" in worst else "accept"])


def _post(made: "Review", *, again: bool, ask: bool) -> None:
    from huggingface_hub import HfApi

    from ..collaboration.review import post_review
    from ..collaboration.review_report import render_review

    if ask and not typer.confirm(f"Post this in {made.pull_request}?", err=True):
        return
    is_new = post_review(HfApi(), made, render_review(made), again=again)
    say(f"{'Posted in' if is_new else 'Replaced your review in'} {made.pull_request}.")


def _print(made: "Review") -> None:
    from ..collaboration.review_report import draw_heat_map

    if made.changes:
        rows = [
            (
                each.kind.replace("_", " "),
                "" if each.layer is None else str(each.layer),
                "" if each.expert is None else str(each.expert),
                f"{each.change:.2%}",
            )
            for each in made.changes
        ]
        print_table(("Changed", "layer", "expert", "change"), rows)
        for line in ["", *draw_heat_map(made.changes), ""]:
            print_text(line)
    for name, each in made.verifications.items():
        print_text(f"{name}: {each.outcome}, {each.num_replayed} of {each.num_documents} documents asked again")
    for comparison in (*made.gains, *made.regressions):
        print_text()
        print_comparison(comparison)
    for note in made.notes:
        print_text(note)
    print_text()
    print_text(f"{made.pull_request} at {made.pull_request.head[:12]}: {made.verdict.upper()}")
    for reason in made.reasons:
        print_text(f"  {reason}")
