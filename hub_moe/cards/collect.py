"""Facts of a model: from its folder or Hub repo, the records and run beside it, and what its config was measured to."""

import hashlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, snapshot_download

from .. import __version__
from ..errors import ConfigError, HubError
from ..evals.records import EntryResult, Record, StoredRecord, find_records
from ..files.json_files import read_json
from ..patches.metadata import METADATA_FILE, PatchMetadata
from .facts import (
    FACTS_FILE,
    Ancestor,
    Architecture,
    ComparedTask,
    ComparisonFacts,
    DatasetFacts,
    Energy,
    Evaluation,
    ExpertLoad,
    Facts,
    License,
    ModelFacts,
    ModelKind,
    PatchFacts,
    Result,
)
from .licences import check_licence, summarise
from .lineage import find_dataset_license, find_lineage
from .metadata import is_hub_id
from .readme import read_readme
from .training_run import TrainingRun, describe_energy, describe_profile, hide_folder

RECORDS_FOLDER = "evals"
_WEIGHTS = re.compile(r"([^/]*\.(safetensors|gguf)|(pytorch|adapter)_model[^/]*\.bin)")
_SMALL_FILES = ["README.md", FACTS_FILE, "*.json", f"{RECORDS_FOLDER}/*", ".eval_results/*.yaml", "card/*.png"]
_LOAD_SOURCES = ("expert profile", "training run")
Say = Callable[[str], None]


@dataclass(frozen=True)
class ModelFolder:
    """A model to be described: its small files lie in `folder`; `weights` are the sha256 of the large ones by name."""

    folder: Path
    name: str
    weights: Mapping[str, str]
    revision: str | None = None

    @property
    def kind(self) -> ModelKind:
        """What the files are: a checkpoint, an expert patch or an adapter."""
        if (self.folder / METADATA_FILE).is_file():
            return "expert_patch"
        return "adapter" if (self.folder / "adapter_config.json").is_file() else "checkpoint"


@dataclass(frozen=True)
class Evidence:
    """What is known beside the model's own files, as plain values.

    Attributes:
        records: Of this model and others; only those of these very weights count.
        footprint: As `Footprint.to_dict` gives it.
        profile: As `ExpertProfile.to_dict` gives it.
        comparison: As `RecordComparison.to_dict` gives it, with the two records that it is of.
    """

    records: Sequence[StoredRecord] = ()
    run: TrainingRun | None = None
    footprint: Mapping[str, Any] | None = None
    profile: Mapping[str, Any] | None = None
    comparison: tuple[StoredRecord, StoredRecord, Mapping[str, Any]] | None = None


def open_model(reference: str) -> ModelFolder:
    """A model's folder, or of OWNER/NAME[@REVISION] the small files and the hashes of the large ones.

    Raises:
        ConfigError: If there is no such folder and it is no repo id.
        HubError: If the Hub cannot be reached.
        OSError: If it cannot be read; the Hub client's errors are among them.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return ModelFolder(folder, folder.resolve().name, hash_weights(folder))
    name, _, revision = reference.partition("@")
    if not is_hub_id(name):
        raise ConfigError(f"{reference!r} is neither a folder nor the id of a repo (OWNER/NAME[@REVISION]).")
    try:
        info = HfApi().model_info(name, revision=revision or None, files_metadata=True)
        local = snapshot_download(name, revision=info.sha, allow_patterns=_SMALL_FILES)
    except httpx2.TransportError as error:
        raise HubError(f"Cannot reach {constants.ENDPOINT} for {name}: {error}.") from error
    files = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs is not None}
    return ModelFolder(Path(local), name, {file: sha for file, sha in files.items() if is_weight(file)}, info.sha)


def hash_weights(folder: Path) -> dict[str, str]:
    """sha256 of every file of weights in a folder, by name."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_weight(path.name):
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def read_facts(folder: Path) -> Facts | None:
    """The facts that an earlier card of this folder was rendered from; None where there are none.

    Raises:
        ConfigError: If the file is damaged.
    """
    path = folder / FACTS_FILE
    return Facts.from_dict(read_json(path, "the facts of a card"), where=str(path)) if path.is_file() else None


def find_evidence(folder: Path, extra: Sequence[Path] = ()) -> list[StoredRecord]:
    """Every record in the model's `evals/` and in other folders, or single files; the same one once.

    Raises:
        ConfigError: If a folder that was named is missing, or a record is damaged.
        EvaluationError: If a record was edited.
    """
    for path in extra:
        if not path.is_dir():
            raise ConfigError(f"{path} is no folder of records.")
    found = [each for place in (folder / RECORDS_FOLDER, *extra) if place.is_dir() for each in find_records(place)]
    return list({each.record.id: each for each in found}.values())


def is_of(record: Record, weights: Mapping[str, str]) -> bool:
    """Whether a record was made with exactly these files of weights."""
    claimed = {name: sha256 for name, sha256 in record.model.files.items() if is_weight(name)}
    return bool(weights) and claimed == dict(weights)


def find_base(model: ModelFolder, run: TrainingRun | None = None) -> Ancestor | None:
    """The model that this one starts from, as its patch, adapter config, run or card says; its licence left open.

    Raises:
        ConfigError, CheckpointError: If one of these is damaged.
    """
    if model.kind == "expert_patch":
        base = PatchMetadata.read(model.folder).base
        return Ancestor(base.repo, "adapter", base.commit)
    adapter = model.folder / "adapter_config.json"
    if adapter.is_file():
        fields = read_json(adapter, "the config of an adapter")
        name, revision = fields.get("base_model_name_or_path"), fields.get("revision")
        return Ancestor(name, "adapter", revision if isinstance(revision, str) else None) if name else None
    if run is not None:
        return run.base
    card = read_readme(model.folder / "README.md").metadata
    known = read_facts(model.folder)
    if known is not None and known.base is not None and known.base.name == card.get("base_model"):
        return replace(known.base, license=None)
    name = card.get("base_model")
    return Ancestor(name, str(card.get("base_model_relation") or "finetune")) if isinstance(name, str) else None


def collect_facts(model: ModelFolder, evidence: Evidence, *, say: Say, previous: Facts | None = None) -> Facts:
    """Everything that can be known. What cannot be reached is told to `say` and left out.

    What `previous` facts know of these same weights stays, where no newer evidence is given.

    Raises:
        ConfigError: If front matter, run or patch are damaged.
    """
    run = evidence.run
    earlier = previous if previous is not None and previous.weights == model.weights else Facts(ModelFacts(model.name))
    patch = PatchMetadata.read(model.folder) if model.kind == "expert_patch" else None
    base = find_base(model, run)
    datasets = tuple(
        replace(each, license=find_dataset_license(each.name, each.revision, say=say)) if each.is_on_hub else each
        for each in (run.datasets if run else earlier.datasets)
    )
    lineage = find_lineage(base, say=say) if base else earlier.lineage
    evaluations = [describe_record(each) for each in _newest(_own(model, evidence, earlier, say=say))]
    return Facts(
        model=ModelFacts(model.name, model.kind, model.revision),
        architecture=describe_footprint(evidence.footprint) if evidence.footprint else earlier.architecture,
        expert_load=_find_load(evidence, earlier),
        lineage=lineage,
        datasets=datasets,
        training=run.describe() if run else earlier.training,
        patch=_describe_patch(patch) if patch else None,
        license=describe_license(read_readme(model.folder / "README.md").metadata, lineage, datasets),
        evaluations=tuple(evaluations),
        comparison=_find_comparison(evidence, earlier, evaluations),
        weights=dict(model.weights),
        energy=_find_energy(evidence, earlier, evaluations),
        pictures=earlier.pictures,
        hub_moe_version=__version__,
    )


def describe_footprint(footprint: Mapping[str, Any]) -> Architecture:
    """The sizes in what `Footprint.to_dict` gives."""
    experts, parameters, flops = footprint["experts"], footprint["parameters"], footprint["flops_per_token"]
    return Architecture(
        model_type=footprint["model_type"],
        layers=footprint["layers"],
        moe_layers=experts["layers"],
        experts=experts["routed"],
        experts_per_token=experts["per_token"],
        has_shared_experts=experts["has_shared"],
        total=parameters["total"],
        active=parameters["active"],
        active_with_embeddings=parameters["active_with_embeddings"],
        per_expert=experts["parameters_each"],
        context=flops["context"],
        forward_flops=flops["forward"],
        training_flops=flops["training"],
        kv_bytes_per_token=footprint["kv_cache"]["bytes_per_token"],
        max_context=footprint["max_context"],
    )


def describe_record(stored: StoredRecord) -> Evaluation:
    """What a card says of a record."""
    record, run = stored.record, stored.record.execution
    execution = {name: getattr(run, name) for name in ("engine", "dtype", "attention", "experts", "device")}
    execution |= {"batch_size": run.batch_size, "chat_template": run.chat_template_sha256}
    return Evaluation(
        record_sha256=record.id,
        file=stored.path.name,
        suite=record.suite.name,
        created=record.created,
        command=shlex.join(_hide_folders(word) for word in record.command),
        results=tuple(_describe_entry(entry) for entry in record.entries),
        execution={name: value for name, value in execution.items() if value is not None},
        versions=dict(record.versions),
        noise_documents=record.noise_floor.num_documents if record.noise_floor else None,
        noise={name: dict(values) for name, values in record.noise_floor.variations.items()}
        if record.noise_floor
        else {},
    )


def describe_comparison(base: StoredRecord, candidate: StoredRecord, comparison: Mapping[str, Any]) -> ComparisonFacts:
    """What a card says of a paired comparison.

    Raises:
        ConfigError: If the mapping is not what `RecordComparison.to_dict`, or the `Comparison` in it, gives.
    """
    inner = comparison.get("comparison", comparison)
    try:
        tasks = tuple(
            ComparedTask(
                task=task["task"],
                verdict=task["verdict"],
                base=task["base"]["value"],
                candidate=task["candidate"]["value"],
                difference=task["difference"]["value"],
                num_documents=task["difference"]["num_documents"],
                **{name: task["difference"][name] for name in ("standard_error", "low", "high")},
                **{name: task[name] for name in ("test", "adjusted_p_value", "lower_is_better")},
                minimum_detectable_effect=task.get("minimum_detectable_effect"),
            )
            for task in inner["tasks"]
        )
        alpha, rule = float(inner["alpha"]), str(inner["rule"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"The comparison is not whole: {type(error).__name__} {error}.") from error
    return ComparisonFacts(
        base_name=str(base.record.model),
        base_record_sha256=base.record.id,
        base_file=base.path.name,
        record_sha256=candidate.record.id,
        alpha=alpha,
        rule=rule,
        tasks=tasks,
        ran_differently={
            name: list(values) for name, values in (comparison.get("execution_differences") or {}).items()
        },
    )


def describe_license(
    card: Mapping[str, Any],
    lineage: Sequence[Ancestor],
    datasets: Sequence[DatasetFacts],
) -> License | None:
    """The declared licence, checked against the nearest base and the data; None if none is declared nor needed."""
    license_id = card.get("license") if isinstance(card.get("license"), str) else None
    name = card.get("license_name") if license_id == "other" else None
    spoken = name if isinstance(name, str) else license_id
    checks = [check_licence(spoken, each.name, each.license, is_dataset=False) for each in lineage[:1]]
    checks += [check_licence(spoken, each.name, each.license, is_dataset=True) for each in datasets]
    if license_id is None and not checks:
        return None
    return License(license_id, name if isinstance(name, str) else None, summarise(checks), tuple(checks))


def _describe_patch(patch: PatchMetadata) -> PatchFacts:
    parts = ("shared_experts", "non_expert_modules", "balancing_bias")
    selection = vars(patch.selection) if patch.selection else {}
    return PatchFacts(
        experts={str(layer): tuple(experts) for layer, experts in patch.experts.items()},
        parameters=patch.num_parameters,
        other_parts=tuple(part.replace("_", " ") for part in parts if getattr(patch, part)),
        selection={name: value for name, value in selection.items() if value is not None},
    )


def _own(model: ModelFolder, evidence: Evidence, earlier: Facts, *, say: Say) -> list[StoredRecord]:
    of_base = {earlier.comparison.base_record_sha256} if earlier.comparison else set()
    of_base |= {evidence.comparison[0].record.id} if evidence.comparison else set()
    others = [each for each in evidence.records if not is_of(each.record, model.weights)]
    names = ", ".join(f"{each.path.name} ({each.record.model})" for each in others if each.record.id not in of_base)
    if names:
        say(f"Not claimed, since they are records of other weights: {names}.")
    return [each for each in evidence.records if is_of(each.record, model.weights)]


def _newest(records: Sequence[StoredRecord]) -> list[StoredRecord]:
    """One record for each declaration of a suite."""
    ordered = sorted(records, key=lambda each: (each.record.created, each.record.id))
    return list({each.record.suite.sha256: each for each in ordered}.values())


def _describe_entry(entry: EntryResult) -> Result:
    metric, task = entry.main, entry.tasks[0]
    datasets = {each.dataset.name for each in entry.tasks}
    return Result(
        entry=entry.name,
        metric=metric.name,
        value=metric.value,
        higher_is_better=metric.higher_is_better,
        num_documents=metric.num_documents,
        dataset=hide_folder(task.dataset.path),
        dataset_split=task.dataset.split,
        standard_error=metric.standard_error,
        low=metric.low,
        high=metric.high,
        num_fewshot=task.num_fewshot,
        limit=entry.limit,
        dataset_name=task.dataset.name if len(datasets) == 1 else None,
        dataset_revision=task.dataset.revision,
        num_unparsable=entry.num_unparsable,
        num_truncated=entry.num_truncated,
    )


def _find_load(evidence: Evidence, earlier: Facts) -> tuple[ExpertLoad, ...]:
    known = {source: [each for each in earlier.expert_load if each.source == source] for source in _LOAD_SOURCES}
    if evidence.profile is not None:
        known["expert profile"] = list(describe_profile(evidence.profile))
    if evidence.run is not None:
        known["training run"] = list(evidence.run.expert_load)
    return tuple(each for source in _LOAD_SOURCES for each in known[source])


def _find_comparison(evidence: Evidence, earlier: Facts, evaluations: Sequence[Evaluation]) -> ComparisonFacts | None:
    if evidence.comparison is not None:
        return describe_comparison(*evidence.comparison)
    shown = {evaluation.record_sha256 for evaluation in evaluations}
    return earlier.comparison if earlier.comparison and earlier.comparison.record_sha256 in shown else None


def _find_energy(evidence: Evidence, earlier: Facts, evaluations: Sequence[Evaluation]) -> tuple[Energy, ...]:
    shown = {evaluation.record_sha256 for evaluation in evaluations}
    of_training = [evidence.run.energy] if evidence.run else [e for e in earlier.energy if e.activity == "training"]
    of_records = [
        describe_energy(f"evaluation by the suite {each.record.suite.name}", each.record.energy)
        for each in evidence.records
        if each.record.id in shown
    ]
    return (*of_training, *of_records)


def _hide_folders(word: str) -> str:
    option, equals, value = word.partition("=")
    return f"{option}={hide_folder(value)}" if equals and word.startswith("-") else hide_folder(word)


def is_weight(name: str) -> bool:
    """Whether a file is one of a model's weights, by its name in the model's folder; those of patches lie deeper."""
    return _WEIGHTS.fullmatch(name) is not None
