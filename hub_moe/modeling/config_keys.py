"""Which keys a config.json may hold. transformers keeps any key it is given, so a misspelt setting would do nothing."""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging

from ..errors import ConfigError

logger = logging.get_logger(__name__)

# Keys that transformers and its tools read, write or derive although no dataclass declares them.
_KEYS_OF_TRANSFORMERS = {
    "attn_implementation", "auto_map", "compression_config", "distributed_config", "experts_implementation",
    "fusion_config", "head_dim", "model_type", "name_or_path", "num_labels", "output_attentions", "per_layer_config",
    "qk_head_dim", "quantization_config", "rope_scaling", "rope_theta", "tie_last_hidden_states", "torch_dtype",
    "transformers_weights", "use_mtp",
}  # fmt: skip

# Keys that transformers 4 wrote into every config.json.
_LEGACY_KEYS = {
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size",
    "decoder_start_token_id", "finetuning_task", "is_decoder", "prefix", "pruned_heads", "sep_token_id",
    "suppress_tokens", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class",
    "torchscript", "use_bfloat16",
}  # fmt: skip


def refuse_unknown_keys(keys: Iterable[str], config_class: type[Any]) -> None:
    """Accept only fields of `config_class` and keys of transformers.

    Raises:
        ConfigError: Naming the first other key and the field that resembles it most.
    """
    for key in find_foreign_keys(keys, config_class):
        raise ConfigError(_message(key, config_class))


def find_foreign_keys(keys: Iterable[str], config_class: type[Any]) -> list[str]:
    """Those that are neither fields of `config_class` nor keys of transformers, sorted."""
    return sorted(key for key in keys if not _is_known(key, config_class))


def drop_foreign_keys(config_dict: dict[str, Any], config_class: type[Any]) -> dict[str, Any]:
    """`config_dict` without keys that neither `config_class` nor transformers knows; a warning lists them.

    For published files, which carry keys of other tools.

    Raises:
        ConfigError: If such a key is nearly the name of a field, so that it must be a misspelling.
    """
    foreign = [key for key in find_foreign_keys(config_dict, config_class) if key not in _LEGACY_KEYS]
    for key in foreign:
        if _nearest_field(key, config_class, cutoff=0.85):
            raise ConfigError(_message(key, config_class))
    if foreign:
        logger.warning(f"Ignored keys of config.json that {config_class.__name__} does not know: {', '.join(foreign)}.")
    return {key: value for key, value in config_dict.items() if _is_known(key, config_class)}


def _known_fields(config_class: type[Any]) -> set[str]:
    names = {field.name for field in fields(config_class)}
    return names | set(config_class.attribute_map) | set(config_class.attribute_map.values())


def _is_known(key: str, config_class: type[Any]) -> bool:
    return (
        key.startswith("_")
        or key in _known_fields(config_class)
        or key in _KEYS_OF_TRANSFORMERS
        or key in GenerationConfig._get_default_generation_params()
    )


def _nearest_field(key: str, config_class: type[Any], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(key, sorted(_known_fields(config_class)), n=1, cutoff=cutoff)), None)


def _message(key: str, config_class: type[Any]) -> str:
    nearest = _nearest_field(key, config_class, cutoff=0.6)
    hint = f"; did you mean {nearest!r}?" if nearest else f"; see help({config_class.__name__}) for its fields."
    return f"Unknown key {key!r} in the config{hint}"
