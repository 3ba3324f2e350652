"""Writes a HubMoe checkpoint as a native DeepSeek one, which loads without hub_moe; weights stay bit-equal."""

import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.utils.tqdm import tqdm
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV3Config

from ..errors import CheckpointError, ConfigError
from .checkpoint import check_experts, move_checkpoint, unfinished_folder
from .configuration_hub_moe import HubMoeConfig
from .modeling_hub_moe import HubMoeForCausalLM
from .safetensors_files import StoredTensor, bytes_of, read_headers

# What each native class can express: field -> the value it must have.
_REQUIRED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid", "moe_layer_freq": 1, "mlp_bias": False, "rope_in_float32": False},
    "deepseek_v2": {
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        "rope_in_float32": True,
        "rope_interleave": True,
        "norm_topk_prob": False,
        "num_mtp_layers": 0,
    },
}
_NATIVE: dict[str, Any] = {"deepseek_v2": DeepseekV2Config, "deepseek_v3": DeepseekV3Config}
_ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
# DeepSeek's own files carry these, and other engines read them, although transformers' classes do not
_DEEPSEEK_KEYS = ("scoring_func", "topk_method", "moe_layer_freq", "aux_loss_alpha", "seq_aux")
_COPIED_FILES = ("*.jinja", "*.model", "*.txt", "tokenizer*.json", "special_tokens_map.json", "vocab.json",
                 "added_tokens.json", "generation_config.json", "LICENSE*")  # fmt: skip


@dataclass(frozen=True)
class TensorKind:
    """The tensors of one kind, and what the export did to them."""

    kind: str
    tensors: int
    size_bytes: int
    expected: str
    changed: int
    sha256: str


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, re-read from the disk and compared with its source."""

    source: str
    target: str
    to: str
    kinds: tuple[TensorKind, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row per kind of tensor, for a table."""
        return [asdict(kind) for kind in self.kinds]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {"source": self.source, "target": self.target, "to": self.to, "tensors": self.rows()}


def export_checkpoint(
    source: str, target: str, *, to: str = "deepseek_v3", max_shard_size: str = "5GB"
) -> ExportReport:
    """Write the HubMoe (or native) checkpoint `source`, a folder or repo id, as model type `to` into folder `target`.

    Tensors are copied shard by shard, so memory stays at one shard. MTP layers also get the copies of embedding and
    head that DeepSeek ships with them and that inference engines read.

    Raises:
        ConfigError: If `to` is unknown or cannot express the model; the message names the field.
        CheckpointError: If `target` is not empty, or the source holds fused experts.
    """
    if to not in _NATIVE:
        raise ConfigError(f"Cannot export to {to!r}; the choices are {', '.join(_NATIVE)}.")
    destination = Path(target)
    if destination.is_file() or any(parent.is_file() for parent in destination.parents):
        raise CheckpointError(f"{target} is, or lies in, a file; a new folder was expected.")
    if destination.exists() and any(destination.iterdir()):
        raise CheckpointError(f"{target} exists and is not empty; give a new folder.")
    folder = _find_source(source)
    config = HubMoeConfig.from_pretrained(str(folder))
    _check_expressible(config, to)
    stored = read_headers(_find_weight_files(folder))
    if any(re.search(r"\.experts\.(gate_up|down)_proj$", name) for name in stored):
        raise CheckpointError(f"{source} holds fused experts; load it and save it once to get per-expert tensors.")
    _check_against_config(config, stored)
    plan = {**{name: name for name in stored}, **_mtp_copies(config, stored)}
    is_new = not destination.exists()
    destination.mkdir(parents=True, exist_ok=True)
    try:
        with unfinished_folder(destination) as work:
            _write_shards(plan, stored, work, max_shard_size)
            _copy_small_files(folder, work)
            _native_config(config, to).save_pretrained(work)
            kinds = tuple(_compare(plan, stored, read_headers(_find_weight_files(work))))
            move_checkpoint(work, destination)
    finally:
        if is_new and not any(destination.iterdir()):
            destination.rmdir()
    return ExportReport(source, target, to, kinds)


def _find_source(source: str) -> Path:
    """The folder of a checkpoint; a name that is no folder is a repo of the Hub."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise CheckpointError(f"{source!r} is neither a folder nor a repo id of the form owner/name.")
    return Path(snapshot_download(source))


def _check_against_config(config: HubMoeConfig, stored: dict[str, StoredTensor]) -> None:
    """Refuse a checkpoint that HubMoe would not load: tensors missing, superfluous, or of other shapes.

    Raises:
        CheckpointError: Naming the tensor.
    """
    with torch.device("meta"):
        model = HubMoeForCausalLM(config)
    check_experts(model, stored)
    optional = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if ".experts." in name:
            continue
        if name not in stored:
            if name not in optional:
                raise CheckpointError(f"The checkpoint lacks {name!r}, which its config asks for.")
        elif stored[name].shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{stored[name].path}: {name!r} has shape {stored[name].shape}, and by config it should be "
                f"{tuple(tensor.shape)}."
            )


def _check_expressible(config: HubMoeConfig, to: str) -> None:
    for name, needed in _REQUIRED[to].items():
        if getattr(config, name) != needed:
            other = next((t for t in _REQUIRED if _REQUIRED[t].get("scoring_func") == config.scoring_func), None)
            hint = f" Try --to {other}." if name == "scoring_func" and other else ""
            raise ConfigError(
                f"{to} cannot express {name}={getattr(config, name)!r}; it needs {name}={needed!r}.{hint}"
            )
    if not config.n_shared_experts:
        raise ConfigError(f"{to} cannot express n_shared_experts={config.n_shared_experts}; it needs at least 1.")


def _native_config(config: HubMoeConfig, to: str) -> Any:
    values = config.to_dict()
    for name in ("model_type", "transformers_version", "auto_map"):
        values.pop(name, None)
    ours = set(HubMoeConfig().to_dict()) - set(_NATIVE[to]().to_dict()) - set(_DEEPSEEK_KEYS)
    native = _NATIVE[to](**{name: value for name, value in values.items() if name not in ours})
    native.architectures = [_ARCHITECTURES[to]]
    return native


def _mtp_copies(config: HubMoeConfig, stored: dict[str, StoredTensor]) -> dict[str, str]:
    """New name -> source name of the embedding and head copies in each MTP layer."""
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight" if "lm_head.weight" in stored else embedding
    copies = {}
    for index in range(config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_layers):
        copies[f"model.layers.{index}.embed_tokens.weight"] = embedding
        copies[f"model.layers.{index}.shared_head.head.weight"] = head
    return {new: old for new, old in copies.items() if new not in stored}


def _write_shards(plan: dict[str, str], stored: dict[str, StoredTensor], folder: Path, max_shard_size: str) -> None:
    """Write the planned tensors as safetensors shards with an index."""
    on_meta = {new: torch.empty(stored[old].shape, dtype=stored[old].dtype, device="meta") for new, old in plan.items()}
    try:
        split = split_torch_state_dict_into_shards(
            on_meta, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"max_shard_size={max_shard_size!r} is no size such as 5GB.") from error
    for filename, names in tqdm(split.filename_to_tensors.items(), desc="Writing shards", disable=None):
        save_file({name: stored[plan[name]].read() for name in names}, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_small_files(source: Path, target: Path) -> None:
    for pattern in _COPIED_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)


def _find_weight_files(folder: Path) -> list[str]:
    """The safetensors files of a checkpoint folder, by its index where it has one.

    Raises:
        CheckpointError: If there are none, or the index names a file that is not there.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index: a JSON object with 'weight_map' was expected.") from error
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}; a checkpoint in safetensors format was expected.")
    return [str(folder / name) for name in names]


def _compare(
    plan: dict[str, str], stored: dict[str, StoredTensor], written: dict[str, StoredTensor]
) -> Iterator[TensorKind]:
    """Hash source and result tensor by tensor, summed up by kind.

    Raises:
        CheckpointError: If a tensor differs or is missing; nothing has been given its name yet.
    """
    by_kind: dict[str, list[str]] = defaultdict(list)
    for name in sorted(plan):
        by_kind[tensor_kind(name, is_copy=plan[name] != name)].append(name)
    for kind, names in sorted(by_kind.items()):
        total = hashlib.sha256()
        for name in names:
            digest = _digest(written[name])
            if written[name].dtype != stored[plan[name]].dtype or digest != _digest(stored[plan[name]]):
                raise CheckpointError(f"Tensor {name!r} changed while it was written; the disk may be failing.")
            total.update(digest)
        size = sum(written[name].size_bytes for name in names)
        expected = "copied" if kind.startswith("MTP copy") else "unchanged"
        yield TensorKind(kind, len(names), size, expected, 0, total.hexdigest())


def _digest(tensor: StoredTensor) -> bytes:
    return hashlib.sha256(bytes_of(tensor.read())).digest()


def tensor_kind(name: str, *, is_copy: bool = False) -> str:
    """What a tensor belongs to: attention, router, routed experts, ..."""
    if is_copy:
        return "MTP copy of embedding or head"
    kinds: Iterable[tuple[str, str]] = (
        (r"\.(enorm|hnorm|eh_proj|shared_head)\.", "MTP"),
        (r"\.mlp\.experts\.", "routed experts"),
        (r"\.mlp\.shared_experts\.", "shared experts"),
        (r"\.mlp\.gate\.", "router"),
        (r"\.mlp\.", "dense MLP"),
        (r"\.self_attn\.", "attention"),
        (r"norm\.", "norms"),
        (r"embed_tokens|lm_head", "embedding and head"),
    )
    return next((kind for pattern, kind in kinds if re.search(pattern, name)), "other")
