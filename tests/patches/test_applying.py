"""A patch goes onto a loaded model and off again, on every family, and never half."""

import copy

import pytest
import torch

from hub_moe.anatomy.expert_tensors import hash_tensor
from hub_moe.errors import PatchError, UnsupportedModelError
from hub_moe.patches import ExpertPatch, applied_patches, apply_patch, hash_base, make_patch, remove_patch, swap_patch
from hub_moe.patches.expert_patch import find_touched
from tests.anatomy.families import FAMILIES

from .patching import (
    BASE,
    build_model,
    changed_names,
    hashes,
    last_layers,
    logits_of,
    names_of,
    patch_experts,
    train_patch,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_applying_changes_the_patchs_tensors_and_nothing_else_and_removing_gives_the_base(family):
    model = build_model(family)
    first, second = last_layers(model)
    patch = patch_experts(model, {first: [0, 7], second: [3]})
    before, logits = hashes(model), logits_of(model)
    apply_patch(model, patch)
    after = hashes(model)
    assert changed_names(before, after) == set(patch.tensors)
    assert all(after[name] == record.after for name, record in patch.metadata.tensors.items())
    assert not torch.equal(logits_of(model), logits)
    assert [each.base for each in applied_patches(model)] == [BASE]
    remove_patch(model)
    assert hashes(model) == before
    assert torch.equal(logits_of(model), logits)
    assert applied_patches(model) == ()


def test_a_patch_reaches_the_experts_of_mtp_layers():
    model = build_model(num_mtp_layers=1)
    patch = patch_experts(model, {3: [2]})
    assert "model.layers.3.mlp.experts.2.up_proj.weight" in patch.tensors
    before = hashes(model)
    apply_patch(model, patch)
    assert changed_names(before, hashes(model)) == set(patch.tensors)


@pytest.mark.parametrize("family", ["hub_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_patch_of_a_float32_base_goes_onto_the_base_in_another_dtype(family, dtype):
    model = build_model(family)
    patch = patch_experts(model, {2: [1]})
    cast = copy.deepcopy(model).to(dtype)
    before = hashes(cast)
    apply_patch(cast, patch)
    after = hashes(cast)
    assert changed_names(before, after) == set(patch.tensors)
    assert all(after[name] == hash_tensor(tensor.to(dtype)) for name, tensor in patch.tensors.items())
    remove_patch(cast)
    assert hashes(cast) == before


def test_a_patch_of_a_bfloat16_base_goes_onto_the_base_in_float32():
    model = build_model(dtype=torch.bfloat16)
    patch = patch_experts(model, {2: [1]})
    cast = copy.deepcopy(model).float()
    apply_patch(cast, patch)
    assert all(torch.equal(find_of(cast, name), tensor.float()) for name, tensor in patch.tensors.items())


def find_of(model, name):
    from hub_moe.anatomy import find_moe_layers

    return find_touched(model, find_moe_layers(model), [name])[name]


def test_a_dtype_that_the_patch_does_not_know_is_refused():
    model = build_model()
    patch = patch_experts(model, {2: [1]})
    with pytest.raises(PatchError, match="is float64, and the patch knows it in float32, bfloat16, float16 only"):
        apply_patch(model.double(), patch)


def test_a_patch_that_overflows_the_models_dtype_is_refused():
    model = build_model()
    patch = patch_experts(model, {2: [1]}, size=1e6)
    model.half()
    before = hashes(model)
    with pytest.raises(PatchError, match="does not fit into the model's float16: it overflows"):
        apply_patch(model, patch)
    assert hashes(model) == before


def test_shared_experts_balancing_bias_and_other_modules_are_patched_by_their_names():
    model = build_model()
    names = [
        *names_of(model, {1: [4]}),
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.0.self_attn.o_proj.weight",
    ]
    patch = train_patch(model, names)
    assert patch.metadata.shared_experts
    assert patch.metadata.balancing_bias
    assert patch.metadata.non_expert_modules
    before = hashes(model)
    apply_patch(model, patch)
    assert changed_names(before, hashes(model)) == set(names)
    remove_patch(model)
    assert hashes(model) == before


def test_two_patches_on_disjoint_experts_lie_on_one_model():
    model = build_model()
    a, b = patch_experts(model, {1: [0]}), patch_experts(model, {1: [1], 2: [5]}, seed=2)
    before = hashes(model)
    apply_patch(model, a)
    apply_patch(model, b)
    assert changed_names(before, hashes(model)) == {*a.tensors, *b.tensors}
    assert applied_patches(model) == (a.metadata, b.metadata)
    remove_patch(model)
    assert hashes(model) == before


def test_a_patch_on_an_expert_that_another_patch_changed_is_refused_with_what_to_do():
    model = build_model()
    a, b = patch_experts(model, {1: [0]}), patch_experts(model, {1: [0, 1]}, seed=2)
    apply_patch(model, a)
    patched = hashes(model)
    with pytest.raises(PatchError, match=r"'model.layers.1.mlp.experts.0.down_proj.weight' .* swap_patch"):
        apply_patch(model, b)
    assert hashes(model) == patched
    assert applied_patches(model) == (a.metadata,)


def test_a_patch_made_on_top_of_a_patched_model_goes_onto_it_and_off_with_it():
    model = build_model()
    before = hashes(model)
    apply_patch(model, patch_experts(model, {1: [0]}))
    second = patch_experts(model, {1: [0]}, seed=2)
    apply_patch(model, second)
    assert hashes(model)["model.layers.1.mlp.experts.0.up_proj.weight"] == hash_tensor(
        second.tensors["model.layers.1.mlp.experts.0.up_proj.weight"]
    )
    remove_patch(model)
    assert hashes(model) == before


def test_swapping_leaves_the_second_patch_alone_on_the_base():
    model = build_model()
    before = hashes(model)
    a, b = patch_experts(model, {1: [0, 1]}), patch_experts(model, {1: [1], 2: [5]}, seed=2)
    expected = copy.deepcopy(model)
    apply_patch(expected, b)
    apply_patch(model, a)
    swap_patch(model, b)
    assert hashes(model) == hashes(expected)
    assert applied_patches(model) == (b.metadata,)
    swap_patch(model, a)
    swap_patch(model, b)
    remove_patch(model)
    assert hashes(model) == before


def test_swapping_onto_a_bare_base_applies():
    model = build_model()
    patch = patch_experts(model, {1: [0]})
    swap_patch(model, patch)
    assert applied_patches(model) == (patch.metadata,)


def test_swapping_to_a_patch_that_does_not_fit_keeps_the_old_one():
    model = build_model()
    a, other = patch_experts(model, {1: [0]}), patch_experts(build_model(seed=5), {1: [0]})
    apply_patch(model, a)
    patched = hashes(model)
    with pytest.raises(PatchError, match="has other values"):
        swap_patch(model, other)
    assert hashes(model) == patched
    assert applied_patches(model) == (a.metadata,)


def test_a_patch_for_another_base_is_refused_and_says_which_tensor_and_which_base():
    model = build_model()
    patch = patch_experts(build_model(seed=5), {1: [0], 2: [3]})
    before = hashes(model)
    with pytest.raises(PatchError) as caught:
        apply_patch(model, patch)
    assert str(caught.value) == (
        f"The patch is for alice/base at commit {BASE.commit}, and this is another model: its tensor "
        "'model.layers.1.mlp.experts.0.down_proj.weight' has other values."
    )
    assert hashes(model) == before


def test_one_changed_tensor_of_the_base_is_enough_to_refuse_and_nothing_is_changed():
    model = build_model()
    patch = patch_experts(model, {1: [0], 2: [3]})
    find_of(model, "model.layers.2.mlp.experts.3.up_proj.weight")[0, 0] += 1e-6
    before = hashes(model)
    with pytest.raises(PatchError, match=r"'model.layers.2.mlp.experts.3.up_proj.weight' has other values"):
        apply_patch(model, patch)
    assert hashes(model) == before
    assert applied_patches(model) == ()


def test_a_change_of_an_untouched_tensor_does_not_hinder():
    model = build_model()
    patch = patch_experts(model, {1: [0]})
    find_of(model, "model.layers.2.mlp.experts.3.up_proj.weight")[0, 0] += 1
    apply_patch(model, patch)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_routed_experts": 4, "n_group": 1}, r"has no tensor 'model.layers.1.mlp.experts.7.down_proj.weight'"),
        ({"moe_intermediate_size": 8}, r"has shape \[32, 8\] and not \[32, 16\]"),
        ({"first_k_dense_replace": 2}, r"has no tensor 'model.layers.1.mlp.experts.7"),
    ],
)
def test_a_model_of_another_build_is_refused(changes, reason):
    patch = patch_experts(build_model(), {1: [7]})
    with pytest.raises(PatchError, match=reason):
        apply_patch(build_model(**changes), patch)


def test_a_dense_model_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    with pytest.raises(UnsupportedModelError, match="has no routed experts"):
        apply_patch(LlamaForCausalLM(config), patch_experts(build_model(), {1: [7]}))


def test_an_offloaded_model_is_refused():
    patch = patch_experts(build_model(), {1: [7]})
    with pytest.raises(PatchError, match="not in memory"):
        apply_patch(build_model().to("meta"), patch)


def test_removing_from_a_bare_model_says_so():
    with pytest.raises(PatchError, match="carries no expert patch"):
        remove_patch(build_model())


def test_a_failure_in_the_middle_of_writing_undoes_what_was_written():
    model = build_model()
    good = patch_experts(model, {1: [0], 2: [3]})
    last = list(good.tensors)[-1]
    broken = ExpertPatch(good.metadata, {**good.tensors, last: torch.zeros(3, 5)})
    before = hashes(model)
    with pytest.raises(RuntimeError, match="size"):
        apply_patch(model, broken)
    assert hashes(model) == before
    assert applied_patches(model) == ()


def test_a_copy_of_a_patched_model_can_be_unpatched_by_itself():
    model = build_model()
    before = hashes(model)
    apply_patch(model, patch_experts(model, {1: [0]}))
    twin = copy.deepcopy(model)
    remove_patch(twin)
    assert hashes(twin) == before
    assert applied_patches(model)


def test_a_patch_owns_its_numbers():
    model = build_model()
    names = names_of(model, {1: [0]})
    patch = make_patch(find_touched_of(model, names), model_before=hash_base(model, names), base=BASE)
    find_of(model, names[0]).zero_()
    assert patch.tensors[names[0]].abs().sum() > 0


def find_touched_of(model, names):
    return {name: find_of(model, name) for name in names}


def test_training_goes_on_after_a_patch_was_applied():
    model = build_model().train()
    apply_patch(model, patch_experts(model, {1: [0]}))
    model(torch.arange(2, 14)[None], labels=torch.arange(2, 14)[None]).loss.backward()
    assert model.model.layers[1].mlp.experts.down_proj.grad is not None
