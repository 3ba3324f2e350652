"""DeepseekConfig: the first DeepSeekMoE (arXiv:2401.06066), `model_type: deepseek`."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV3Config, LlamaConfig

from ..errors import ConfigError
from .config_keys import drop_foreign_keys


@strict
class DeepseekConfig(LlamaConfig):
    """Configuration of deepseek-moe-16b and its relatives: Llama attention, softmax routing, shared experts.

    Only the fields that differ from `LlamaConfig` are listed; the defaults are those of DeepSeek's own file.

    Args:
        n_routed_experts: Experts per MoE layer; None makes every layer dense.
        n_shared_experts: Experts every token passes through; None or 0 for none.
        moe_layer_freq: From `first_k_dense_replace` on, layers whose index this number divides hold experts.
        norm_topk_prob: Divide the K weights by their sum.
        aux_loss_alpha: Weight of the expert-level balance loss in training (arXiv:2401.06066 section 3.3).
        seq_aux: Balance within each sequence rather than over the whole batch.

    Raises:
        ConfigError: For a misspelt key.
        StrictDataclassError: From huggingface_hub, for a wrong type, or around the ConfigError that names fields which
            contradict each other.
    """

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}
    base_model_tp_plan = {
        **LlamaConfig.base_model_tp_plan,
        **{key: plan for key, plan in DeepseekV3Config.base_model_tp_plan.items() if "experts" in key},
    }
    base_model_ep_plan = DeepseekV3Config.base_model_ep_plan

    vocab_size: int = 102400
    num_hidden_layers: int = 30
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    moe_intermediate_size: int = 1407
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: Literal["softmax"] = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    output_router_logits: bool = False

    # what routing and losses ask of every config, and this architecture has only one answer to
    topk_method: ClassVar[str] = "greedy"
    n_group: ClassVar[None] = None
    topk_group: ClassVar[None] = None
    routed_scaling_factor: ClassVar[float] = 1.0
    device_aux_loss_alpha: ClassVar[float] = 0.0
    router_z_loss_coef: ClassVar[float] = 0.0
    num_mtp_layers: ClassVar[int] = 0
    mtp_loss_coef: ClassVar[float] = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        cluster_keys = {"ep_size"}  # of published files
        kwargs = {key: value for key, value in kwargs.items() if key not in cluster_keys}
        super().__post_init__(**drop_foreign_keys(kwargs, DeepseekConfig))

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` (from 0) holds routed experts."""
        return (
            self.n_routed_experts is not None
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )

    def validate_routing(self) -> None:
        """K experts can be chosen."""
        if self.n_routed_experts is None:
            return
        if not 1 <= (self.num_experts_per_tok or 0) <= self.n_routed_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and "
                f"n_routed_experts={self.n_routed_experts}."
            )
        if self.moe_layer_freq < 1:
            raise ConfigError(f"moe_layer_freq={self.moe_layer_freq} must be at least 1.")
