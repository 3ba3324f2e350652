"""Which experts a token goes to, and with what weight. Pure functions on tensors.

Shape letters: T tokens, E routed experts, K experts per token, G expert groups, x experts in one group.
"""

import torch
from torch import Tensor

from .configuration_hub_moe import HubMoeConfig


def route_tokens(logits_TE: Tensor, bias_E: Tensor | None, config: HubMoeConfig) -> tuple[Tensor, Tensor]:
    """Choose K experts per token and weigh them.

    The balancing bias steers the choice and never the weight (arXiv:2412.19437 section 2.1.2).

    Args:
        logits_TE: Router logits, float32.
        bias_E: Balancing bias, float32; used only with `topk_method="noaux_tc"`.
        config: Its fields `scoring_func`, `topk_method`, `num_experts_per_tok`, `n_group`, `topk_group`,
            `norm_topk_prob` and `routed_scaling_factor` decide.

    Returns:
        `(weight_TK, expert_TK)`: float32 weights and int64 expert ids, in no particular order within K.
    """
    scores_TE = score_experts(logits_TE, config.scoring_func)
    choice_TE = scores_TE
    if config.topk_method == "noaux_tc":
        assert bias_E is not None
        choice_TE = _keep_best_groups(scores_TE + bias_E, config, experts_ranked=2, dropped=float("-inf"))
    elif config.topk_method == "group_limited_greedy":
        # dropped experts weigh nothing, so the weights below come from the masked scores
        scores_TE = choice_TE = _keep_best_groups(scores_TE, config, experts_ranked=1, dropped=0.0)
    expert_TK = torch.topk(choice_TE, k=config.num_experts_per_tok, dim=-1, sorted=False).indices
    weight_TK = _scale_weights(scores_TE.gather(1, expert_TK), config)
    return weight_TK, expert_TK


def score_experts(logits_TE: Tensor, scoring_func: str) -> Tensor:
    """Affinity of each token to each expert, float32, in (0, 1)."""
    if scoring_func == "softmax":
        return torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    return torch.sigmoid(logits_TE)


def count_load(expert_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """Tokens each expert received, int64 of shape (E,); tokens where `mask_T` is 0 are padding and not counted."""
    load_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_TK.device)
    ones_TK = torch.ones_like(expert_TK)
    if mask_T is not None:
        ones_TK = ones_TK * mask_T.to(ones_TK).unsqueeze(-1)
    return load_E.scatter_add_(0, expert_TK.flatten(), ones_TK.flatten())


def _keep_best_groups(scores_TE: Tensor, config: HubMoeConfig, *, experts_ranked: int, dropped: float) -> Tensor:
    """Replace the scores outside the best `topk_group` groups by `dropped`.

    A group is worth the sum of its best `experts_ranked` experts.
    """
    if config.topk_group == config.n_group:
        return scores_TE
    scores_TGx: Tensor = scores_TE.unflatten(-1, (config.n_group, -1))
    group_TG = scores_TGx.topk(experts_ranked, dim=-1).values.sum(dim=-1)
    kept_Tg = torch.topk(group_TG, k=config.topk_group, dim=-1, sorted=False).indices
    is_dropped_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(-1, kept_Tg, False)
    return scores_TGx.masked_fill(is_dropped_TG.unsqueeze(-1), dropped).flatten(-2)


def _scale_weights(weight_TK: Tensor, config: HubMoeConfig) -> Tensor:
    """Normalise and scale. With softmax the two exclude each other, as in DeepSeek's own V2 code."""
    is_normalised = config.norm_topk_prob and (config.scoring_func == "sigmoid" or config.num_experts_per_tok > 1)
    if is_normalised:
        weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + 1e-20)
        if config.scoring_func == "softmax":
            return weight_TK
    scale: float = config.routed_scaling_factor
    return weight_TK * scale
