"""Loading and saving of HubMoe checkpoints: checked before they are read, whole once they have a name."""

import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Self, cast

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils import logging

from ..errors import CheckpointError, ConfigError, MissingExtraError
from .conversion import (
    SCALE_SUFFIX,
    copy_experts_by_name,
    find_fused_stacks,
    find_matrices,
    find_missing_expert,
    find_stacks,
    share_reading,
)
from .remote_code import write_remote_code
from .safetensors_files import FP8_DTYPES, StoredTensor, collecting_no_garbage, read_headers, reading_threads

logger = logging.get_logger(__name__)

_EXPERT = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_UNFINISHED = ".unfinished-"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


# what `from_pretrained` has to tell the hook that transformers calls from inside of it
_PLACING: ContextVar[Any] = ContextVar("placing", default=None)


class DirectLoadingMixin:
    """`from_pretrained` that reads each expert once, straight into its place, or leaves it in its file."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        expert_budget: int | str | None = None,
        expert_profile: Any = None,
        expert_dtype: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """See `transformers.PreTrainedModel.from_pretrained`.

        Args:
            expert_budget: Memory for routed experts, such as "6GiB" or a number of bytes. If they take more, they stay
                in the safetensors files, and those in use are kept in that much memory; such a model computes the same
                and is for inference only. If all fit, the model is an ordinary one.
            expert_profile: An `ExpertProfile` or the path of one: its most used experts always stay in memory.
                Without one those used most of late stay.
            expert_dtype: "int8" or "int4": the routed experts are kept in that, by torchao, and multiplied in the
                model's dtype; for inference only, and not together with a budget.

        Raises:
            CheckpointError: If the checkpoint is truncated.
            ConfigError: If the budget is no size or too small for one token, the profile is not of this model, or the
                arguments do not go together.
            MissingExtraError: For an expert_dtype without torchao.
        """
        load: Callable[..., Any] = super().from_pretrained  # type: ignore[misc]
        placing = _place_experts(expert_budget, expert_profile, expert_dtype)
        if placing is None:
            model: Self = load(pretrained_model_name_or_path, *args, **kwargs)
            return model
        before = _PLACING.set(placing)
        try:
            loaded: Any = load(pretrained_model_name_or_path, *args, **kwargs)
        finally:
            _PLACING.reset(before)
        placing.install(loaded[0] if isinstance(loaded, tuple) else loaded)
        return cast(Self, loaded)

    @staticmethod
    @collecting_no_garbage()
    def _load_pretrained_model(
        model: Any,
        state_dict: Any,
        checkpoint_files: list[str] | None,
        load_config: Any,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        load: Callable[..., tuple[Any, Any]] = PreTrainedModel._load_pretrained_model
        files = checkpoint_files or []
        is_safetensors = bool(files) and all(file.endswith(".safetensors") for file in files)
        obstacle = "weights that are not in safetensors files"
        if state_dict is None and is_safetensors:
            stored = read_headers(files)
            load_config = model._prepare_loading(stored, load_config)
            obstacle = _find_obstacle(load_config)
            if not obstacle:
                return _load_directly(load, model, stored, files, load_config)
        if (placing := _PLACING.get()) is not None:
            raise ConfigError(f"{placing.option} does not go together with {obstacle}.")
        return load(model, state_dict, checkpoint_files, load_config, **kwargs)

    def _prepare_loading(self, stored: dict[str, StoredTensor], load_config: Any) -> Any:
        """What a class checks before tensors are read; returns the settings to load with."""
        return load_config


class CheckpointMixin(DirectLoadingMixin):
    """`from_pretrained` and `save_pretrained` of our model classes.

    Loading dequantises block-scaled FP8, refuses pickles unless `use_safetensors=False` asks for them, and checks names
    and shapes of experts first. Saving writes to a temporary name and renames last.
    """

    config: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """See `DirectLoadingMixin.from_pretrained`.

        Raises:
            CheckpointError: If the checkpoint is truncated, holds only pickles, or its experts do not match its config.
        """
        reads_files = kwargs.get("state_dict") is None and not kwargs.get("gguf_file")
        if reads_files and kwargs.get("use_safetensors") is None:
            _refuse_pickle(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
            kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def _prepare_loading(self, stored: dict[str, StoredTensor], load_config: Any) -> Any:
        _settle_mtp_layers(self, stored)
        check_experts(self, stored, check_shapes=not load_config.ignore_mismatched_sizes)
        if _dequantizes_fp8(load_config.hf_quantizer):
            # transformers' own dequantisation refuses matrices that 128 does not divide, which DeepSeek-V3 has
            mapping = get_model_conversion_mapping(self)
            plain = replace(load_config, hf_quantizer=None, weight_mapping=mapping)
            return load_config if _find_obstacle(plain) else plain
        return load_config

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """See `torch.nn.Module.load_state_dict`; takes experts by their names on disk as well as fused."""
        others, touched = copy_experts_by_name(self, state_dict)  # type: ignore[arg-type]
        if not touched:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]
        result = super().load_state_dict(others, strict=False, assign=assign)  # type: ignore[misc]
        missing = [name for name in result.missing_keys if name not in touched]
        if strict:
            missing += filter(None, [find_missing_expert(self, state_dict)])  # type: ignore[arg-type]
            if missing or result.unexpected_keys:
                wrong = f"lacks {missing[0]!r}" if missing else f"has {result.unexpected_keys[0]!r} too many"
                raise CheckpointError(f"The state dict {wrong}.")
        return type(result)(missing, result.unexpected_keys)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """See `transformers.PreTrainedModel.save_pretrained`; also writes the code that loads it without hub_moe."""
        save: Callable[..., None] = super().save_pretrained  # type: ignore[misc]
        if not is_main_process:
            save(save_directory, is_main_process=False, **kwargs)
            return
        target = Path(save_directory)
        if target.is_file():
            raise CheckpointError(f"Cannot save to {target}: it is a file, and a folder was expected.")
        target.mkdir(parents=True, exist_ok=True)
        if kwargs.get("push_to_hub"):  # a commit on the Hub is whole or not there
            self.config.auto_map = write_remote_code(type(self), target)
            save(target, **kwargs)
            return
        with unfinished_folder(target) as folder:
            self.config.auto_map = write_remote_code(type(self), folder)
            save(folder, **kwargs)
            move_checkpoint(folder, target, variant=kwargs.get("variant"))


def _dequantizes_fp8(quantizer: Any) -> bool:
    """Whether transformers chose, or the user asked, to turn an FP8 checkpoint into a plain model."""
    return isinstance(quantizer, FineGrainedFP8HfQuantizer) and bool(quantizer.quantization_config.dequantize)


def _find_obstacle(load_config: Any) -> str:
    """What in the settings leaves the reading to transformers; empty if nothing does."""
    if load_config.device_mesh is not None or is_deepspeed_zero3_enabled():
        return "sharing a model out over processes"
    if load_config.hf_quantizer is not None:
        return "quantised weights"
    if "disk" in (load_config.device_map or {}).values():
        return "a device_map that puts modules on the disk"
    return ""


def _place_experts(*options: Any) -> Any:
    """What is to be done with experts, if anything. It is not a part of what travels with a checkpoint."""
    if all(option is None for option in options):
        return None
    try:
        module = import_module("hub_moe.experts.offload")
    except ModuleNotFoundError as error:
        raise MissingExtraError("An expert_budget or expert_dtype needs hub_moe: pip install hub_moe") from error
    return module.place_experts(*options)


def _load_directly(
    load: Callable[..., Any],
    model: Any,
    stored: dict[str, StoredTensor],
    checkpoint_files: list[str],
    load_config: Any,
) -> tuple[Any, Any]:
    """transformers' loading with tensors that are read by us, except for types that we do not know.

    Nothing stays mapped, unlike with transformers: a file may change while the model is in use, and where in a file a
    weight lies should not decide how products with it are rounded, which MKL lets the place in memory do.
    """
    placing = _PLACING.get()
    mapping = load_config.weight_mapping or []
    stacks = find_stacks(model, stored, mapping)
    if placing is not None:
        stacks |= find_fused_stacks(model, stored, mapping)
    done = {name for stack in stacks.values() for name in stack.names()}
    done |= {name + SCALE_SUFFIX for name, tensor in stored.items() if tensor.dtype in FP8_DTYPES}
    matrices = find_matrices(stored, [name for name in stored if name not in done])
    done |= matrices.keys()
    if placing is not None:
        stacks = placing.take(model, stacks, load_config.device_map)
    with ExitStack() as files, reading_threads() as threads:
        state_dict: dict[str, Any] = {**stacks, **matrices}
        share_reading(model, state_dict, threads, load_config.device_map)
        for path in sorted({tensor.path for name, tensor in stored.items() if name not in done}):
            file = files.enter_context(safe_open(path, framework="pt", device="cpu"))
            names = (name for name in file.keys() if name not in done)  # noqa: SIM118
            state_dict.update((name, file.get_slice(name)) for name in names)
        result: tuple[Any, Any] = load(model, state_dict, checkpoint_files, load_config)
    return result


def check_experts(model: Any, stored: dict[str, StoredTensor], *, check_shapes: bool = True) -> None:
    """Compare the expert tensors in a checkpoint with those the model expects.

    Files that hold fused experts, or no layers at all, are left to transformers' own report.

    Raises:
        CheckpointError: Naming the first tensor that is missing, superfluous or misshapen.
    """
    found: dict[int, dict[tuple[int, str], StoredTensor]] = defaultdict(dict)
    for name, tensor in stored.items():
        if match := _EXPERT.search(name):
            found[int(match[1])][int(match[2]), match[3]] = tensor
    expected = _expected_shapes(model)
    has_layers = any(f"layers.{layer}." in name for layer in expected for name in stored)
    if not found and (not has_layers or any(".experts." in name for name in stored)):
        return
    for layer, tensors in sorted(found.items()):
        if layer in expected:
            continue
        if layer >= model.config.num_hidden_layers:
            continue  # MTP layers that this model class or config leaves out
        example = next(iter(tensors.values()))
        raise CheckpointError(
            f"{example.path}: {example.name!r} is an expert of layer {layer}, which has none by config."
        )
    for layer, shapes in sorted(expected.items()):
        _check_layer(layer, shapes, found.get(layer, {}), stored, check_shapes)


def _expected_shapes(model: Any) -> dict[int, dict[tuple[int, str], tuple[int, int]]]:
    """(expert, projection) -> shape for each layer of `model` with experts."""
    backbone = model.get_decoder()
    shapes = {}
    for index, layer in enumerate(backbone.layers):
        experts = getattr(layer.mlp, "experts", None)
        if experts is None:
            continue
        inner, hidden = experts.down_proj.shape[2], experts.down_proj.shape[1]
        of_projection = {
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }
        shapes[index] = {
            (expert, projection): of_projection[projection]
            for expert in range(experts.down_proj.shape[0])  # num_experts is a rank's own under expert parallelism
            for projection in _PROJECTIONS
        }
    return shapes


def _check_layer(
    layer: int,
    shapes: dict[tuple[int, str], tuple[int, int]],
    found: dict[tuple[int, str], StoredTensor],
    stored: dict[str, StoredTensor],
    check_shapes: bool,
) -> None:
    num_experts = len(shapes) // len(_PROJECTIONS)
    prefix = f"layers.{layer}.mlp.experts"
    if not found and any(f"{prefix}.gate_up_proj" in name for name in stored):
        return
    for (expert, projection), tensor in found.items():
        if (expert, projection) not in shapes:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name!r} is superfluous; the config has experts 0 to {num_experts - 1}."
            )
    for (expert, projection), shape in shapes.items():
        stored_tensor = found.get((expert, projection))
        if stored_tensor is None:
            raise CheckpointError(
                f"The checkpoint lacks '{prefix}.{expert}.{projection}.weight'; the config has {num_experts} experts."
            )
        is_bare_fp8 = stored_tensor.dtype in FP8_DTYPES and stored_tensor.name + SCALE_SUFFIX not in stored
        if stored_tensor.dtype is None or not stored_tensor.dtype.is_floating_point or is_bare_fp8:
            kind = "FP8 without a scale" if is_bare_fp8 else stored_tensor.dtype or "of a type hub_moe does not read"
            raise CheckpointError(
                f"{stored_tensor.path}: {stored_tensor.name!r} is {kind}; plain floats, or FP8 with a "
                f"{SCALE_SUFFIX[1:]!r} beside it, were expected."
            )
        if check_shapes and stored_tensor.shape != shape:
            raise CheckpointError(
                f"{stored_tensor.path}: {stored_tensor.name!r} has shape {stored_tensor.shape}, and by config it "
                f"should be {shape}."
            )


def _settle_mtp_layers(model: Any, stored: dict[str, StoredTensor]) -> None:
    """Match the model's MTP layers with the checkpoint's: drop promised ones it lacks, ignore ones not asked for."""
    first = model.config.num_hidden_layers
    names = (name for name in stored if "eh_proj" in name)
    in_file = {int(match[1]) for name in names if (match := re.search(r"(?:^|\.)layers\.(\d+)\.eh_proj\.", name))}
    layers = model.get_decoder().layers
    if len(layers) > first and not any(index >= first for index in in_file):
        logger.warning(
            f"The config promises {len(layers) - first} MTP layers and the checkpoint holds none, as transformers' own "
            "classes save it; continuing without them (num_mtp_layers=0)."
        )
        del layers[first:]
        model.config.num_mtp_layers = 0
    elif len(layers) > first and (lacking := set(range(first, len(layers))) - in_file):
        raise CheckpointError(
            f"The checkpoint lacks MTP layer {min(lacking)}; the config has num_mtp_layers={len(layers) - first}."
        )
    unread = sorted(index for index in in_file if index >= len(layers))
    if unread:
        patterns = {rf"layers\.{index}\." for index in unread}
        model._keys_to_ignore_on_load_unexpected = model._keys_to_ignore_on_load_unexpected | patterns


def _refuse_pickle(name_or_path: Any, subfolder: str) -> None:
    if name_or_path is None:
        return
    folder = Path(str(name_or_path)) / (subfolder or "")
    if not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return
    for pickle in _PICKLES:
        if (folder / pickle).exists():
            raise CheckpointError(
                f"{folder / pickle} is a pickle, which can run code when it is read; pass use_safetensors=False to "
                "load it all the same."
            )


@contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """A temporary folder inside `target`, so on the same disk and under the same rights; removed in the end.

    What earlier calls that were killed left behind goes too.
    """
    for leftover in target.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=target, prefix=_UNFINISHED) as folder:
        yield Path(folder)


def move_checkpoint(source: Path, target: Path, *, variant: str | None = None) -> None:
    """Move a finished checkpoint to its name, the files that make it loadable last.

    `target` may hold an older checkpoint: it stops being loadable before its first file is replaced. Other files, and
    checkpoints of another `variant`, stay.
    """
    suffix = f".{variant}" if variant else ""
    loadable = ("config.json", f"model.safetensors.index{suffix}.json")
    for name in loadable:
        (target / name).unlink(missing_ok=True)
    new_names = {path.name for path in source.iterdir()}
    weights = re.compile(rf"model(-\d{{5}}-of-\d{{5}})?{re.escape(suffix)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    for old in target.iterdir():
        if weights.fullmatch(old.name) and old.name not in new_names:
            old.unlink()
    for path in sorted(source.iterdir(), key=lambda path: (path.name == "config.json", path.name in loadable)):
        os.replace(path, target / path.name)
