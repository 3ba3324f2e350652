"""The folder of a training run: what lies where, and when it is finished."""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.json_files import write_json
from ..files.tables import write_toml
from .folder import claim_folder
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
