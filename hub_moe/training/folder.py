"""Folders of runs: whether one may be used, and files that are complete or not there."""

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .checkpoints import explain_failed_writes


def write_atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file or folder under a temporary name, then give it its own."""
    unfinished = target.with_name(f".unfinished-{target.name}")
    remove(unfinished)
    write(unfinished)
    remove(target)
    os.replace(unfinished, target)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def claim_folder(
    settings_file: Path,
    settings: Mapping[str, Any],
    *,
    read: Callable[[str], Mapping[str, Any]],
    write: Callable[[Mapping[str, Any]], str],
    what: str,
    made: Iterable[Path] | None,
    ignored: Collection[str] = (),
) -> None:
    """Make the folder of `settings_file` that of a run with `settings`, or see that it is already.

    Args:
        settings_file: Written first; where it is, the folder is a run's.
        settings: What the run is started with.
        read: Text of the file to settings.
        write: Settings to text.
        what: Names such a run in messages.
        made: What a run makes, the proof of its end first; with it, an earlier run is removed.
        ignored: Tables of the settings in which runs may differ.

    Raises:
        ConfigError: If the folder holds something else, or a run with other settings.
        CheckpointError: If it cannot be written.
    """
    path = settings_file.parent
    text = write(settings)
    with explain_failed_writes(path):
        path.mkdir(parents=True, exist_ok=True)
        is_run = settings_file.exists()
        if not is_run and any(entry.name != f".unfinished-{settings_file.name}" for entry in path.iterdir()):
            raise ConfigError(f"{path} holds files that are not of a {what}; name an empty or new folder.")
        if is_run and made is not None:
            _remove_run(settings_file, made)
            is_run = False
        if is_run:
            found, wanted = (
                {k: v for k, v in read(t).items() if k not in ignored} for t in (settings_file.read_text("utf-8"), text)
            )
            if found != wanted:
                raise ConfigError(
                    f"{path} holds a run with other settings ({first_difference(found, wanted)}); name another "
                    "folder, or start anew with --fresh."
                )
        if not is_run:
            write_atomically(settings_file, lambda temporary: temporary.write_text(text, "utf-8"))


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first setting, named by its path, in which `wanted` differs from `found`."""
    there, now = _flatten(found), _flatten(wanted)
    for name in [*now, *there]:
        if there.get(name) != now.get(name):
            return f"{name} is {there.get(name)!r} there and {now.get(name)!r} now"
    return "they are ordered differently"


def _remove_run(settings_file: Path, made: Iterable[Path]) -> None:
    """The proof of its end goes first and the settings last, so that no remainder looks like a run."""
    for path in [*made, *settings_file.parent.glob(".unfinished-*"), settings_file]:
        remove(path)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        is_table = isinstance(value, Mapping)
        flat.update(_flatten(value, f"{prefix}{name}.") if is_table else {f"{prefix}{name}": value})
    return flat
