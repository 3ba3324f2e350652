"""`hub-moe contribute`: an expert patch as one pull request on its base."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .output import describe_bytes, print_json, print_text, say
from .publish import DryRun, Exclude, Records, Yes, confirm, refuse, require_answer, show_files, show_sent
from .publish import publish as publish_repo

if TYPE_CHECKING:
    from ..collaboration.contribute import Contribution


def contribute(  # noqa: PLR0913 (a parameter is a flag)
    source: Annotated[Path, typer.Argument(metavar="PATCH|RUN", help="Folder of a patch, or of the run that made it.")],
    repo: Annotated[str, typer.Argument(metavar="BASE_REPO", help="OWNER/NAME of the base that it is for.")],
    name: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="Of the folder in patches/.", show_default="that of PATCH or RUN"),
    ] = None,
    records: Records = None,
    suites: Annotated[
        list[str] | None,
        typer.Option("--evaluate", metavar="SUITE", help="First ask patch and base this; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many documents of each task, with --evaluate.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Files in place of the Hub's datasets, with --evaluate.")
    ] = None,
    general: Annotated[
        str, typer.Option(metavar="SUITE", help="The suite that shows what it costs elsewhere.")
    ] = "quick",
    license_id: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Of the patch.", show_default="the base's")
    ] = None,
    exclude: Exclude = None,
    own_repo: Annotated[
        str | None,
        typer.Option(
            "--own-repo", metavar="OWNER/NAME", help="No pull request: a repo of its own that names the base."
        ),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found and done as JSON.")] = False,
) -> None:
    """Propose an expert patch to the owners of its base, by one pull request that holds the evidence.

    First the patch is checked against the base: its commit must be in the history, every tensor that it replaces must
    have the bytes there that it was made for, and none of them may have changed since. The description shows what
    changed by layer and expert, what it gains and what it costs elsewhere by paired comparison with the base, overlap
    of training and evaluation data, energy and cost; what was not measured is said, with the command that measures it.

    The pull request is a draft until all of it is there. The same command goes on after an interruption, and updates
    the open pull request when the patch has changed; there is never a second one.

    \b
    Examples:
      hub-moe contribute runs/law alice/my-moe --as law --evaluate quick
      hub-moe contribute runs/law/patch alice/my-moe --records evals --dry-run
      hub-moe contribute runs/law alice/my-moe --own-repo bob/law-experts
    """
    import tempfile

    from huggingface_hub import HfApi

    from ..bars import quiet_bars
    from ..collaboration.contribute import ContributeOptions, check_base, open_patch, plan_contribution
    from ..collaboration.contribute import contribute as run_contribution

    require_answer(yes=yes, dry_run=dry_run)
    api = HfApi()
    if suites or own_repo:
        patch, metadata = open_patch(source, repo)
        with redirect_stdout(sys.stderr), quiet_bars():
            check_base(api, repo, metadata)
            out = records[0] if records else patch.folder / "evals"
            for suite in suites or ():
                _evaluate(patch.folder, f"{repo}@{metadata.base.commit}", suite, out, limit=limit, data_dir=data_dir)
    if own_repo is not None:
        if name is not None:
            raise ConfigError("--as names the folder in a pull request; with --own-repo there is none.")
        publish_repo(
            source=source,
            repo=own_repo,
            license_id=license_id,
            records=records,
            exclude=exclude,
            dry_run=dry_run,
            yes=yes,
            as_json=as_json,
        )
        return
    options = ContributeOptions(name, records or (), exclude or (), license_id, general)
    with tempfile.TemporaryDirectory(prefix="hub-moe-contribute-") as work, quiet_bars():
        with redirect_stdout(sys.stderr):
            made = plan_contribution(api, source, repo, options=options, work=Path(work), say=say)
        _show(made)
        if dry_run and as_json:
            print_json(made.to_dict())
        refuse(made.problems)
        if dry_run:
            return
        confirm(yes=yes)
        done = run_contribution(api, made, advance=show_sent)
        found = made.to_dict()  # sizes are those of files that are gone behind this block
    if as_json:
        print_json({**found, "pull_request": done.number, "url": done.url, "state": done.state})
        return
    print_text(done.url)
    say(f"The pull request {repo}#{done.number}: {done.state}.")


def _evaluate(patch: Path, base: str, suite: str, out: Path, *, limit: int | None, data_dir: Path | None) -> None:
    """Records of patch and base on a suite, whatever is not there already."""
    from ..cards.training_run import hide_folder
    from ..evals.models import ModelRequest
    from ..evals.session import Plan, evaluate
    from ..evals.suites import load_suite

    name, _, revision = base.partition("@")
    options: list[Any] = ["--suite", hide_folder(suite), "--base", base]
    options += ["--limit", limit] if limit is not None else []
    command = ["hub-moe", "eval", hide_folder(str(patch)), *map(str, options)]
    plan = Plan(load_suite(suite, limit=limit), out, data_dir=data_dir, command=command, reuses=True)
    evaluate(ModelRequest(str(patch)), plan, base=ModelRequest(name, revision=revision), say=say)


def _show(made: "Contribution") -> None:
    where = f"the open pull request #{made.proposal.number}" if made.proposal else "a new pull request"
    say(f"Expert patch -> {made.repo}, {made.folder}, {where}")
    show_files(made.plan)
    say(f"  {describe_bytes(made.plan.size_bytes)} to send")
    for note in made.notes:
        say(f"Note: {note}")
