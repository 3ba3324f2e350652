"""Makes expert patches loadable by their name through transformers' Auto classes. Imported by `hub_moe.modeling`."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .metadata import MODEL_TYPE

# what Auto classes add for a model that lies in the repo itself, and that says nothing of the base
_OF_THE_PATCH_ONLY = (
    "config",
    "adapter_kwargs",
    "name_or_path",
    "_from_auto",
    "_from_pipeline",
    "_commit_hash",
    "proxies",
)


@strict
class ExpertPatchConfig(PreTrainedConfig):
    """`config.json` of an expert patch: which base it is for. What counts stands in `expert_patch.json`."""

    model_type = MODEL_TYPE

    base_model: str | None = None
    base_model_commit: str | None = None
    base_model_type: str | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config; unlike elsewhere no argument is taken into it, since all are meant for the base."""
        wants_rest = kwargs.pop("return_unused_kwargs", False)
        config = cls(**{name: value for name, value in config_dict.items() if name != "model_type"})
        rest = {name: value for name, value in kwargs.items() if name not in _OF_THE_PATCH_ONLY}
        return (config, rest) if wants_rest else config


class ExpertPatchForCausalLM:
    """What `AutoModelForCausalLM.from_pretrained("alice/law-experts")` calls; makes models of the base's class."""

    config_class = ExpertPatchConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """See `load_patched_model`; `base=` says where the base is, all other arguments are its `from_pretrained`'s."""
        from .applying import load_patched_model

        for name in _OF_THE_PATCH_ONLY:
            kwargs.pop(name, None)
        return load_patched_model(pretrained_model_name_or_path, **kwargs)


if MODEL_TYPE not in CONFIG_MAPPING:
    AutoConfig.register(MODEL_TYPE, ExpertPatchConfig)
AutoModelForCausalLM.register(ExpertPatchConfig, ExpertPatchForCausalLM, exist_ok=True)
