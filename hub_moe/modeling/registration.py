"""Makes our classes known to transformers' Auto classes. The only place with that side effect."""

from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .conversion import register_conversion


def register_model_classes(config_class: type[Any], classes: dict[str, type[Any]]) -> None:
    """Register a config, its models (Auto class name -> class) and its checkpoint layout.

    A model type that is already registered keeps its config: where hub_moe is installed, the copy of this code that
    comes with a checkpoint does not replace it.
    """
    if config_class.model_type not in CONFIG_MAPPING:
        transformers.AutoConfig.register(config_class.model_type, config_class)
    for auto_name, model_class in classes.items():
        getattr(transformers, auto_name).register(config_class, model_class)
    register_conversion(config_class.model_type)
