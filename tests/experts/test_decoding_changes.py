"""Whether a model that decodes in compiled steps notices what its modules, weights and settings become."""

import copy
import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from hub_moe.errors import ConfigError
from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM, decoder_layer
from hub_moe.modeling.decoder_layer import HubMoeDecoderLayer
from hub_moe.modeling.layers import HubMoeAttention, HubMoeExperts, HubMoeMoE, HubMoeRouter
from tests.experts.test_decoding import decode, tiny_model  # noqa: F401  (a fixture)
from tests.modeling.stock_models import SHAPE


@pytest.fixture
def model(tiny_model, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", "compiled")
    return tiny_model


def moe(model):
    return model.model.layers[1].mlp


def attention(model):
    return model.model.layers[1].self_attn


def new_linear(model):
    attention(model).o_proj = nn.Linear(48, 32, bias=False)


def new_data(model):
    attention(model).kv_b_proj.weight.data = attention(model).kv_b_proj.weight.data.flip(0).contiguous()


def new_parameter(model):
    moe(model).experts.down_proj = nn.Parameter(moe(model).experts.down_proj.detach() * 2)


@torch.no_grad()
def same_parameter(model):
    model.model.layers[0].input_layernorm.weight.mul_(2)
    moe(model).gate.e_score_correction_bias.copy_(torch.linspace(-3, 3, 8))


def fewer_experts(model):
    model.config.num_experts_per_tok = 1


def other_implementation(model):
    model.set_experts_implementation("eager")


def own_forward(model):
    shared = moe(model).shared_experts
    shared.forward = lambda x: 0 * x


def hook_of_router(model):
    moe(model).gate.register_forward_hook(lambda _, __, out: (out[0], 0 * out[1], out[2]))


def hook_of_attention(model):
    attention(model).register_forward_hook(lambda _, __, out: (2 * out[0], out[1]))


def hook_of_layer(model):
    model.model.layers[1].register_forward_hook(lambda _, __, out: 2 * out)


def hook_of_projection(model):
    attention(model).q_proj.register_forward_pre_hook(lambda _, given: (2 * given[0],))


def other_activation(model):
    moe(model).shared_experts.act_fn = nn.GELU()


def other_layer(model):
    model.model.layers[2] = copy.deepcopy(model.model.layers[1])
    model.model.layers[2].self_attn.layer_idx = 2


@torch.no_grad()
def fewer_experts_at_the_same_place(model):
    model.config.n_group = model.config.topk_group = 1
    experts, gate = moe(model).experts, moe(model).gate
    experts.gate_up_proj, experts.down_proj = (
        nn.Parameter(each[:4]) for each in (experts.gate_up_proj, experts.down_proj)
    )
    gate.weight, gate.e_score_correction_bias = nn.Parameter(gate.weight[:4]), gate.e_score_correction_bias[:4]


def other_strides(model):
    experts = moe(model).experts
    experts.down_proj.data = experts.down_proj.data.as_strided((8, 32, 16), (512, 1, 32))


def a_bias_more(model):
    attention(model).o_proj.bias = nn.Parameter(torch.randn(32))


def rotation_of_halves(model):
    model.config.rope_interleave = not model.config.rope_interleave


def other_epsilon(model):
    model.model.layers[1].post_attention_layernorm.variance_epsilon = 1.0


def config_of_a_router(model):
    moe(model).gate.config = copy.deepcopy(model.config)
    moe(model).gate.config.num_experts_per_tok = 1


def other_class(model):
    class Twice(type(moe(model))):
        def forward(self, x):
            return 2 * super().forward(x)

    moe(model).__class__ = Twice


def norm_with_gaps(model):
    model.model.layers[1].input_layernorm.weight = nn.Parameter(torch.randn(32, 2)[:, 0])


def own_gate(model):
    moe(model).experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0].sin()


def linear_that_equals_everything(model):
    class Equal(nn.Linear):
        def __eq__(self, other):
            return True

        __hash__ = nn.Linear.__hash__

    attention(model).o_proj = Equal(48, 32, bias=False)


def attributes_at_another_place(model):
    norm = model.model.layers[1].post_attention_layernorm
    norm.__dict__ = {**vars(norm), "variance_epsilon": 1.0}


def state_of_another_module(model):
    attention(model).o_proj.__setstate__(vars(nn.Linear(48, 32, bias=False)))


def config_of_experts_that_says_only_what_they_ask(model):
    moe(model).experts.config = SimpleNamespace(_experts_implementation="hub_moe")
    new_data(model)


CHANGES = [
    *(linear_that_equals_everything, attributes_at_another_place, config_of_experts_that_says_only_what_they_ask),
    state_of_another_module,
    *(fewer_experts_at_the_same_place, other_strides, a_bias_more, rotation_of_halves, other_epsilon),
    *(config_of_a_router, other_class, norm_with_gaps, own_gate),
    *(new_linear, new_data, new_parameter, same_parameter, fewer_experts, other_implementation, own_forward),
    *(hook_of_router, hook_of_attention, hook_of_layer, hook_of_projection, other_activation, other_layer),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_steps_counts_at_the_next(change, model, monkeypatch):
    tokens = torch.randint(2, 128, (2, 25))
    mask = torch.ones_like(tokens)
    before = decode(model, tokens, mask)
    assert all(layer in decoder_layer._PREPARED for layer in model.model.layers)
    change(model)
    actual = decode(model, tokens, mask)
    monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", "torch")
    expected = decode(model, tokens, mask)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max())
    if change is not other_implementation:
        assert (actual - before).abs().max() > 1e-3 * before.abs().max()


KINDS = (HubMoeMoE, HubMoeRouter, HubMoeAttention, HubMoeDecoderLayer)


@pytest.mark.parametrize(("kind", "name"), [*[(kind, "forward") for kind in KINDS], (HubMoeExperts, "_apply_gate")])
def test_another_method_of_a_class_is_called(kind, name, model, monkeypatch):
    tokens = torch.randint(2, 128, (1, 25))
    decode(model, tokens, torch.ones_like(tokens))
    calls, method = [], getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, *a, **k: calls.append(1) or method(self, *a, **k))
    decode(model, tokens, torch.ones_like(tokens))
    assert len(calls) >= 4 * 2  # the steps after the prompt, in each layer that has one


def after_a_prompt(model, way, change, monkeypatch, **given):
    """Logits of a step on which something is changed after the prompt."""
    monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", way)
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.arange(20)[None], past_key_values=cache)
        model(torch.tensor([[3]]), past_key_values=cache)
        change(model)
        return model(past_key_values=cache, **given).logits


def none(model):
    pass


def too_many(model):
    model.config.num_experts_per_tok = 11


def too_many_groups_kept(model):
    model.config.n_group, model.config.topk_group = 2, 3


def uneven_groups(model):
    model.config.n_group, model.config.topk_group = 3, 2


def groups_of_one(model):
    model.config.n_group, model.config.topk_group = 8, 2


@torch.no_grad()
def router_of_more_experts(model):
    gate = moe(model).gate
    gate.weight = nn.Parameter(gate.weight.repeat(20, 1))
    gate.e_score_correction_bias = torch.cat([torch.zeros(8), torch.full((152,), 100.0)])


def short_bias(model):
    moe(model).gate.e_score_correction_bias = torch.zeros(2)


TOKEN = {"input_ids": torch.tensor([[5]])}
WRONG = {
    "more experts a token than there are": (too_many, TOKEN),
    "more groups than there are": (too_many_groups_kept, TOKEN),
    "uneven groups": (uneven_groups, TOKEN),
    "groups of one expert ranked by two": (groups_of_one, TOKEN),
    "a router of more experts": (router_of_more_experts, TOKEN),
    "a short bias": (short_bias, TOKEN),
    "wide embeddings": (none, {"inputs_embeds": torch.randn(1, 1, 64)}),
    "narrow embeddings": (none, {"inputs_embeds": torch.randn(1, 1, 16)}),
    "positions of other tokens": (none, {**TOKEN, "position_ids": torch.arange(20)[None]}),
    "a mask of integers": (none, {**TOKEN, "attention_mask": torch.ones(1, 1, 1, 22, dtype=torch.int64)}),
}


@pytest.mark.parametrize(("change", "given"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("way", ["torch", "compiled"])
def test_what_cannot_be_computed_is_refused_as_by_the_modules(change, given, way, model, monkeypatch):
    with pytest.raises((RuntimeError, ConfigError)):
        after_a_prompt(model, way, change, monkeypatch, **given)


@torch.no_grad()
def ties(model):
    for layer in model.model.layers[1:]:
        layer.mlp.gate.weight.zero_()
        layer.mlp.gate.e_score_correction_bias.zero_()


def more_experts_than_the_groups_hold(model):
    model.config.n_group, model.config.topk_group, model.config.num_experts_per_tok = 4, 1, 4


SAME = {
    "experts that are equally good": (ties, TOKEN),
    "more experts than the groups hold": (more_experts_than_the_groups_hold, TOKEN),
    "three tokens at one place": (none, {"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": torch.tensor([[21]])}),
    "all tokens seen": (none, {"inputs_embeds": torch.randn(1, 3, 32), "is_causal": False}),
}


@pytest.mark.parametrize(("change", "given"), SAME.values(), ids=SAME)
def test_rare_cases_are_those_of_the_modules(change, given, model, monkeypatch):
    twin = copy.deepcopy(model)
    expected = after_a_prompt(twin, "torch", change, monkeypatch, **given)
    actual = after_a_prompt(model, "compiled", change, monkeypatch, **given)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max())


def test_hidden_states_and_routing_are_given_where_they_are_asked_for(model, monkeypatch):
    tokens = torch.randint(2, 128, (1, 1))
    outputs = {}
    for asked in ("torch", "compiled"):
        monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", asked)
        cache = DynamicCache()
        with torch.no_grad():
            model(torch.arange(20)[None], past_key_values=cache)
            outputs[asked] = model(tokens, past_key_values=cache, output_hidden_states=True, output_router_logits=True)
    for name in ("hidden_states", "router_logits"):
        assert len(outputs["compiled"][name]) == len(outputs["torch"][name]) > 1
        for ours, expected in zip(outputs["compiled"][name], outputs["torch"][name], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_has_decoded_can_be_copied_saved_and_forgotten(model):
    tokens = torch.randint(2, 128, (1, 25))
    mask = torch.ones_like(tokens)
    expected = decode(model, tokens, mask)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(decode(twin, tokens, mask), expected)
    layers = list(model.model.layers)
    del model, twin
    gc.collect()
    assert {each for each in decoder_layer._PREPARED} <= {*layers}  # noqa: C416  (weak references die meanwhile)


def test_both_or_neither_of_ids_and_embeddings_are_refused(model):
    for given in ({}, {"input_ids": torch.ones(1, 2, dtype=torch.int64), "inputs_embeds": torch.ones(1, 2, 32)}):
        with pytest.raises(ValueError, match="Exactly one of input_ids and inputs_embeds was expected"):
            model(**given)


def count_compiled_layers(monkeypatch):
    """Grows by one for each layer that is decoded in compiled steps."""
    calls, decode_layer = [], HubMoeDecoderLayer.decode
    monkeypatch.setattr(
        HubMoeDecoderLayer, "decode", lambda self, *a, **k: calls.append(1) or decode_layer(self, *a, **k)
    )
    return calls


RECORDED = {
    "output_hidden_states": ({"output_hidden_states": True}, "hidden_states", 4),
    "a layer's hidden states": ({"output_hidden_states": [0, 2]}, "hidden_states", 4),
    "output_router_logits": ({"output_router_logits": True}, "router_logits", 2),
}


@pytest.mark.parametrize(("asked", "name", "count"), RECORDED.values(), ids=RECORDED)
def test_outputs_are_recorded_and_steps_are_compiled_again_when_they_no_longer_are(
    asked, name, count, model, monkeypatch
):
    tokens = torch.randint(2, 128, (2, 25))
    expected = decode(model, tokens, torch.ones_like(tokens))
    calls = count_compiled_layers(monkeypatch)
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens[:, :20], past_key_values=cache)
        recorded = getattr(model(tokens[:, 20:21], past_key_values=cache, **asked), name)
        assert calls == []
        model(tokens[:, 21:22], past_key_values=cache)
    assert len(calls) == 3
    assert len(recorded) == count
    kept = [each for each in recorded if each is not None]
    assert kept
    assert all(torch.isfinite(each).all() and each.abs().max() > 0 for each in kept)
    assert torch.equal(decode(model, tokens, torch.ones_like(tokens)), expected)


@pytest.mark.parametrize("asked", [-1, [-1]])
def test_the_last_hidden_state_alone_needs_no_recorder(asked, model, monkeypatch):
    tokens, cache = torch.randint(2, 128, (2, 25)), DynamicCache()
    with torch.no_grad():
        all_states = model(tokens, output_hidden_states=True).hidden_states
        model(tokens[:, :24], past_key_values=cache)
        calls = count_compiled_layers(monkeypatch)
        states = model(tokens[:, 24:], past_key_values=cache, output_hidden_states=asked).hidden_states
    assert len(calls) == 3
    assert len(states) == len(all_states)
    assert states[:-1] == (None,) * 3
    torch.testing.assert_close(states[-1], all_states[-1][:, 24:], rtol=0, atol=1e-5 * states[-1].abs().max())


def test_the_last_hidden_state_keeps_its_place_and_its_meaning(model):
    tokens = torch.randint(2, 128, (1, 9))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        given = {"output_attentions": True, "return_dict": False, "use_cache": False}
        _, states, attentions = model(tokens, output_hidden_states=-1, **given)
        assert states[-1].shape == (1, 9, 32)
        assert len(attentions) == 3
        model.config.tie_last_hidden_states = False  # then the state in front of the last norm
        before_norm = model(tokens, output_hidden_states=-1).hidden_states[-1]
    torch.testing.assert_close(model.model.norm(before_norm), states[-1], rtol=0, atol=1e-5)
    assert not torch.allclose(before_norm, states[-1])


def test_drafting_runs_in_compiled_steps(monkeypatch):
    monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", "compiled")
    torch.manual_seed(0)
    model = HubMoeForCausalLM(HubMoeConfig(**{**SHAPE, "num_mtp_layers": 1, "eos_token_id": None})).eval()
    calls = count_compiled_layers(monkeypatch)
    model.generate(torch.randint(2, 128, (1, 9)), max_new_tokens=12, do_sample=False, use_mtp=True)
    passes = sum(model.mtp_acceptance.drafted) + 1
    assert passes >= 6  # of 12 tokens, at most two in each
    assert len(calls) >= 4 * (passes - 2)  # three layers and the MTP layer; the prompt and the first draft are long
