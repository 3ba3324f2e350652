"""What a run leaves behind: the proof of what was trained, the result, pictures and the report."""

import resource
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from ..anatomy import ChangeTable, find_moe_layers, named_tensors
from ..errors import DivergenceError
from ..patches import Base, Selection, make_patch
from ..patches.metadata import TOKENIZER_FILES
from .non_finite import find_non_finite
from .run_config import ModelConfig, RunConfig
from .run_folder import TrainingFolder, write_atomically


def check_finite(model: nn.Module) -> None:
    """Whether what was trained, adapters among it, ended as numbers.

    Raises:
        DivergenceError: Naming the first tensor that holds NaN or infinity.
    """
    broken = find_non_finite((name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad)
    if broken is not None:
        raise DivergenceError(
            f"The trained tensor {broken} is not finite; nothing was written; lower the learning rate."
        )


def save_patch(
    base: PreTrainedModel,
    folder: TrainingFolder,
    config: RunConfig,
    *,
    hashes: Mapping[str, Mapping[str, str]],
    figures: Mapping[str, Any],
    tokenizer: Any,
) -> None:
    """Write the expert patch of what was trained, by names that `hashes` (of the base before) has."""
    tensors = {name: view for name, *_, view in named_tensors(base, find_moe_layers(base)) if name in hashes}
    method: Any = config.method
    is_selected = method.choice is None
    patch = make_patch(
        tensors,
        model_before=hashes,
        base=Base(str(config.model.name), config.model.revision, base.config.model_type),
        selection=Selection("esft", score=method.score, top_p=method.top_p, share=method.share)
        if is_selected
        else None,
        training={"method": "experts", **figures},
    )

    def save(path: Path) -> None:
        patch.save(path, tokenizer=tokenizer)
        keep_files_of_base(path, config.model)

    write_atomically(folder.result("experts"), save)


def save_adapter(model: Any, folder: TrainingFolder, config: RunConfig) -> None:
    """Write a peft adapter that names its base and the base's revision."""
    for peft_config in model.peft_config.values():
        peft_config.base_model_name_or_path = config.model.name
        peft_config.revision = config.model.revision
    write_atomically(folder.result("lora"), lambda path: model.save_pretrained(path, save_embedding_layers=False))


def save_model(base: PreTrainedModel, folder: TrainingFolder, *, tokenizer: Any) -> None:
    """Write a model that `from_pretrained` loads, with its tokenizer."""

    def save(path: Path) -> None:
        base.save_pretrained(path)
        tokenizer.save_pretrained(path)

    write_atomically(folder.result("full"), save)


def count_adapter(model: Any) -> dict[str, Any]:
    """What of an adapter was trained: numbers, and which tensors never moved away from 0 (peft begins B there)."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    idle = [name for name, parameter in trained.items() if ".lora_B." in name and not bool(parameter.any())]
    return {"tensors": len(trained), "numbers": sum(p.numel() for p in trained.values()), "still_zero": idle}


def count_trained(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def peak_memory_bytes() -> int:
    """Most memory this process has used: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_changes(table: ChangeTable, adapter: dict[str, Any] | None) -> dict[str, Any]:
    """For `what_changed.json`."""
    return {**table.to_dict(), **({"adapter": adapter} if adapter is not None else {})}


def keep_files_of_base(folder: Path, model: ModelConfig) -> None:
    """Put the base's files in the place of those of the run's tokenizer in `folder`, unless that was changed.

    transformers writes the same tokenizer into other bytes than it read, and whoever reviews a patch compares bytes.
    The base's tokenizer was loaded by its name, so that its files are on this machine.
    """
    if model.name is None or model.tokenizer not in (None, model.name) or not _is_unchanged(folder, model):
        return
    for file in TOKENIZER_FILES:
        original = _find(model.name, file, model.revision)
        (folder / file).unlink(missing_ok=True)
        if original is not None:
            (folder / file).write_bytes(original.read_bytes())


def _is_unchanged(folder: Path, model: ModelConfig) -> bool:
    """Whether the base's tokenizer, loaded again, is written into the very files that lie in `folder`."""
    with tempfile.TemporaryDirectory() as fresh:
        AutoTokenizer.from_pretrained(model.name, revision=model.revision).save_pretrained(fresh)
        return all(_read(Path(fresh) / file) == _read(folder / file) for file in TOKENIZER_FILES)


def _find(name: str, file: str, revision: str | None) -> Path | None:
    base = Path(name).expanduser()
    if base.is_dir():
        return base / file if (base / file).is_file() else None
    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
