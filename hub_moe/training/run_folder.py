"""The folder of a training run: what lies where, whether it may be used, and when it is finished.

Files in it are complete or not there.
"""

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files.json_files import write_json
from ..files.tables import write_toml
from .checkpoints import explain_failed_writes
from .run_config import RunConfig


@dataclass(frozen=True)
class TrainingFolder:
    """`run.toml` (every setting) is written first, `report.json` last: where it is, the run is finished."""

    path: Path

    @property
    def settings(self) -> Path:
        """What the run was started with, revisions resolved; `hub-moe train` takes it."""
        return self.path / "run.toml"

    @property
    def report(self) -> Path:
        """What came out, in figures."""
        return self.path / "report.json"

    @property
    def checkpoints(self) -> Path:
        """From which an interrupted run goes on."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """A row of figures for each step."""
        return self.path / "metrics.jsonl"

    @property
    def data_report(self) -> Path:
        """What was read, what was left out, what overlaps with an evaluation."""
        return self.path / "data_report.json"

    @property
    def inputs(self) -> Path:
        """What the run began with beyond its settings: identities of rows, choice file and base."""
        return self.path / "inputs.json"

    @property
    def changes(self) -> Path:
        """The proof of what was trained."""
        return self.path / "what_changed.json"

    @property
    def choice(self) -> Path:
        """The chosen experts, of method `experts`."""
        return self.path / "expert_config.json"

    @property
    def profile(self) -> Path:
        """What the experts were chosen by, where the run chose them itself."""
        return self.path / "expert_profile.json"

    @property
    def num_threads(self) -> Path:
        """With how many of torch's threads the run trains; another number would round differently."""
        return self.path / "num_threads.txt"

    @property
    def loss_curve(self) -> Path:
        """Picture."""
        return self.path / "loss_curve.png"

    @property
    def expert_load(self) -> Path:
        """Picture."""
        return self.path / "expert_load.png"

    def result(self, method: str) -> Path:
        """The patch, the adapter or the model."""
        return self.path / {"experts": "patch", "lora": "adapter"}.get(method, "model")

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return self.report.exists()

    def read_json(self, path: Path) -> dict[str, Any]:
        """One of the files of a finished run."""
        data: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return data

    def write_json(self, path: Path, data: Any) -> None:
        """Write one of the files, complete or not at all."""
        write_json(path, data)


def find_training_folder(config: RunConfig) -> TrainingFolder:
    """The folder that [output] names, whatever is there."""
    return TrainingFolder(Path(config.output.folder).expanduser())


def open_training_folder(config: RunConfig, *, fresh: bool) -> TrainingFolder:
    """The folder of a new run, or of an earlier one with the same settings; `fresh` removes an earlier one first.

    An earlier one that never began to train, because something did not fit, is replaced. The folder's name is no
    setting: a run folder may be moved.

    Raises:
        ConfigError: If the folder holds something else, or a run with other settings.
        CheckpointError: If it cannot be written.
    """
    folder = find_training_folder(config)
    never_began = folder.settings.exists() and not folder.metrics.exists() and not folder.is_finished
    claim_folder(
        folder.settings,
        config.to_dict(),
        read=tomllib.loads,
        write=write_toml,
        what="training run",
        made=_made(folder) if fresh or never_began else None,
        ignored=("output",),
    )
    return folder


def _made(folder: TrainingFolder) -> list[Path]:
    """What a run writes beside its settings, the report first."""
    results = [folder.result(method) for method in ("experts", "lora", "full")]
    files = [
        folder.metrics,
        folder.data_report,
        folder.inputs,
        folder.changes,
        folder.choice,
        folder.profile,
        folder.num_threads,
    ]
    return [folder.report, *results, folder.checkpoints, *files, folder.loss_curve, folder.expert_load]


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
