"""What a run folder of `hub-moe train` and an expert profile say: training, data, energy and expert load."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..energy import EnergyReport
from ..errors import ConfigError
from ..files.json_files import read_json
from ..files.tables import read_toml
from .facts import Ancestor, ChangedKind, DatasetFacts, Energy, ExpertLoad, HowKnown, LayerLoad, Training

_RELATIONS = {"full": "finetune", "experts": "adapter", "lora": "adapter"}
_NOT_SETTINGS = {"source", "revision", "config", "split", "evaluation", "name", "report_to", "output", "columns"}


class TrainingRun:
    """A finished run.

    Raises:
        ConfigError: If the folder holds no finished run, or one of its files is damaged or lacks what it should hold.
        OSError: If a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        missing = [name for name in ("run.toml", "report.json") if not (folder / name).is_file()]
        if missing:
            raise ConfigError(f"{folder} holds no finished run of hub-moe train: it has no {' and no '.join(missing)}.")
        self.folder = folder
        self.settings = read_toml(folder / "run.toml")
        self.report = read_json(folder / "report.json", "the report of a run")
        self.data = self._read("data_report.json", "the report on a run's data")
        self.changes = self._read("what_changed.json", "the proof of what a run changed")

    def _read(self, name: str, what: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json(path, what) if path.is_file() else {}

    def describe(self) -> Training:
        """The run in figures."""
        try:
            report = self.report
            return Training(
                method=report["method"],
                steps=report["steps"],
                tokens=report["tokens"],
                hyperparameters=self._hyperparameters(),
                loss_before=report["held_out_loss"]["before"],
                loss_after=report["held_out_loss"]["after"],
                wall_s=report.get("wall_s"),
                processes=report.get("processes"),
                changes=tuple(_sum_up_changes(self.changes.get("rows", []))),
                versions=dict(report.get("versions", {})),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{self.folder / 'report.json'} is not a whole report of a run: {error}.") from error

    def _hyperparameters(self) -> dict[str, Any]:
        return {
            f"{table}.{key}": hide_folder(value) if isinstance(value, str) else value
            for table, values in self.settings.items()
            if isinstance(values, Mapping) and table != "output"
            for key, value in values.items()
            if key not in _NOT_SETTINGS and not isinstance(value, Mapping)
        }

    @property
    def base(self) -> Ancestor | None:
        """The model that was trained further; None where training began with random weights."""
        relation = _RELATIONS.get(str(self.report.get("method")))
        model = self.report.get("model")
        if relation is None or not isinstance(model, Mapping) or not model.get("name"):
            return None
        return Ancestor(str(model["name"]), relation, revision=model.get("revision"))

    @property
    def datasets(self) -> tuple[DatasetFacts, ...]:
        """What was trained on, with the rows and tokens of the training side."""
        source = self.report.get("data")
        if not isinstance(source, Mapping) or not isinstance(source.get("source"), str):
            return ()
        is_on_hub = source.get("kind") == "hub"
        train = self.data.get("train", {})
        return (
            DatasetFacts(
                name=source["source"] if is_on_hub else hide_folder(source["source"]),
                is_on_hub=is_on_hub,
                revision=source.get("revision"),
                config=source.get("config"),
                split=source.get("split"),
                rows=train.get("documents"),
                tokens=train.get("tokens"),
                files={hide_folder(file["name"]): file["sha256"] for file in source.get("files", ())},
            ),
        )

    @property
    def energy(self) -> Energy:
        """What the run used.

        Raises:
            ConfigError: If its energy block is damaged.
        """
        return describe_energy("training", self.report.get("energy"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`; none where there is no such file.

        Raises:
            ConfigError: If a line is not a JSON object.
        """
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return []
        try:
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        except ValueError as error:
            raise ConfigError(f"{path} is damaged: {error}.") from error
        if not all(isinstance(row, dict) for row in rows):
            raise ConfigError(f"{path} is damaged: each line must be a JSON object.")
        return rows

    @property
    def expert_load(self) -> tuple[ExpertLoad, ...]:
        """The load in the last steps that were logged."""
        row = next((row for row in reversed(self.metrics) if row.get("imbalance")), None)
        if row is None or not self.datasets:
            return ()
        dead = row.get("dead_experts") or {}
        layers = [
            LayerLoad(int(layer), dead=int(dead.get(layer, 0)), imbalance=float(value))
            for layer, value in row["imbalance"].items()
        ]
        return (ExpertLoad("last logged steps", name_dataset(self.datasets[0]), "training run", tuple(layers)),)


def describe_profile(profile: Mapping[str, Any]) -> tuple[ExpertLoad, ...]:
    """The load of every domain of an expert profile, as its `to_dict` gives it.

    Raises:
        ConfigError: If it is no such mapping.
    """
    try:
        return tuple(
            ExpertLoad(
                domain=str(name),
                dataset=_name_profiled(domain["dataset"]),
                source="expert profile",
                layers=tuple(_describe_layer(int(index), layer["tokens"]) for index, layer in domain["layers"].items()),
                tokens=int(domain["num_tokens"]),
            )
            for name, domain in profile["domains"].items()
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"The expert profile is not whole: {type(error).__name__} {error}.") from error


def describe_energy(activity: str, block: Mapping[str, Any] | None) -> Energy:
    """The energy block of a record or run, as `EnergyReport.to_dict` gives it; without one it was not measured.

    Raises:
        ConfigError: If the block is not one, or its totals are not what its parts give.
    """
    if block is None:
        return Energy(activity, "not measured")
    report = EnergyReport.from_dict(block, where=f"The energy block of the {activity}")
    how: HowKnown = "measured" if all(part.is_measured for part in report.components if part.joules) else "estimate"
    source = report.grid.source if report.grid and report.co2_g is not None else None
    known = {"co2_g": report.co2_g, "co2_source": source, "usd": report.usd}
    return Energy(
        activity,
        how if report.joules is not None else "not measured",
        joules=report.joules,
        method=report.label,
        details={key: value for key, value in known.items() if value is not None},
    )


def name_dataset(dataset: DatasetFacts) -> str:
    """The dataset with its revision, in one line."""
    return f"{dataset.name} at {dataset.revision[:12]}" if dataset.revision else dataset.name


def hide_folder(text: str) -> str:
    """The last name of an absolute path, which says how somebody's machine is laid out; other texts as they are."""
    for path in (PurePosixPath(text.removeprefix("file://")), PureWindowsPath(text)):
        if path.is_absolute():
            return path.name or str(path)
    return PurePosixPath(text).name if text.startswith("~") else text


def without_folder(ancestor: Ancestor) -> Ancestor:
    """With the last name only, where the model is a folder."""
    return replace(ancestor, name=hide_folder(ancestor.name))


def _sum_up_changes(rows: list[Mapping[str, Any]]) -> list[ChangedKind]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["kind"], []).append(row)
    return [
        ChangedKind(
            kind,
            tensors=sum(row["tensors"] for row in group),
            trained=sum(row["trained_tensors"] for row in group),
            changed=sum(row["changed_tensors"] for row in group),
            sha256_before=_hash(group, "sha256_before"),
            sha256_after=_hash(group, "sha256_after"),
        )
        for kind, group in groups.items()
    ]


def _hash(rows: list[Mapping[str, Any]], name: str) -> str:
    return hashlib.sha256("".join(f"{row['layer']} {row[name]}\n" for row in rows).encode()).hexdigest()


def _describe_layer(index: int, tokens: list[int]) -> LayerLoad:
    total, number = sum(tokens), len(tokens)
    shares = [count / total for count in tokens if count]
    entropy = -math.fsum(share * math.log(share) for share in shares) / math.log(number) if number > 1 else 1.0
    return LayerLoad(
        layer=index,
        dead=tokens.count(0),
        imbalance=max(tokens) * number / total if total else 1.0,
        experts=number,
        entropy=entropy if total else None,
    )


def _name_profiled(dataset: Mapping[str, Any]) -> str:
    name = next((dataset[key] for key in ("source", "path", "name", "repo", "file") if dataset.get(key)), "")
    revision = dataset.get("revision") or dataset.get("sha256")
    label = hide_folder(str(name)) or "a text that the profile does not name"
    return f"{label} at {str(revision)[:12]}" if revision else label
