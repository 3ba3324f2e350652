"""HubMoeConfig: one configuration for the DeepSeek line of Mixture-of-Experts models.

Letters used below: E routed experts, K experts per token, G groups.
"""

import copy
import math
import os
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV2Config, DeepseekV3Config, PreTrainedConfig
from transformers.utils import logging

from ..errors import ConfigError, UnsupportedModelError
from .config_keys import drop_foreign_keys, find_foreign_keys, refuse_unknown_keys
from .presets import PRESETS

logger = logging.get_logger(__name__)

# Which choice each score function allows; DeepSeek's own code knows no other pair.
_CHOICES_OF_SCORING = {
    "softmax": ("greedy", "group_limited_greedy"),
    "sigmoid": ("noaux_tc",),
}

# Fields that must be at least 1 where they are set.
_SIZES = (
    "hidden_size", "intermediate_size", "kv_lora_rank", "moe_intermediate_size", "num_attention_heads",
    "num_hidden_layers", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "vocab_size",
)  # fmt: skip

# Keys of published DeepSeek config.json files that describe their training cluster or the code beside them.
_KEYS_WITHOUT_MEANING_HERE = {"auto_map", "ep_size"}

# transformers types whose checkpoints HubMoe loads, and the stock config that supplies their defaults.
_STOCK_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "deepseek_v2": DeepseekV2Config,
    "deepseek_v3": DeepseekV3Config,
    "kimi_k2": DeepseekV3Config,
}

# every model type whose checkpoints HubMoe loads
LOADABLE_TYPES = ("hub_moe", *_STOCK_CONFIGS)


@strict
class HubMoeConfig(DeepseekV3Config):
    """Configuration of a HubMoe model: multi-head latent attention, shared and fine-grained routed experts.

    Only the fields that differ from `DeepseekV3Config` are listed. `HubMoeConfig.from_pretrained` also reads native
    `deepseek_v2`, `deepseek_v3` and `kimi_k2` checkpoints.

    Args:
        scoring_func: How router logits become scores: `"softmax"` (V2) or `"sigmoid"` (V3).
        topk_method: How K of E experts are chosen. With softmax: `"greedy"`, or `"group_limited_greedy"` (only inside
            the `topk_group` groups with the best expert, arXiv:2405.04434 section 2.2.2). With sigmoid: `"noaux_tc"`
            (balancing bias, groups ranked by the sum of their two best experts, arXiv:2412.19437 section 2.1.2).
        norm_topk_prob: Divide the K weights by their sum. With softmax this replaces `routed_scaling_factor`, as in
            DeepSeek's own V2 code (transformers' `deepseek_v2` ignores the field); with sigmoid both apply.
        n_shared_experts: Experts every token passes through; 0 for none.
        moe_layer_freq: From `first_k_dense_replace` on, layers whose index this number divides hold experts.
        mlp_bias: Whether dense layers and shared experts have biases (a `deepseek_v2` option).
        rope_in_float32: Rotate queries and keys in float32, as transformers' `deepseek_v2` does; `deepseek_v3`
            rotates in the model's dtype.
        num_mtp_layers: Multi-token-prediction (MTP) layers, kept at `model.layers.N` and following, where N is
            `num_hidden_layers`. config.json spells it `num_nextn_predict_layers`, as DeepSeek does.
        aux_loss_alpha: Weight of the expert-level balance loss in training (arXiv:2405.04434 eq. 23 to 25;
            arXiv:2412.19437 eq. 17 to 20). 0 turns it off.
        seq_aux: Balance within each sequence (V3, V2's code) rather than over the whole batch.
        device_aux_loss_alpha: Weight of the device-level balance loss over the `n_group` groups
            (arXiv:2405.04434 eq. 26 to 28).
        router_z_loss_coef: Weight of the router z-loss (arXiv:2202.08906 eq. 5).
        mtp_loss_coef: Weight of the MTP loss (lambda in arXiv:2412.19437 eq. 25).

    Raises:
        ConfigError: For an unknown key.
        StrictDataclassError: From huggingface_hub, for a wrong type, or around the ConfigError that names fields which
            contradict each other.
    """

    model_type = "hub_moe"
    attribute_map = {
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }

    n_shared_experts: int | None = 1
    scoring_func: Literal["softmax", "sigmoid"] = "sigmoid"
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "noaux_tc"
    moe_layer_freq: int = 1
    mlp_bias: bool = False
    rope_in_float32: bool = False
    num_mtp_layers: int = 0
    aux_loss_alpha: float | int = 0.0
    seq_aux: bool = True
    device_aux_loss_alpha: float | int = 0.0
    router_z_loss_coef: float | int = 0.0
    mtp_loss_coef: float | int = 0.3

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "HubMoeConfig":
        """The configuration of a named size (`nano`, `tiny`, `small`) or published model, with `changes` applied.

        Raises:
            ConfigError: If the name is unknown; the message lists the names.
        """
        if name not in PRESETS:
            raise ConfigError(f"No preset {name!r}; the presets are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields in a repo's config.json, translated where it is a native DeepSeek one."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return translate_native_config(config_dict), kwargs

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_keys(kwargs, HubMoeConfig)
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write config.json. Attributes that are no fields are left out, aloud, since loading would refuse them."""
        foreign = find_foreign_keys(self.to_dict(), HubMoeConfig)
        if foreign:
            logger.warning(f"Not saved, as HubMoeConfig has no such fields: {', '.join(foreign)}.")
        saved = copy.deepcopy(self)
        for key in foreign:
            delattr(saved, key)
        PreTrainedConfig.save_pretrained(saved, save_directory, *args, **kwargs)

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` (from 0) holds routed experts; MTP layers always do."""
        if layer_idx >= self.num_hidden_layers:
            return True
        return layer_idx >= self.first_k_dense_replace and layer_idx % self.moe_layer_freq == 0

    def validate_routing(self) -> None:
        """`scoring_func`, `topk_method`, K and the groups fit each other."""
        allowed = _CHOICES_OF_SCORING[self.scoring_func]
        if self.topk_method not in allowed:
            raise ConfigError(
                f"topk_method={self.topk_method!r} does not go with scoring_func={self.scoring_func!r}, which allows "
                f"{' or '.join(repr(choice) for choice in allowed)}."
            )
        if not 1 <= (self.num_experts_per_tok or 0) <= self.n_routed_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and "
                f"n_routed_experts={self.n_routed_experts}."
            )
        if self.topk_method != "greedy" or self.device_aux_loss_alpha:
            self._validate_groups()

    def _validate_groups(self) -> None:
        if not self.n_group or self.n_routed_experts % self.n_group:
            raise ConfigError(
                f"n_group={self.n_group} must divide n_routed_experts={self.n_routed_experts} into equal groups."
            )
        if self.topk_method == "greedy":
            return
        group_size = self.n_routed_experts // self.n_group
        if not 1 <= (self.topk_group or 0) <= self.n_group:
            raise ConfigError(f"topk_group={self.topk_group} must lie between 1 and n_group={self.n_group}.")
        if self.topk_method == "noaux_tc" and group_size < 2:
            raise ConfigError(
                f"n_group={self.n_group} leaves {group_size} of n_routed_experts={self.n_routed_experts} in a group; "
                "topk_method='noaux_tc' ranks groups by their two best experts and needs at least 2."
            )
        if self.num_experts_per_tok > self.topk_group * group_size:
            logger.warning_once(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {self.topk_group * group_size} experts in "
                f"topk_group={self.topk_group} groups; the rest is filled from groups that were not chosen."
            )

    def validate_shape(self) -> None:
        """Layer and head counts make a model."""
        if self.num_key_value_heads != self.num_attention_heads:
            raise ConfigError(
                f"num_key_value_heads={self.num_key_value_heads} must equal "
                f"num_attention_heads={self.num_attention_heads}: latent attention has one key per head."
            )
        if not math.isfinite(self.routed_scaling_factor):
            raise ConfigError(f"routed_scaling_factor={self.routed_scaling_factor} must be finite.")
        floors = {name: 1 for name in _SIZES if getattr(self, name) is not None}
        floors |= {"first_k_dense_replace": 0, "moe_layer_freq": 1, "n_shared_experts": 0, "num_mtp_layers": 0}
        for name, floor in floors.items():
            if (getattr(self, name) or 0) < floor:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {floor}.")

    def validate_losses(self) -> None:
        """No loss has a negative weight."""
        for name in (
            "aux_loss_alpha",
            "device_aux_loss_alpha",
            "router_z_loss_coef",
            "mtp_loss_coef",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be a number from 0 on; 0 turns the loss off.")


def translate_native_config(config_dict: dict[str, Any]) -> dict[str, Any]:
    """HubMoe's fields for the config.json of a native checkpoint; a HubMoe one is returned as it is.

    Fields that the file leaves out get the native class's defaults, not HubMoe's. FP8 quantisation stays in
    `quantization_config`; loading decides what to do with it.

    Raises:
        UnsupportedModelError: If the model type is not one HubMoe loads.
        ConfigError: If a key is a misspelling of a field.
    """
    if not isinstance(config_dict, dict):
        raise ConfigError("config.json holds no JSON object.")
    model_type = config_dict.get("model_type", HubMoeConfig.model_type)
    if model_type == HubMoeConfig.model_type:
        return config_dict
    if model_type not in _STOCK_CONFIGS:
        raise UnsupportedModelError(f"model_type {model_type!r} is not one HubMoe loads ({', '.join(LOADABLE_TYPES)}).")
    native = {key: value for key, value in config_dict.items() if key not in _KEYS_WITHOUT_MEANING_HERE}
    native = drop_foreign_keys(native, HubMoeConfig)
    stock_class = _STOCK_CONFIGS[model_type]
    translated = stock_class.from_dict({**native, "model_type": stock_class.model_type}).to_dict()
    if stock_class is DeepseekV2Config:
        translated["scoring_func"] = native.get("scoring_func", "softmax")
        translated["rope_in_float32"] = True
    translated.pop("transformers_version", None)
    return {**translated, "model_type": HubMoeConfig.model_type}
