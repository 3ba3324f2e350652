"""`hub_moe.load`: any Mixture-of-Experts model of transformers, its experts read once into their place, or when used.

The other way to the same is `from_pretrained` of hub_moe's own classes; this is for those of transformers too.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .anatomy.profile import ExpertProfile
from .errors import CheckpointError, ConfigError, UnsupportedModelError
from .modeling.checkpoint import DirectLoadingMixin

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def load(
    name: str | Path,
    *,
    expert_budget: int | str | None = None,
    expert_profile: ExpertProfile | str | Path | None = None,
    expert_dtype: str | None = None,
    **kwargs: Any,
) -> Any:
    """What `AutoModelForCausalLM.from_pretrained(name, **kwargs)` gives, bit for bit, in less time and memory.

    Experts that a checkpoint stores one by one are read straight into the layer's stacks. What is quantised or shared
    out over processes loads as ever. Code that comes with a checkpoint is not run.

    Args:
        name: A folder or a repo.
        expert_budget: Memory for routed experts, such as "6GiB"; if they take more they stay in the checkpoint's files:
            see `HubMoeForCausalLM.from_pretrained`.
        expert_profile: Which experts always stay in that memory.
        expert_dtype: "int8" or "int4": what routed experts are kept in instead; see there too.

    Raises:
        CheckpointError: If there is no such folder, the checkpoint is truncated, or, with a budget, it keeps experts in
            a form that cannot stay.
        ConfigError: If the budget is no size or too small for one token, the profile is not of this model, or the
            arguments do not go together.
        MissingExtraError: For an expert_dtype without torchao.
        UnsupportedModelError: If transformers and hub_moe have no class for the model, or, with a budget, it has no
            experts that hub_moe finds.
    """
    _require_name(name)
    model_class = _find_class(str(name), kwargs)
    if not issubclass(model_class, PreTrainedModel):  # an expert patch, whose class gives all arguments to its base's
        if expert_budget is not None or expert_dtype is not None:
            option = "expert_dtype" if expert_budget is None else "expert_budget"
            raise ConfigError(
                f"{name} is an expert patch, and {option} needs all experts in one checkpoint; write one with "
                "`hub-moe patch apply`."
            )
        return model_class.from_pretrained(name, **kwargs)
    reader: Any = model_class
    if not issubclass(model_class, DirectLoadingMixin):
        bases = (DirectLoadingMixin, model_class)
        reader = type(model_class.__name__, bases, {"__module__": model_class.__module__})
    placing = {"expert_budget": expert_budget, "expert_profile": expert_profile, "expert_dtype": expert_dtype}
    loaded = reader.from_pretrained(name, **placing, **kwargs)
    (loaded[0] if isinstance(loaded, tuple) else loaded).__class__ = model_class
    return loaded


def _require_name(name: Any) -> None:
    if not isinstance(name, str | Path) or not str(name):
        raise ConfigError(f"The model is {name!r}; a folder or a repo, OWNER/NAME, was expected.")
    is_path = isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise CheckpointError(f"There is no folder {name}.")


def _find_class(name: str, kwargs: dict[str, Any]) -> Any:
    """The class that AutoModelForCausalLM would choose."""
    import hub_moe.modeling  # noqa: F401  (registers our classes)

    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        options = {option: kwargs[option] for option in _HUB_OPTIONS if option in kwargs}
        config = AutoConfig.from_pretrained(name if config is None else config, **options)
    classes = AutoModelForCausalLM._model_mapping
    if type(config) not in classes:
        raise UnsupportedModelError(f"Model type {config.model_type!r} has no causal language model in transformers.")
    found = classes[type(config)]
    candidates = found if isinstance(found, list | tuple) else [found]
    named = [candidate for candidate in candidates if candidate.__name__ in (config.architectures or [])]
    model_class = (named or candidates)[0]
    text_config = config.get_text_config()
    if text_config is not config and model_class.config_class is type(text_config):
        kwargs["config"] = text_config  # the language model inside of one that also sees or hears
    return model_class
