"""`expert_patch.json`: what an expert patch changes in which base, and how that was found. Never imports torch."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from ..errors import CheckpointError
from ..files.json_files import JsonObject, shorten
from .names import check_declared

METADATA_FILE = "expert_patch.json"
WEIGHTS_FILE = "expert_patch.safetensors"
CONFIG_FILE = "config.json"
FORMAT_VERSION = 1
MODEL_TYPE = "hub_moe_expert_patch"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""What may lie beside a patch and must be the base's, byte for byte: it decides what the model is asked."""
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}  # what a patch may hold -> bytes per number

_MAX_METADATA_BYTES = 100_000_000
_MAX_COMBINATIONS = 16  # of combined patches, combined again; who nests them deeper means harm
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")

TensorHashes = Mapping[str, str]  # dtype -> sha256 of the tensor cast to it


@dataclass(frozen=True)
class Base:
    """The model a patch belongs to: a repo at a commit, or a folder as its name was given, with commit None."""

    repo: str
    commit: str | None
    model_type: str

    def __str__(self) -> str:
        return f"{self.repo} at commit {self.commit}" if self.commit else f"{self.repo} (a folder without a commit)"


@dataclass(frozen=True)
class Selection:
    """How the experts were chosen; `profile_sha256` is that of the expert profile which the scores came from."""

    method: str
    score: str | None = None
    top_p: float | None = None
    share: float | None = None
    profile_sha256: str | None = None


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the patch. `before` has the base's sha256 in each dtype a base may be loaded in."""

    shape: tuple[int, ...]
    dtype: str
    before: TensorHashes
    after: str


@dataclass(frozen=True)
class Contributor:
    """One of the patches that a patch was combined from.

    `name` is OWNER/NAME[/SUBFOLDER] where `revision`, a commit of it, is known, and else the name of a folder.
    `combination` is there if it was combined itself.
    """

    name: str
    revision: str | None
    weights_sha256: str
    weight: float = 1.0
    combination: "Combination | None" = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


@dataclass(frozen=True)
class Combination:
    """How a patch was combined from others: by which method, with which density and seed where it has them."""

    method: str
    contributors: tuple[Contributor, ...]
    density: float | None = None
    seed: int | None = None

    def all_contributors(self) -> tuple[Contributor, ...]:
        """The contributors, and theirs where they were combined themselves."""
        below = [each.combination.all_contributors() for each in self.contributors if each.combination]
        return (*self.contributors, *(contributor for some in below for contributor in some))


@dataclass(frozen=True)
class PatchMetadata:
    """Everything a patch says about itself but the numbers.

    `training` is a free dict of JSON values, `weights_sha256` that of the file of numbers, None until it is written.
    `rebased_from` are the bases that the patch was for before it was moved to this one, the oldest first.

    Raises:
        CheckpointError: If what is declared and the tensors do not agree; the message names the tensor.
    """

    base: Base
    experts: Mapping[int, tuple[int, ...]]
    tensors: Mapping[str, TensorRecord]
    shared_experts: bool = False
    non_expert_modules: bool = False
    balancing_bias: bool = False
    selection: Selection | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    hub_moe_version: str = ""
    weights_sha256: str | None = None
    combination: Combination | None = None
    rebased_from: tuple[Base, ...] = ()

    def __post_init__(self) -> None:
        parts = ("shared_experts", "non_expert_modules", "balancing_bias")
        check_declared(self.tensors, self.experts, {part for part in parts if getattr(self, part)})

    @property
    def method(self) -> str | None:
        """The training method, where the training facts name one."""
        method = self.training.get("method")
        return method if isinstance(method, str) else None

    @property
    def num_experts(self) -> int:
        """Routed experts changed, over all layers."""
        return sum(len(experts) for experts in self.experts.values())

    @property
    def num_parameters(self) -> int:
        """Numbers in the patch."""
        return sum(math.prod(record.shape) for record in self.tensors.values())

    @property
    def size_bytes(self) -> int:
        """Size of the tensors."""
        return sum(math.prod(record.shape) * DTYPES[record.dtype] for record in self.tensors.values())

    def to_dict(self) -> dict[str, Any]:
        """The content of `expert_patch.json`; what came later to the format stands in it only where there is some.

        So every hub_moe reads a patch that was neither combined nor rebased.
        """
        later = {
            "combination": asdict(self.combination) if self.combination else None,
            "rebased_from": [asdict(base) for base in self.rebased_from],
        }
        return {
            "format_version": FORMAT_VERSION,
            "hub_moe_version": self.hub_moe_version,
            "base": asdict(self.base),
            "experts": {str(layer): list(experts) for layer, experts in self.experts.items()},
            "shared_experts": self.shared_experts,
            "non_expert_modules": self.non_expert_modules,
            "balancing_bias": self.balancing_bias,
            "selection": asdict(self.selection) if self.selection else None,
            "training": dict(self.training),
            "weights": {"file": WEIGHTS_FILE, "sha256": self.weights_sha256},
            **{name: value for name, value in later.items() if value},
            "tensors": {
                name: {**asdict(record), "shape": list(record.shape), "before": dict(record.before)}
                for name, record in self.tensors.items()
            },
        }

    def to_json(self) -> str:
        """The text of `expert_patch.json`.

        Raises:
            CheckpointError: If the training facts hold something that JSON does not, such as NaN.
        """
        try:
            return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"The training facts of the patch cannot be written as JSON: {error}.") from error

    @classmethod
    def from_dict(cls, fields: Any, *, source: str) -> Self:
        """The metadata in parsed JSON; `source` is what error messages call it.

        Raises:
            CheckpointError: If a field is missing, unknown, or of another type than expected.
        """
        read = JsonObject(fields, source)
        version = read.take("format_version", int)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{source} has format version {version}; this hub_moe reads version {FORMAT_VERSION}, so update it."
            )
        weights = read.inner("weights")
        if weights.take("file", str) != WEIGHTS_FILE:
            raise CheckpointError(f"{source} names another file than {WEIGHTS_FILE} for its weights.")
        values = {
            "base": _read_base(read.inner("base")),
            "experts": _read_experts(read.take("experts", dict), source),
            "tensors": _read_tensors(read.take("tensors", dict), source),
            "weights_sha256": _checked_sha256(weights.take("sha256", str), source),
            "shared_experts": read.take("shared_experts", bool),
            "non_expert_modules": read.take("non_expert_modules", bool),
            "balancing_bias": read.take("balancing_bias", bool),
            "selection": _read_selection(read),
            "training": read.take("training", dict),
            "hub_moe_version": read.take("hub_moe_version", str),
            "combination": _read_combination(read.take_or(None, "combination", dict, type(None)), source),
            "rebased_from": _read_history(read.take_or([], "rebased_from", list), source),
        }
        weights.finish()
        read.finish()
        try:
            return cls(**values)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The metadata of the patch in `folder`; reads no weights.

        Raises:
            CheckpointError: If the folder holds no patch, or its metadata is damaged.
        """
        path = folder / METADATA_FILE
        if not path.is_file():
            raise CheckpointError(f"{folder} holds no expert patch: it has no {METADATA_FILE}.")
        if path.stat().st_size > _MAX_METADATA_BYTES:
            raise CheckpointError(f"{path} has more than {_MAX_METADATA_BYTES:,} bytes, which no patch needs.")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
        return cls.from_dict(fields, source=str(path))


def _read_base(read: JsonObject) -> Base:
    base = Base(read.take("repo", str), read.take("commit", str, type(None)), read.take("model_type", str))
    read.finish()
    if not base.repo or (base.commit is not None and not _COMMIT.fullmatch(base.commit)):
        raise CheckpointError(
            f"The base of the patch must be a name and a commit of 40 hexadecimal digits or null, not {base.repo!r} "
            f"and {base.commit!r}."
        )
    return base


def _read_experts(fields: dict[str, Any], source: str) -> dict[int, tuple[int, ...]]:
    experts = {}
    for layer, chosen in fields.items():
        is_list = isinstance(chosen, list) and all(type(expert) is int for expert in chosen)
        if not re.fullmatch("0|[1-9][0-9]{0,8}", layer) or not is_list:
            raise CheckpointError(f"{source}: 'experts' must map layer numbers to lists of experts; see {layer!r}.")
        experts[int(layer)] = tuple(chosen)
    return experts


def _read_selection(read: JsonObject) -> Selection | None:
    fields = read.take("selection", dict, type(None))
    if fields is None:
        return None
    inner = JsonObject(fields, "'selection'")
    selection = Selection(
        method=inner.take("method", str),
        score=inner.take("score", str, type(None)),
        top_p=inner.take("top_p", float, int, type(None)),
        share=inner.take_or(None, "share", float, int, type(None)),
        profile_sha256=inner.take("profile_sha256", str, type(None)),
    )
    inner.finish()
    return selection


def _read_combination(fields: dict[str, Any] | None, source: str, depth: int = 1) -> Combination | None:
    if fields is None:
        return None
    where = f"{source}: 'combination'"
    if depth > _MAX_COMBINATIONS:
        raise CheckpointError(f"{where} is of combined patches more than {_MAX_COMBINATIONS} deep.")
    read = JsonObject(fields, where)
    contributors = tuple(
        _read_contributor(JsonObject(each, f"{where}, a contributor"), source, depth)
        for each in read.take("contributors", list)
    )
    combination = Combination(
        method=read.take("method", str),
        contributors=contributors,
        density=read.take_or(None, "density", float, int, type(None)),
        seed=read.take_or(None, "seed", int, type(None)),
    )
    read.finish()
    if len(contributors) < 2:
        raise CheckpointError(f"{where} has {len(contributors)} contributors; expected two or more.")
    return combination


def _read_contributor(read: JsonObject, source: str, depth: int) -> Contributor:
    contributor = Contributor(
        name=read.take("name", str),
        revision=read.take("revision", str, type(None)),
        weights_sha256=_checked_sha256(read.take("weights_sha256", str), f"{source}: a contributor"),
        weight=read.take_or(1.0, "weight", float, int),
        combination=_read_combination(read.take_or(None, "combination", dict, type(None)), source, depth + 1),
    )
    read.finish()
    if not contributor.name or (contributor.revision is not None and not _COMMIT.fullmatch(contributor.revision)):
        raise CheckpointError(
            f"{source}: a contributor must have a name and a commit of 40 hexadecimal digits or null, not "
            f"{shorten(contributor.name)} and {shorten(contributor.revision)}."
        )
    return contributor


def _read_history(entries: list[Any], source: str) -> tuple[Base, ...]:
    return tuple(_read_base(JsonObject(each, f"{source}: 'rebased_from'")) for each in entries)


def _read_tensors(fields: dict[str, Any], source: str) -> dict[str, TensorRecord]:
    return {name: _read_tensor(JsonObject(entry, f"{source}: tensor {name!r}"), name) for name, entry in fields.items()}


def _read_tensor(read: JsonObject, name: str) -> TensorRecord:
    shape, dtype, before = read.take("shape", list), read.take("dtype", str), read.take("before", dict)
    after = _checked_sha256(read.take("after", str), f"tensor {name!r}")
    read.finish()
    if dtype not in DTYPES or not all(type(side) is int and side > 0 for side in shape):
        raise CheckpointError(
            f"Tensor {name!r} is {dtype} of shape {shape}; expected {', '.join(DTYPES)} and sides > 0."
        )
    for kind, sha256 in before.items():
        if kind not in DTYPES or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise CheckpointError(f"Tensor {name!r} has no sound sha256 of the base's {kind}.")
    if not before:
        raise CheckpointError(f"Tensor {name!r} has no sha256 of the base's tensor.")
    return TensorRecord(tuple(shape), dtype, before, after)


def _checked_sha256(text: str, where: str) -> str:
    if not _SHA256.fullmatch(text):
        raise CheckpointError(f"{where}: {shorten(text)} is no sha256 of 64 hexadecimal digits.")
    return text


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")
