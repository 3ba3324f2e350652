"""`hub-moe publish`: a model, patch, adapter or training run as a repo on the Hub."""

import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .output import describe_bytes, print_json, print_text, say

if TYPE_CHECKING:
    from ..collaboration.publish import Publication
    from ..hub.uploads import UploadPlan

Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Leave these files out; may be repeated.")
]
Records = Annotated[
    list[Path] | None,
    typer.Option("--records", metavar="DIR", help="Folder of records beside the model's evals/; may be repeated."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check, show what would be done, and stop.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it without asking.")]


def publish(  # noqa: PLR0913 (a parameter is a flag)
    source: Annotated[Path, typer.Argument(metavar="DIR|RUN", help="Folder of a model, patch or adapter, or a run.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME; it is made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repo private.")] = False,
    tag: Annotated[str | None, typer.Option(help="Of this version.", show_default="the next of v1, v2, ...")] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME@COMMIT", help="The repo of the folder that a patch or adapter was made on."),
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="For a card that names none, such as apache-2.0.")
    ] = None,
    records: Records = None,
    exclude: Exclude = None,
    prune: Annotated[bool, typer.Option("--prune", help="Delete from the repo what DIR does not hold.")] = False,
    try_load: Annotated[
        bool | None,
        typer.Option("--try-load/--no-try-load", help="Load a whole model once.", show_default="below 2 GB"),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found and done as JSON.")] = False,
) -> None:
    """Publish a model, expert patch or adapter: checked first, uploaded in one commit, tagged.

    Looked at are: files (safetensors only; no pickles, links, secrets, paths of your machine), whether it loads, its
    base (a repo at a commit that others can read), records, card and licence. All problems are listed at once, and
    nothing is sent while there is one. A card is rendered where there is none; the folder itself is not changed.

    An interrupted upload goes on by the same command: what the Hub has is not sent again, and there is one commit and
    one tag.

    \b
    Examples:
      hub-moe publish runs/law alice/law-experts --license apache-2.0
      hub-moe publish my-model alice/my-moe --private --tag v1.0 --yes
      hub-moe publish runs/law/patch alice/law-experts --base alice/my-moe@main --dry-run
    """
    import tempfile

    from huggingface_hub import HfApi

    from ..bars import quiet_bars
    from ..collaboration.publish import PublishOptions, plan_publication
    from ..collaboration.publish import publish as run_publication

    require_answer(yes=yes, dry_run=dry_run)
    options = PublishOptions(
        private=private,
        tag=tag,
        base=base,
        license=license_id,
        exclude=exclude or (),
        prune=prune,
        tries_load=try_load,
        records=records or (),
    )
    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="hub-moe-publish-") as work, quiet_bars():
        with redirect_stdout(sys.stderr):
            made = plan_publication(api, source, repo, options=options, work=Path(work), say=say)
        _show(made)
        if dry_run and as_json:
            print_json(made.to_dict())
        refuse(made.problems)
        if dry_run:
            return
        confirm(yes=yes)
        done = run_publication(api, made, advance=show_sent)
        found = made.to_dict()  # sizes are those of files that are gone behind this block
    if as_json:
        print_json({**found, **vars(done)})
        return
    print_text(done.url)
    state = "Published" if done.is_changed else "Nothing had changed"
    say(f"{state}: commit {done.commit[:12]}, tag {done.tag}.")


def require_answer(*, yes: bool, dry_run: bool) -> None:
    """Refuse to begin what nobody can be asked about."""
    if not (dry_run or yes or sys.stdin.isatty()):
        raise typer.BadParameter("Without a terminal to ask at, this needs --yes or --dry-run.")


def refuse(problems: Iterable[Any]) -> None:
    """List all problems, and stop if there is one."""
    found = list(problems)
    for each in found:
        say(f"Problem: {each}.")
    if found:
        raise ConfigError(f"Nothing was sent: {len(found)} problem{'s' * (len(found) > 1)} to mend first, see above.")


def confirm(*, yes: bool) -> None:
    """Ask, unless that was answered before."""
    if not yes:
        typer.confirm("Do this?", abort=True, err=True)


def show_sent(done: int, total: int) -> None:
    """How far an upload is."""
    say(f"Sent {describe_bytes(done)} of {describe_bytes(total)}")


def show_files(plan: "UploadPlan") -> None:
    """What is sent, and what is there already."""
    for sign, names in (("+", plan.new), ("~", plan.changed)):
        for name in names:
            say(f"  {sign} {name} ({describe_bytes(plan.files[name].stat().st_size)})")
    for name in plan.deleted:
        say(f"  - {name}")
    if plan.same:
        say(f"  {len(plan.same)} files are there already")


def _show(made: "Publication") -> None:
    plan = made.plan
    state = "a new repo" if plan.head is None else "a repo that is there"
    kind = made.staged.kind.replace("_", " ")
    say(f"{kind.capitalize()} -> {plan.repo}, {state}, {'private' if made.is_private else 'public'}")
    show_files(plan)
    say(f"  {describe_bytes(plan.size_bytes)} to send, tag {made.tag}{' (there already)' * made.is_tagged}")
    for note in made.notes:
        say(f"Note: {note}")
