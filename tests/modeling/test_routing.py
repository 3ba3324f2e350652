"""Shape letters: T tokens, E routed experts, K experts per token, G groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_moe.modeling import HubMoeConfig
from hub_moe.modeling.routing import count_load, route_tokens

SOFTMAX = {"scoring_func": "softmax", "topk_method": "greedy"}
SOFTMAX_GROUPS = {"scoring_func": "softmax", "topk_method": "group_limited_greedy"}
SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _config(rule, **changes):
    sizes = {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
    return HubMoeConfig(**{**sizes, **rule, **changes})


def _route_one_by_one(logits_TE, bias_E, config):
    """The rule of the papers, token by token: the twin that anyone can check by hand."""
    chosen = []
    for logits in logits_TE.tolist():
        logits = torch.tensor(logits)
        scores = torch.softmax(logits, 0) if config.scoring_func == "softmax" else torch.sigmoid(logits)
        ranked = scores + bias_E if config.topk_method == "noaux_tc" else scores
        allowed = set(range(len(scores)))
        if config.topk_method != "greedy":
            size = len(scores) // config.n_group
            best = 2 if config.topk_method == "noaux_tc" else 1
            worth = [sum(sorted(ranked[g * size : (g + 1) * size].tolist())[-best:]) for g in range(config.n_group)]
            kept = sorted(range(config.n_group), key=lambda g: -worth[g])[: config.topk_group]
            allowed = {e for e in allowed if e // size in kept}
        experts = sorted(allowed, key=lambda e: -ranked[e].item())[: config.num_experts_per_tok]
        weights = [scores[e].item() for e in experts]
        total = sum(weights)
        if config.norm_topk_prob:
            weights = [weight / total for weight in weights]
        if not (config.norm_topk_prob and config.scoring_func == "softmax"):
            weights = [weight * config.routed_scaling_factor for weight in weights]
        chosen.append(dict(zip(experts, weights, strict=True)))
    return chosen


@pytest.mark.parametrize("rule", [SOFTMAX, SOFTMAX_GROUPS, SIGMOID], ids=lambda rule: rule["topk_method"])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 63])
def test_routing_equals_the_rule_applied_token_by_token(rule, norm_topk_prob, num_tokens):
    config = _config(rule, norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.5)
    logits_TE, bias_E = torch.randn(num_tokens, 12), torch.randn(12) * 0.3
    weight_TK, expert_TK = route_tokens(logits_TE, bias_E, config)
    for token, expected in enumerate(_route_one_by_one(logits_TE, bias_E, config)):
        actual = dict(zip(expert_TK[token].tolist(), weight_TK[token].tolist(), strict=True))
        assert actual.keys() == expected.keys()
        assert actual == pytest.approx(expected, rel=1e-5)


@given(
    rule=st.sampled_from([SOFTMAX, SOFTMAX_GROUPS, SIGMOID]),
    num_tokens=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_routing_chooses_distinct_experts_and_follows_a_permutation_of_tokens(rule, num_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    config = _config(rule)
    logits_TE = torch.randn(num_tokens, 12, generator=generator)
    bias_E = torch.randn(12, generator=generator)
    order = torch.randperm(num_tokens, generator=generator)
    weight_TK, expert_TK = route_tokens(logits_TE, bias_E, config)
    permuted_weight_TK, permuted_expert_TK = route_tokens(logits_TE[order], bias_E, config)
    assert all(len(set(experts)) == 3 for experts in expert_TK.tolist())
    assert torch.equal(permuted_expert_TK, expert_TK[order])
    torch.testing.assert_close(permuted_weight_TK, weight_TK[order])


def test_bias_changes_choice_but_not_weight():
    config = _config(SIGMOID, norm_topk_prob=False, routed_scaling_factor=1.0, n_group=1, topk_group=1)
    logits_TE = torch.zeros(1, 12)
    bias_E = torch.zeros(12).index_fill(0, torch.tensor([3, 5, 7]), 1.0)
    weight_TK, expert_TK = route_tokens(logits_TE, bias_E, config)
    assert sorted(expert_TK[0].tolist()) == [3, 5, 7]
    assert weight_TK[0].tolist() == [0.5, 0.5, 0.5]


def test_load_counts_tokens_and_leaves_padding_out():
    expert_TK = torch.tensor([[0, 1], [1, 2], [1, 3]])
    assert count_load(expert_TK, 5).tolist() == [1, 3, 1, 1, 0]
    assert count_load(expert_TK, 5, torch.tensor([1, 1, 0])).tolist() == [1, 2, 1, 0, 0]
