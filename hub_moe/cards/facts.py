"""Facts: everything a card says, as plain values. `model_card.json` beside the README is their JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from ..errors import ConfigError
from ..files.tables import read_table

FACTS_FILE = "model_card.json"
FORMAT_VERSION = 1

HowKnown = Literal["measured", "estimate", "not measured"]
ModelKind = Literal["checkpoint", "expert_patch", "adapter", "architecture"]
CompatibilityVerdict = Literal["compatible", "conflict", "unknown"]


@dataclass(frozen=True)
class ModelFacts:
    """What the card is about.

    Attributes:
        name: Id of the repo, or the last part of a folder's path.
        revision: Commit of the repo that was read; None for a folder.
    """

    name: str
    kind: ModelKind = "checkpoint"
    revision: str | None = None


@dataclass(frozen=True)
class Architecture:
    """Sizes by the config alone, MTP layers left out. FLOPs and cache are stated after `context` tokens.

    Attributes:
        active: Parameters a token passes through, without the input embedding.
        active_with_embeddings: The same with it, as some publishers count.
        kv_bytes_per_token: What transformers' cache grows by, in bfloat16.
    """

    model_type: str
    layers: int
    moe_layers: int
    experts: int
    experts_per_token: int
    has_shared_experts: bool
    total: int
    active: int
    active_with_embeddings: int
    per_expert: int
    context: int
    forward_flops: int
    training_flops: int
    kv_bytes_per_token: int
    max_context: int | None = None


@dataclass(frozen=True)
class LayerLoad:
    """Experts of one layer: `imbalance` is the busiest over the mean, `entropy` of the load is 1 where it is even."""

    layer: int
    dead: int
    imbalance: float
    experts: int | None = None
    entropy: float | None = None


@dataclass(frozen=True)
class ExpertLoad:
    """How busy the experts were on a named text; `source` is "expert profile" or "training run"."""

    domain: str
    dataset: str
    source: Literal["expert profile", "training run"]
    layers: tuple[LayerLoad, ...]
    tokens: int | None = None


@dataclass(frozen=True)
class Ancestor:
    """A model below this one, nearest first. `relation` is what the model above is to it, in the Hub's words."""

    name: str
    relation: str
    revision: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class DatasetFacts:
    """What was trained on. `is_on_hub` says whether `name` is the id of a dataset on a Hub."""

    name: str
    is_on_hub: bool
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    rows: int | None = None
    tokens: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    license: str | None = None


@dataclass(frozen=True)
class ChangedKind:
    """Tensors of one kind over all layers; the hashes are over `LAYER SHA256` lines of the run's proof."""

    kind: str
    tensors: int
    trained: int
    changed: int
    sha256_before: str
    sha256_after: str


@dataclass(frozen=True)
class Training:
    """A run of `hub-moe train`."""

    method: str
    steps: int
    tokens: int
    hyperparameters: Mapping[str, Any]
    loss_before: float | None = None
    loss_after: float | None = None
    wall_s: float | None = None
    processes: int | None = None
    changes: tuple[ChangedKind, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PatchFacts:
    """What an expert patch replaces: experts by layer."""

    experts: Mapping[str, tuple[int, ...]]
    parameters: int
    other_parts: tuple[str, ...] = ()
    selection: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compatibility:
    """Whether the model's licence may stand beside that of what it is made from, by the table of `licences`."""

    source: str
    source_license: str | None
    verdict: CompatibilityVerdict
    reason: str


@dataclass(frozen=True)
class License:
    """The licence as the front matter declares it: the Hub's id and, for `other`, the name."""

    id: str | None
    name: str | None = None
    verdict: CompatibilityVerdict = "unknown"
    checks: tuple[Compatibility, ...] = ()


@dataclass(frozen=True)
class Result:
    """The main metric of one entry of a suite, as its record has it."""

    entry: str
    metric: str
    value: float
    higher_is_better: bool
    num_documents: int
    dataset: str
    dataset_split: str
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    num_fewshot: int = 0
    limit: int | None = None
    dataset_name: str | None = None
    dataset_revision: str | None = None
    num_unparsable: int = 0
    num_truncated: int = 0


@dataclass(frozen=True)
class Evaluation:
    """One record of this model: `file` is its name in the folder of records."""

    record_sha256: str
    file: str
    suite: str
    created: str
    command: str
    results: tuple[Result, ...]
    execution: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    noise_documents: int | None = None
    noise: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ComparedTask:
    """Candidate minus base on one task, paired by document."""

    task: str
    verdict: Literal["better", "worse", "tied"]
    base: float
    candidate: float
    difference: float
    standard_error: float
    low: float
    high: float
    num_documents: int
    test: str
    adjusted_p_value: float
    minimum_detectable_effect: float | None = None
    lower_is_better: bool = False


@dataclass(frozen=True)
class ComparisonFacts:
    """This model against its base, both by their records; `ran_differently` has settings of base and model."""

    base_name: str
    base_record_sha256: str
    base_file: str
    record_sha256: str
    alpha: float
    rule: str
    tasks: tuple[ComparedTask, ...]
    ran_differently: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Energy:
    """Of one activity: `how_known` in a word, `method` in full, CO2 and cost only where somebody declared what for."""

    activity: str
    how_known: HowKnown
    joules: float | None = None
    method: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A PNG beside the card."""

    file: str
    about: Literal["training", "experts", "comparison"]


@dataclass(frozen=True)
class Facts:
    """What a model card is rendered from: nothing on it is typed by hand."""

    model: ModelFacts
    architecture: Architecture | None = None
    expert_load: tuple[ExpertLoad, ...] = ()
    lineage: tuple[Ancestor, ...] = ()
    datasets: tuple[DatasetFacts, ...] = ()
    training: Training | None = None
    patch: PatchFacts | None = None
    license: License | None = None
    evaluations: tuple[Evaluation, ...] = ()
    comparison: ComparisonFacts | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    energy: tuple[Energy, ...] = ()
    pictures: tuple[Picture, ...] = ()
    hub_moe_version: str = ""
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "The facts") -> Self:
        """Facts from their JSON.

        Raises:
            ConfigError: If a field is missing, unknown or of another type, or the format is of another version.
        """
        if data.get("format_version") != FORMAT_VERSION:
            raise ConfigError(
                f"{where} is of format version {data.get('format_version')!r}; this hub_moe reads {FORMAT_VERSION}."
            )
        facts: Self = read_table(cls, data, where=where)
        return facts

    @property
    def base(self) -> Ancestor | None:
        """The model that this one starts from."""
        return self.lineage[0] if self.lineage else None
