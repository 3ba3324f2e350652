import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hub_moe.anatomy import find_moe_layers, hash_tensor, named_tensors
from hub_moe.errors import ConfigError, UnsupportedModelError
from hub_moe.experts import freeze_all_but, merge_experts, split_experts, trained_tensors

from ..anatomy.families import FAMILIES, tiny_config
from .training import CHOSEN, IDS, build, hashes, train


@pytest.mark.parametrize("implementation", ["grouped_mm", "hub_moe"])  # whose output a split model has, bit by bit
@pytest.mark.parametrize("model_type", FAMILIES)
def test_training_and_merging_change_the_chosen_experts_and_no_bit_of_anything_else(model_type, implementation):
    model = build(model_type)
    model.set_experts_implementation(implementation)
    before = hashes(model)
    layer = find_moe_layers(model)[-1]
    trained = freeze_all_but(model, {layer.index: [6, 1]}, shared_experts=False, non_expert_modules=False)
    optimizer = train(model)
    tensors = {name: view.clone() for name, view in trained_tensors(model).items()}
    logits = model.eval()(IDS, use_cache=False).logits
    merge_experts(model)

    after = hashes(model)
    assert {name for name in before if before[name] != after[name]} == set(trained) == tensors.keys()
    assert all(after[name] == hash_tensor(tensor) for name, tensor in tensors.items())
    assert all(name.startswith((f"{layer.name}.experts.1.", f"{layer.name}.experts.6.")) for name in trained)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert sum(moment.numel() for state in optimizer.state.values() for moment in state.values()) == 2 * numbers + len(
        optimizer.state
    )
    assert torch.equal(model(IDS, use_cache=False).logits, logits)


def test_merging_restores_the_forward_and_what_was_trained_before():
    model = build()
    model.set_experts_implementation("eager")
    find_moe_layers(model)[0].experts.down_proj.requires_grad_(False)
    before = {name: each.requires_grad for name, each in model.named_parameters()}
    split_experts(model, CHOSEN)
    assert model.config._experts_implementation == "grouped_mm_split"
    merge_experts(model)

    assert model.config._experts_implementation == "eager"
    assert {name: each.requires_grad for name, each in model.named_parameters()} == before
    assert not {"save_pretrained", "load_state_dict"} & vars(model).keys()
    train(model)
    split_experts(model, CHOSEN)


def test_the_frozen_stack_keeps_the_base_while_its_copies_are_trained():
    model = build()
    experts = find_moe_layers(model)[0].experts
    base = experts.down_proj.detach().clone()
    freeze_all_but(model, CHOSEN, shared_experts=False, non_expert_modules=False)
    train(model)

    assert torch.equal(experts.down_proj, base)
    assert experts.down_proj.grad is None
    assert not torch.equal(experts.chosen.down_proj, base[[1, 6]])


def test_layers_below_the_lowest_trained_one_run_without_autograd():
    model = build(num_hidden_layers=4)
    freeze_all_but(model, {2: [3]}, shared_experts=False, non_expert_modules=False)
    needs_gradient = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, __, out, index=index: needs_gradient.update({index: out.requires_grad}))
    model(IDS, labels=IDS, use_cache=False).loss.backward()

    assert needs_gradient == {0: False, 1: False, 2: True, 3: True}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    plain, checkpointed = build(), build()
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    compare_gradients(plain, checkpointed)


def test_gradient_checkpointing_without_gradients_of_the_input_still_skips_the_lower_layers():
    plain, checkpointed = build(), build()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    checkpointed.disable_input_require_grads()  # transformers switches them on with checkpointing
    needs_gradient = []
    checkpointed.model.layers[0].register_forward_hook(lambda _, __, out: needs_gradient.append(out.requires_grad))
    compare_gradients(plain, checkpointed)

    assert needs_gradient == [False]


def compare_gradients(plain, checkpointed):
    for model in (plain, checkpointed):
        freeze_all_but(model, CHOSEN, shared_experts=False, non_expert_modules=False)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    expected = {name: each.grad for name, each in plain.named_parameters() if each.grad is not None}
    for name, parameter in checkpointed.named_parameters():
        assert torch.equal(parameter.grad, expected[name]) if name in expected else parameter.grad is None, name


def test_float32_copies_of_a_bfloat16_model_take_steps_that_bfloat16_would_lose():
    lost, kept = build().to(torch.bfloat16), build().to(torch.bfloat16)
    split_experts(lost, CHOSEN)
    split_experts(kept, CHOSEN, dtype=torch.float32)
    for model in (lost, kept):
        model.requires_grad_(False)
        chosen = find_moe_layers(model)[0].experts.chosen.requires_grad_(True)
        nn.init.constant_(chosen.down_proj, 1.0)
        optimizer = torch.optim.SGD(chosen.parameters(), lr=1e-4)
        for _ in range(100):
            chosen.down_proj.grad = torch.ones_like(chosen.down_proj)
            optimizer.step()
        assert {tensor.dtype for tensor in trained_tensors(model).values()} == {torch.bfloat16}
        merge_experts(model)

    assert (find_moe_layers(lost)[0].experts.down_proj[1] == 1.0).all()
    assert (find_moe_layers(kept)[0].experts.down_proj[1] == torch.tensor(0.99).bfloat16()).all()


def test_generation_by_a_split_model_is_that_of_the_whole_one():
    whole, split = build().eval(), build().eval()
    split_experts(split, CHOSEN)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}

    assert torch.equal(split.generate(IDS, **settings), whole.generate(IDS, **settings))


@pytest.mark.parametrize(
    ("model_type", "settings", "kinds"),
    [
        ("deepseek_v3", {"shared_experts": False, "non_expert_modules": False}, {"routed_experts"}),
        ("qwen2_moe", {"shared_experts": True, "non_expert_modules": False}, {"routed_experts", "shared_experts"}),
        (
            "deepseek_v3",
            {"shared_experts": False, "non_expert_modules": True},
            {"routed_experts", "router", "attention", "dense_mlp", "norms", "embeddings", "head"},
        ),
        (
            "granitemoeshared",
            {"shared_experts": True, "non_expert_modules": True},
            {"routed_experts", "shared_experts", "router", "attention", "norms", "embeddings", "head"},
        ),
    ],
)
def test_what_is_said_to_be_trained_is_what_changes(model_type, settings, kinds):
    model = build(model_type)
    before = hashes(model)
    kind_of = {name: kind for name, kind, *_ in named_tensors(model, find_moe_layers(model))}
    trained = freeze_all_but(model, CHOSEN, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.5)
    merge_experts(model)

    after = hashes(model)
    assert trained == sorted(name for name in before if before[name] != after[name])
    assert {kind_of[name] for name in trained} == kinds


def test_experts_of_an_mtp_layer_can_be_trained():
    model = build(num_mtp_layers=1)
    trained = freeze_all_but(model, {3: [2]}, shared_experts=False, non_expert_modules=False)
    before = hashes(model)
    train(model)
    merge_experts(model)

    after = hashes(model)
    assert trained == sorted(name for name in before if before[name] != after[name])
    assert trained == [f"model.layers.3.mlp.experts.2.{each}_proj.weight" for each in ("down", "gate", "up")]


def test_without_a_chosen_expert_shared_ones_can_still_be_trained():
    model = build()
    trained = freeze_all_but(model, {}, shared_experts=True, non_expert_modules=False)
    before = hashes(model)
    train(model)

    after = hashes(model)
    assert trained == sorted(name for name in before if before[name] != after[name])
    assert all(".shared_experts." in name for name in trained)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({0: [1]}, "no layer 0 with routed experts; it has 1, 2"),
        ({7: [1]}, "no layer 7"),
        ({"1": [1]}, "no layer '1'"),
        ({1: [8]}, "Layer 1 has no expert 8; it has 8, numbered from 0 to 7"),
        ({1: [-1]}, "Layer 1 has no expert -1"),
        ({1: ["2"]}, "Layer 1 has no expert '2'"),
        ({1: [2, 2]}, "An expert of layer 1 is chosen twice"),
    ],
)
def test_a_layer_or_expert_that_is_not_there_is_an_error_and_nothing_is_split(chosen, message):
    model = build()
    with pytest.raises(ConfigError, match=message):
        split_experts(model, chosen)

    assert model.config._experts_implementation == "hub_moe"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_splitting_twice_merging_nothing_and_another_choice_are_errors():
    model = build()
    for use in (merge_experts, trained_tensors):
        with pytest.raises(ConfigError, match="not split"):
            use(model)
    split_experts(model, CHOSEN)
    with pytest.raises(ConfigError, match="split already"):
        split_experts(model, CHOSEN)
    with pytest.raises(
        ConfigError, match=r"is split for the experts \{1: \(1, 6\), 2: \(0,\)\}, not for \{1: \(1,\)\}"
    ):
        freeze_all_but(model, {1: [1]}, shared_experts=False, non_expert_modules=False)


def test_training_nothing_and_shared_experts_that_are_not_there_are_errors():
    with pytest.raises(ConfigError, match="Nothing would be trained"):
        freeze_all_but(build(), {}, shared_experts=False, non_expert_modules=False)
    with pytest.raises(ConfigError, match="type 'olmoe' has no shared experts"):
        freeze_all_but(build("olmoe"), {1: [0]}, shared_experts=True, non_expert_modules=False)


def test_experts_whose_forward_cannot_be_exchanged_are_an_error_that_names_the_type():
    model = build()
    del find_moe_layers(model)[1].experts.is_transposed
    with pytest.raises(UnsupportedModelError, match="'hub_moe' computes its experts in a way that cannot be exchanged"):
        split_experts(model, CHOSEN)


def test_experts_in_8_bits_are_an_error():
    model = build()
    experts = find_moe_layers(model)[0].experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"layers.1.mlp.experts.down_proj is of type torch.float8_e4m3fn"):
        split_experts(model, CHOSEN)


def test_a_model_without_weights_can_be_split_to_see_what_would_be_trained():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("hub_moe"))
    split_experts(model, CHOSEN)

    assert trained_tensors(model).keys() == trained_tensors_of_a_real_one()
    assert json.dumps(model.config.to_dict())


def trained_tensors_of_a_real_one():
    model = build()
    split_experts(model, CHOSEN)
    return trained_tensors(model).keys()
