"""Two patches side by side, and a patch beside its base."""

import math

import pytest

from hub_moe.errors import PatchError
from hub_moe.patches import Base, apply_patch, diff_patches, hash_base, make_patch, measure_changes
from tests.anatomy.families import FAMILIES

from .patching import BASE, COMMIT, build_model, last_layers, names_of, patch_experts, train_patch


def scaled_patch(model, names, factor, *, base=BASE):
    """A patch that multiplies tensors, so that sizes and directions of its changes are known."""
    from hub_moe.anatomy import find_moe_layers
    from hub_moe.patches.expert_patch import find_touched

    tensors = {name: factor * tensor for name, tensor in find_touched(model, find_moe_layers(model), names).items()}
    return make_patch(tensors, model_before=hash_base(model, names), base=base)


def test_experts_are_told_apart_by_who_changes_them():
    model = build_model()
    difference = diff_patches(patch_experts(model, {1: [0, 1]}), patch_experts(model, {1: [1], 2: [4]}, seed=2))
    assert [(row.layer, row.expert, row.found_in) for row in difference.rows] == [
        (1, 0, "first"),
        (1, 1, "both"),
        (2, 4, "second"),
    ]
    assert [difference.count(place) for place in ("both", "first", "second")] == [1, 1, 1]
    assert difference.has_same_base is True
    assert all(row.change is row.cosine is row.distance is None for row in difference.rows)


def test_a_patch_is_equal_to_itself_and_to_none_of_another_seed():
    model = build_model()
    patch = patch_experts(model, {1: [0], 2: [1]})
    assert all(row.is_equal for row in diff_patches(patch, patch).rows)
    assert not any(row.is_equal for row in diff_patches(patch, patch_experts(model, {1: [0], 2: [1]}, seed=2)).rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_directions_of_changes_are_exact(tmp_path, family):
    model = build_model(family)
    model.save_pretrained(tmp_path)
    names = names_of(model, {last_layers(model)[0]: [3]})
    larger, smaller = scaled_patch(model, names, 1.5), scaled_patch(model, names, 0.75)
    (row,) = diff_patches(larger, smaller, base=tmp_path).rows
    assert row.change == pytest.approx(0.5)
    assert row.other_change == pytest.approx(0.25)
    assert row.cosine == pytest.approx(-1)
    assert row.distance == pytest.approx(1.5)  # (1.5 - 0.75) / 0.5


def test_a_change_of_nothing_has_no_direction(tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    names = names_of(model, {1: [3]})
    (row,) = diff_patches(scaled_patch(model, names, 1.0), scaled_patch(model, names, 1.0), base=tmp_path).rows
    assert (row.change, row.cosine, row.distance, row.is_equal) == (0.0, None, 0.0, True)


def test_a_change_of_a_tensor_of_zeros_is_infinitely_large(tmp_path):
    model = build_model()
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.model.layers[1].mlp.gate.e_score_correction_bias.zero_()
    model.save_pretrained(tmp_path)
    (change,) = measure_changes(train_patch(model, [name]), tmp_path)
    assert (change.kind, change.layer, change.expert, change.change) == ("balancing_bias", None, None, math.inf)


def test_parts_beside_experts_are_compared_as_a_whole(tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    first = train_patch(model, ["model.layers.1.mlp.shared_experts.up_proj.weight"])
    second = train_patch(model, [f"model.layers.{layer}.mlp.shared_experts.up_proj.weight" for layer in (1, 2)], seed=2)
    (row,) = diff_patches(first, second, base=tmp_path).rows
    assert (row.kind, row.layer, row.found_in, row.is_equal) == ("shared_experts", None, "both", False)
    assert 0.5 < row.distance < 2


def test_patches_for_different_bases_are_told_apart_by_their_hashes():
    ours = patch_experts(build_model(), {1: [0]})
    assert diff_patches(ours, patch_experts(build_model(seed=5), {1: [0]})).has_same_base is False
    moved = patch_experts(build_model(), {1: [0]}, base=Base("bob/copy", COMMIT, "hub_moe"))
    assert diff_patches(ours, moved).has_same_base is True
    disjoint = patch_experts(build_model(), {1: [1]}, base=Base("bob/copy", COMMIT, "hub_moe"))
    assert diff_patches(ours, disjoint).has_same_base is None


def test_a_base_that_is_not_the_patchs_is_refused(tmp_path):
    build_model(seed=5).save_pretrained(tmp_path)
    with pytest.raises(PatchError, match="is not the base of a patch for alice/base"):
        measure_changes(patch_experts(build_model(), {1: [0]}), tmp_path)


def test_a_patch_on_top_of_another_is_measured_against_what_it_was_made_for(tmp_path):
    model = build_model()
    apply_patch(model, patch_experts(model, {1: [0]}))
    model.save_pretrained(tmp_path)
    (change,) = measure_changes(scaled_patch(model, names_of(model, {1: [0]}), 2.0), tmp_path)
    assert change.change == pytest.approx(1.0)
