"""`hub-moe hub mirror`: copy repos from one Hub to another."""

import sys
from contextlib import ExitStack
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .output import describe_bytes, print_json, print_table, say


def mirror(
    src: Annotated[str, typer.Argument(metavar="SRC", help="ENDPOINT/[datasets/|spaces/]OWNER[/NAME].")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="The same of the Hub that gets the copy.")],
    src_token_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the token for SRC.")
    ] = None,
    dst_token_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the token for DST.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another history at DST, and delete what only DST has.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Copy repos between Hubs: history with its commit ids, large files, settings and open pull requests.

    Without NAME, every repo of the owner: of all kinds, or of one by ENDPOINT/models/OWNER, ENDPOINT/datasets/OWNER or
    ENDPOINT/spaces/OWNER. Copies only what DST lacks and checks every sha256; after an interruption run it again.
    Closed pull requests and discussions are not copied.

    Without --src-token-env or --dst-token-env, the token of this machine (HF_TOKEN or `hf auth login`) goes to
    HF_ENDPOINT and to no other Hub.

    \b
    Examples:
      hub-moe hub mirror https://huggingface.co/OWNER/NAME http://127.0.0.1:7860/alice/NAME --dst-token-env LAB_TOKEN
      hub-moe hub mirror http://127.0.0.1:7860/datasets/alice/d https://huggingface.co/datasets/alice/d --dry-run
      hub-moe hub mirror http://127.0.0.1:7860/models/lab https://huggingface.co/lab --src-token-env LAB_TOKEN
    """
    from ..hub.mirror import run_each

    if not (dry_run or yes or sys.stdin.isatty()):
        raise typer.BadParameter("Without a terminal to ask at, this needs --yes or --dry-run.")
    with ExitStack() as stack:
        bar = _ProgressBar(stack)
        mirrors = _open_mirrors((src, dst), (src_token_env, dst_token_env), force, bar, stack)
        planned = run_each(mirrors, lambda one: one.plan())
        if not dry_run:
            if not yes:
                for one in planned:
                    say(_describe_plan(one.report))
                typer.confirm("Do this?", abort=True, err=True)
            bar.start(sum(2 * one.report.bytes for one in planned))
            try:
                run_each(planned, lambda one: one.apply())
            except KeyboardInterrupt:
                say("Interrupted; what was copied stays, and the same command goes on from there.")
                raise
        bar.stop()
        reports = [one.report for one in mirrors]
    _print_reports(reports, as_json=as_json, is_plan=dry_run)
    raise typer.Exit(1 if any(report.error for report in reports) else 0)


class _ProgressBar:
    """One bar for all bytes that come from SRC and go to DST; nothing off a terminal."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._bar: Any = None
        self._task: Any = None

    def start(self, total_bytes: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        if total_bytes and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._stack.enter_context(self._bar)
            self._task = self._bar.add_task("Large files", total=total_bytes)

    def advance(self, name: str, count: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=name[-40:], advance=count)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _open_mirrors(
    addresses: tuple[str, str],
    variables: tuple[str | None, str | None],
    force: bool,
    bar: _ProgressBar,
    stack: ExitStack,
) -> list[Any]:
    from ..hub.mirror import RepoMirror
    from ..hub.mirror_address import Address, Side, pair_repos

    source, target = (Address.parse(text) for text in addresses)
    here, there = (Side.open(one.endpoint, name) for one, name in zip((source, target), variables, strict=True))
    pairs = pair_repos(source, target, here)
    return [
        stack.enter_context(RepoMirror((here, one), (there, other), advance=bar.advance, force=force))
        for one, other in pairs
    ]


def _describe_plan(report: Any) -> str:
    lines = [f"{report.source} -> {report.target}" + (" (new)" if report.is_new else "")]
    size = describe_bytes(report.bytes)
    lines.append(f"  {report.commits} commits, {report.files} large files ({size}), {report.skipped} there already")
    lines += [f"  set {ref}" for ref in report.refs] + [f"  DELETE {ref}" for ref in report.deleted]
    lines += [f"  keep {ref}, which only DST has" for ref in report.kept]
    lines += [f"  pull request {number}" for number in report.pull_requests]
    lines += [f"  {name} becomes {value}" for name, value in report.settings.items()]
    return "\n".join(lines)


def _print_reports(reports: list[Any], *, as_json: bool, is_plan: bool) -> None:
    if as_json:
        print_json([asdict(report) for report in reports])
    else:
        _print_table(reports)
    for report in reports:
        if is_plan and not report.error:
            say(_describe_plan(report))
        for note in report.notes:
            say(f"{report.target}: {note}")
        if report.error:
            say(f"Error: {report.error}")


def _print_table(reports: list[Any]) -> None:
    rows = [
        (
            report.target.split("/", 3)[3],
            report.status,
            str(len(report.refs) + len(report.deleted)),
            str(report.commits),
            f"{report.files} ({describe_bytes(report.bytes)})",
            str(len(report.pull_requests)),
            str(report.verified),
        )
        for report in reports
    ]
    print_table(("repo", "status", "refs", "commits", "large files", "PRs", "verified"), rows)
