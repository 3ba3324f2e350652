"""Makes our classes known to transformers' Auto classes. The only place with that side effect."""

from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .conversion import register_conversion


def register_model_classes(config_class: type[Any], classes: dict[str, type[Any]]) -> None:
    """Register a config, its models (Auto class name -> class) and its checkpoint layout.

    Where hub_moe is installed its classes win over the copy of this code that comes with a checkpoint, whichever was
    imported first.
    """
    model_type = config_class.model_type
    is_known = model_type in CONFIG_MAPPING
    if not is_known or _is_copy(CONFIG_MAPPING[model_type]) and not _is_copy(config_class):
        transformers.AutoConfig.register(model_type, config_class, exist_ok=is_known)
    for auto_name, model_class in classes.items():
        getattr(transformers, auto_name).register(config_class, model_class)
    register_conversion(config_class.model_type)


def _is_copy(cls: type[Any]) -> bool:
    """Whether transformers imported this class from the files of a checkpoint."""
    return cls.__module__.startswith("transformers_modules.")
