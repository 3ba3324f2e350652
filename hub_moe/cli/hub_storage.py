"""`hub-moe hub check`, `gc`, `backup` and `restore`: look after the folder of the embedded Hub."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .output import describe_bytes, print_json, print_text, say, show_progress

Root = Annotated[Path, typer.Option(metavar="DIR", help="The folder that holds everything.", envvar="HUB_MOE_HUB_ROOT")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_ROOT = Path("hub")


def check(
    root: Root = DEFAULT_ROOT,
    quick: Annotated[bool, typer.Option("--quick", help="Do not read the large files through.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prove that nothing is lost: every object reachable, every sha256 right.

    Prints one line for each fault; exit code 1 if there is one. May run while the Hub serves.

    \b
    Examples:
      hub-moe hub check --root lab-hub
    """
    from ..hubserver.store import Store
    from ..hubserver.store.check import find_faults, find_orphans

    with Store(root, create=False) as store, show_progress("checking") as advance:
        faults = list(find_faults(store, read_blobs=not quick, on_progress=advance))
        orphans = find_orphans(store)
    if as_json:
        print_json({"faults": faults, "orphans": orphans})
    else:
        for fault in faults:
            print_text(fault)
    for orphan in orphans:
        say(f"{orphan} belongs to no repo; `hub-moe hub gc` deletes it.")
    say(f"{len(faults)} faults." if faults else "Everything is whole.")
    raise typer.Exit(1 if faults else 0)


def gc(
    root: Root = DEFAULT_ROOT,
    older_than: Annotated[
        float, typer.Option(min=0, metavar="HOURS", help="Keep what is younger: its commit may be on the way.")
    ] = 24,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete what nothing needs any more, and say how much room that frees.

    That is: git objects and large files that no branch, tag or pull request leads to, what deleted repos left, and
    uploads that were never finished. May run while the Hub serves.

    \b
    Examples:
      hub-moe hub gc --dry-run
      hub-moe hub gc --root lab-hub --older-than 1
    """
    from ..hubserver.store import Store
    from ..hubserver.store.gc import collect

    with Store(root, create=False) as store, show_progress("cleaning") as advance:
        freed = collect(store, older_than_s=older_than * 3600, dry_run=dry_run, on_progress=advance)
    if as_json:
        print_json(asdict(freed) | {"dry_run": dry_run})
    else:
        for kind, count in freed.counts.items():
            print_text(f"{count} {kind}, {describe_bytes(freed.sizes_bytes[kind])}")
    for sentence in freed.skipped:
        say(f"Left alone: {sentence}")
    say(f"{'Would free' if dry_run else 'Freed'} {describe_bytes(freed.size_bytes)}.")


def backup(
    target: Annotated[Path, typer.Argument(help="A new file NAME.tar, or a new folder.")],
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Copy the whole Hub as it is at one moment, while it serves.

    It has its name only when it is whole. It holds private repos and the hashes of tokens: keep it safe.

    \b
    Examples:
      hub-moe hub backup hub-monday.tar --root lab-hub
    """
    from ..hubserver.store import Store
    from ..hubserver.store.backup import back_up

    with Store(root, create=False) as store, show_progress("copying") as advance:
        facts = back_up(store, target, on_progress=advance)
    if as_json:
        print_json(asdict(facts))
    say(f"{target} holds {facts.repos} repos, {describe_bytes(facts.size_bytes)}.")


def restore(
    source: Annotated[Path, typer.Argument(help="What `hub-moe hub backup` wrote.")],
    root: Root = DEFAULT_ROOT,
) -> None:
    """Make a Hub from a backup in a new folder, and check it.

    \b
    Examples:
      hub-moe hub restore hub-monday.tar --root lab-hub
    """
    from ..hubserver.store.backup import restore as restore_hub

    with show_progress("restoring") as advance:
        facts = restore_hub(source, root, on_progress=advance)
    say(f"{root} holds {facts.repos} repos as of {facts.created_at}; everything is whole.")
