"""The model and the tokenizer of a run, and whether they belong together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .. import modeling
from ..environment import find_commit
from ..errors import ConfigError, DatasetError
from ..patches.folders import is_repo_id
from ..patches.metadata import METADATA_FILE, MODEL_TYPE
from .run_config import ModelConfig

_ADAPTER_FILE = "adapter_config.json"
_NO_BASE = "[model] name {name} is {kind} and not a model; merge it into its base first, or name the base."


@dataclass(frozen=True)
class Architecture:
    """The config of a run's model, and the commit that its name and revision stood for (None of a folder)."""

    config: Any
    revision: str | None


def read_architecture(model: ModelConfig) -> Architecture:
    """The transformers config that [model] names, `overrides` applied. No code from a repo is run.

    Raises:
        ConfigError: If there is no such preset or folder, or a name is that of a patch or adapter.
    """
    if model.preset is not None:
        return Architecture(modeling.HubMoeConfig.from_preset(model.preset, **model.overrides), revision=None)
    assert model.name is not None
    folder = Path(model.name).expanduser()
    for file in (METADATA_FILE, _ADAPTER_FILE):
        if (folder / file).is_file():
            kind = "an expert patch" if file == METADATA_FILE else "an adapter"
            raise ConfigError(_NO_BASE.format(name=model.name, kind=kind))
    if folder.exists() and not (folder / "config.json").is_file():
        raise ConfigError(f"[model] name {model.name} is a folder without config.json, so it holds no model.")
    if folder.exists() and model.revision is not None:
        raise ConfigError(f"[model] revision is {model.revision!r}, and {model.name} is a folder, which has none.")
    if not folder.exists() and not is_repo_id(model.name):
        raise ConfigError(f"[model] name {model.name!r} is neither a folder nor a repo id (OWNER/NAME).")
    config = AutoConfig.from_pretrained(model.name, revision=model.revision, trust_remote_code=False)
    if config.model_type == MODEL_TYPE:
        raise ConfigError(_NO_BASE.format(name=model.name, kind="an expert patch"))
    if unknown := [key for key in model.overrides if not hasattr(config, key)]:
        raise ConfigError(f"[model] overrides has the key {unknown[0]!r}, which {type(config).__name__} does not know.")
    for key, value in model.overrides.items():
        setattr(config, key, value)
    return Architecture(config, revision=find_commit(model.name, model.revision))


def load_base(model: ModelConfig, *, revision: str | None) -> PreTrainedModel:
    """The base with the weights as they are stored, in their dtype, on the CPU, in eval mode."""
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model.name, revision=revision or model.revision, dtype="auto", trust_remote_code=False
    )
    return base


def build_model(config: Any, *, seed: int) -> PreTrainedModel:
    """A model with random float32 weights; equal seeds give equal weights."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def sketch_model(config: Any) -> PreTrainedModel:
    """The same modules and shapes without weights, on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    return model


def fit_vocabulary(config: Any, tokenizer: Any) -> None:
    """Give an architecture the embedding and the marks of a tokenizer that was learned for it."""
    config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))


class StoredDtypes:
    """Lets all of a model train in float32, and takes it back to the dtypes that its weights are stored in.

    Buffers keep their dtype. What was not changed comes back bit for bit.
    """

    def __init__(self, model: nn.Module) -> None:
        self._stored = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def widen(self, model: nn.Module) -> None:
        """Cast parameters of fewer bits to float32."""

        def wider(tensor: Tensor) -> Tensor:
            is_narrow = tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize
            return tensor.float() if is_narrow and isinstance(tensor, nn.Parameter) else tensor

        model._apply(wider)  # where FSDP2 shards the model, it has to know of it

    def restore(self, model: nn.Module) -> None:
        """Cast parameters back."""
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(self._stored[name])


def load_tokenizer(model: ModelConfig, *, revision: str | None) -> Any:
    """The tokenizer that [model] names: its own, or that of the model's repo.

    Raises:
        ConfigError: If there is none, or the model's repo holds another one than the named.
    """
    own = _find_tokenizer(model.name, revision or model.revision) if model.name is not None else None
    if model.tokenizer is None:
        if own is None:
            raise ConfigError(f"{model.name} has no tokenizer; name one with [model] tokenizer.")
        return own
    named = _find_tokenizer(model.tokenizer, None)
    if named is None:
        raise ConfigError(f"[model] tokenizer {model.tokenizer} holds no tokenizer.")
    if own is not None and own.get_vocab() != named.get_vocab():
        raise ConfigError(
            f"[model] tokenizer {model.tokenizer} is not the model's: {model.name} has a tokenizer of its own with "
            "other tokens; leave the key out."
        )
    return named


def check_marks(tokenizer: Any, config: Any) -> None:
    """Whether tokenizer and model agree on the tokens that begin and end a text.

    Raises:
        DatasetError: If not.
    """
    text_config = config.get_text_config(decoder=True)
    for name in ("bos_token_id", "eos_token_id"):
        ours, theirs = getattr(tokenizer, name, None), getattr(text_config, name, None)
        accepted = theirs if isinstance(theirs, list | tuple) else [theirs]
        if ours is not None and theirs is not None and ours not in accepted:
            raise DatasetError(f"The tokenizer is not the model's: its {name} is {ours}, that of the config {theirs}.")


def _find_tokenizer(name: str | None, revision: str | None) -> Any:
    """The tokenizer of a Hub id or folder, or None where it has none."""
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        folder = Path(str(name)).expanduser()
        if folder.is_dir() and not any(folder.glob("tokenizer*")):
            return None
        raise ConfigError(f"{name} holds no tokenizer that can be read: {str(error).splitlines()[0]}") from error
