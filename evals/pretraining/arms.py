"""What is compared: models of equal active width and equal total width, and how their experts are balanced.

The shapes are those of arXiv:2401.06066 section 4 with half the experts: a coarse model picks 2 of 8 experts of width
F; the fine-grained one has 31 routed experts of width F / 4 and a shared one, and picks 7, so both have 8 F in all and
2 F at work, which is the width of the dense model.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from hub_moe.anatomy import measure_footprint
from hub_moe.anatomy.footprint import Footprint
from hub_moe.anatomy.parameters import sort_parameters
from hub_moe.anatomy.rehearsal import rehearse
from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM

LAYERS = 2
EXPERT_WIDTH = 144  # F

SHARED_FIELDS: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 96,
    "intermediate_size": 2 * EXPERT_WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 48,
    "q_lora_rank": None,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "initializer_range": 0.03,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "tie_word_embeddings": True,
}

# The K weights of a token sum up to 1; times K, a block's output starts with the variance of the dense block's.
_DENSE = {"first_k_dense_replace": LAYERS}
_COARSE = {
    "moe_intermediate_size": EXPERT_WIDTH,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 0,
    "routed_scaling_factor": 2.0,
}
_FINE = {
    "moe_intermediate_size": EXPERT_WIDTH // 4,
    "n_routed_experts": 31,
    "num_experts_per_tok": 7,
    "n_shared_experts": 1,
    "routed_scaling_factor": 7.0,
}
_AUX_LOSS = {"aux_loss_alpha": 0.01, "seq_aux": False}
_LOSS_FREE_SPEED = 0.001


@dataclass(frozen=True)
class Arm:
    """One way to build and balance the model.

    Args:
        name: In file names.
        title: In the table and the plot.
        fields: Of HubMoeConfig, beside `SHARED_FIELDS`.
        balancing_speed: See `RunPlan`.
        learning_rate_factor: Times the learning rate of all arms.
    """

    name: str
    title: str
    fields: dict[str, Any] = field(default_factory=dict, hash=False)
    balancing_speed: float | None = 0.0
    learning_rate_factor: float = 1.0

    @property
    def has_experts(self) -> bool:
        """Whether any layer has."""
        return self.balancing_speed is not None

    def config(self) -> HubMoeConfig:
        """Of the model."""
        return HubMoeConfig(**{**SHARED_FIELDS, **self.fields})


MAIN_ARMS = (
    Arm("dense", "dense", _DENSE, balancing_speed=None),
    Arm("coarse-aux", "coarse top-2, aux loss", {**_COARSE, **_AUX_LOSS}),
    Arm("fine-lossfree", "fine + shared, loss-free", _FINE, balancing_speed=_LOSS_FREE_SPEED),
    Arm("fine-aux", "fine + shared, aux loss", {**_FINE, **_AUX_LOSS}),
    Arm("fine-none", "fine + shared, no balancing", _FINE),
)
SECONDARY_ARMS = (
    Arm("coarse-lossfree", "coarse top-2, loss-free", _COARSE, balancing_speed=_LOSS_FREE_SPEED),
    Arm("coarse-none", "coarse top-2, no balancing", _COARSE),
)
SWEEP_ARMS = (
    Arm("dense-half-rate", "dense, half the learning rate", _DENSE, balancing_speed=None, learning_rate_factor=0.5),
    Arm("dense-twice-rate", "dense, twice the learning rate", _DENSE, balancing_speed=None, learning_rate_factor=2.0),
)
ARMS = {arm.name: arm for arm in (*MAIN_ARMS, *SECONDARY_ARMS, *SWEEP_ARMS)}


def measure_arm(arm: Arm) -> Footprint:
    """Parameters and operations; `measure_footprint` itself refuses a model without experts."""
    config = arm.config()
    if arm.has_experts:
        return measure_footprint(config)
    with torch.device("meta"):
        model = HubMoeForCausalLM(config)
    return Footprint(
        model_type=config.model_type,
        class_name=type(model).__name__,
        num_layers=config.num_hidden_layers,
        max_context=config.max_position_embeddings,
        moe_layers=(),
        parameters=tuple(sort_parameters(model, [])),
        rehearsal=rehearse(model),
    )
