"""Models of which every process holds a part: FSDP2, and experts on different processes, both as transformers does it.

transformers shards a model while it loads one. (accelerate's own FSDP is left alone: without a GPU it is ignored.)
"""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
import transformers.distributed
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import ConfigError, MissingExtraError
from .processes import count, in_first, is_first, wait_for_all
from .run_config import ModelConfig, TrainingConfig
from .run_model import sketch_model

_IS_SHARDED = "is_distributed_loading_by_transformers"  # transformers' own mark


def is_sharded(model: Any) -> bool:
    """Whether this process holds only a part of the model."""
    return bool(getattr(model, _IS_SHARDED, False))


def check_sharding(training: TrainingConfig) -> None:
    """Whether the processes that run are those that [training] asks for.

    Raises:
        ConfigError: If they cannot be grouped by `fsdp_size`.
        MissingExtraError: If transformers is too old to shard a model.
    """
    size = training.fsdp_size
    if size > 1 and not hasattr(transformers.distributed, "save_optimizer_distributed"):
        raise MissingExtraError(
            f"[training] fsdp_size needs transformers 5.23 or newer, and {transformers.__version__} is installed: "
            "pip install -U transformers."
        )
    if count() % size:
        raise ConfigError(
            f"[training] fsdp_size is {size}, and the number of processes is {count()}, which is no multiple of it; "
            f"start the run by torchrun --nproc-per-node {size} -m hub_moe train."
        )


def load_sharded(name: str, training: TrainingConfig, *, dtype: Any = "auto", **where: Any) -> PreTrainedModel:
    """The part of a saved model that this process holds, in eval mode; all processes have to call it.

    Raises:
        ConfigError: If transformers cannot shard this family as `training` asks.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, distributed_config=_distributed_config(training), **where
        )
    except ValueError as error:
        raise ConfigError(
            f"[training] fsdp_size = {training.fsdp_size} and ep_size = {training.ep_size} do not fit {name}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return model


def load_base_sharded(model: ModelConfig, training: TrainingConfig, *, revision: str | None) -> PreTrainedModel:
    """As `load_base`, and of each process a part."""
    return load_sharded(str(model.name), training, revision=revision or model.revision)


def build_sharded(build: Callable[[], PreTrainedModel], training: TrainingConfig, *, scratch: Path) -> PreTrainedModel:
    """The parts of the model that `build` makes in the first process, which are handed over in the folder `scratch`."""
    in_first(lambda: build().save_pretrained(scratch))
    model = load_sharded(str(scratch), training)
    model.config._name_or_path = ""
    wait_for_all()  # others may still be reading
    in_first(lambda: shutil.rmtree(scratch))
    return model


def gather_whole(model: PreTrainedModel) -> PreTrainedModel | None:
    """The whole model on the CPU of the first process, None in the others; all have to call it.

    Tensors are gathered one at a time, so that a GPU holds its part and one whole tensor.
    """
    from transformers.distributed import gather_full_state_dict

    state = gather_full_state_dict(model)
    if not is_first():
        return None
    whole = sketch_whole(model)
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    _copy_unsaved_buffers(model, whole)
    return whole


def _copy_unsaved_buffers(model: PreTrainedModel, whole: PreTrainedModel) -> None:
    """What no state dict holds, such as the frequencies of positions; every process has all of it."""
    for name, module in whole.named_modules():
        for buffer, value in module.named_buffers(recurse=False):
            if value.is_meta:
                setattr(module, buffer, model.get_buffer(f"{name}.{buffer}".lstrip(".")).detach().cpu().clone())


def load_like(model: PreTrainedModel, folder: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A saved model, shared out and in the type of numbers as `model` is, and what transformers says of loading it."""
    kwargs = {"distributed_config": model.config.distributed_config} if is_sharded(model) else {}
    cls = AutoModelForCausalLM if is_sharded(model) else type(model)  # FSDP2 makes a class of its own
    loaded, info = cls.from_pretrained(
        folder, dtype=model.dtype, local_files_only=True, output_loading_info=True, **kwargs
    )
    return loaded, info


def save_optimizer(model: PreTrainedModel, optimizer: Any, folder: Path) -> None:
    """Write the state of the optimizer that accelerate wrapped, each process its part."""
    from transformers.distributed import save_optimizer_distributed

    save_optimizer_distributed(model, optimizer.optimizer, str(folder))


def load_optimizer(model: PreTrainedModel, optimizer: Any, folder: Path) -> None:
    """Read what `save_optimizer` wrote."""
    from transformers.distributed import load_optimizer_distributed

    load_optimizer_distributed(model, optimizer.optimizer, str(folder))


def sketch_whole(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules and shapes as those of the whole model, without weights."""
    config = copy.deepcopy(model.config)
    config.distributed_config = None
    return sketch_model(config)


def _distributed_config(training: TrainingConfig) -> Any:
    from transformers.distributed import DistributedConfig

    return DistributedConfig(
        fsdp_size=training.fsdp_size, ep_size=training.ep_size, dp_replicate_size=count() // training.fsdp_size
    )
