"""Several patches of one base in one: exact where they are disjoint, by a named method where they are not."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hub_moe.anatomy.expert_tensors import hash_tensor
from hub_moe.errors import CheckpointError, ConfigError, ConflictError, PatchError
from hub_moe.patches import (
    Base,
    CombinationMethod,
    apply_patch,
    combine_patches,
    find_conflicts,
    hash_base,
    make_patch,
)

from .patching import (
    BASE,
    all_tensors,
    build_model,
    hashes,
    last_layers,
    logits_of,
    named,
    names_of,
    patch_experts,
    train_patch,
)

MEAN = CombinationMethod("mean")
ROUTER = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["hub_moe", "qwen3_moe", "gpt_oss"])
def test_a_model_with_the_combined_patch_is_the_model_with_all_tensors_put_in(tmp_path, family):
    model = build_model(family)
    model.save_pretrained(tmp_path)
    first, second = last_layers(model)
    ours = patch_experts(model, {first: [0, 7], second: [3]})
    theirs = patch_experts(model, {first: [2], second: [4, 5]}, seed=2)
    combined = combine_patches([ours, theirs], base=tmp_path).patch
    expected = {name: tensor for patch in (ours, theirs) for name, tensor in patch.tensors.items()}
    assert {n: hash_tensor(x) for n, x in combined.tensors.items()} == {n: hash_tensor(x) for n, x in expected.items()}
    by_hand, patched = build_model(family), build_model(family)
    apply_patch(by_hand, ours)
    apply_patch(by_hand, theirs)
    apply_patch(patched, combined)
    assert hashes(patched) == hashes(by_hand)
    assert torch.equal(logits_of(patched), logits_of(by_hand))
    assert not torch.equal(logits_of(patched), logits_of(model))


@pytest.mark.parametrize("family", ["hub_moe", "qwen3_moe", "gpt_oss"])
def test_overlapping_experts_are_the_mean_of_what_was_trained(tmp_path, family):
    model = build_model(family)
    model.save_pretrained(tmp_path)
    (layer,) = last_layers(model, 1)
    patches = [patch_experts(model, {layer: [1, 2]}), patch_experts(model, {layer: [2, 3]}, seed=2)]
    combined = combine_patches(patches, base=tmp_path, method=CombinationMethod("mean", weights=(3, 1))).patch
    by_hand = build_model(family)
    names = {expert: names_of(model, {layer: [expert]}) for expert in (1, 2, 3)}
    tensors = {name: patches[0].tensors[name] for name in names[1]}
    tensors |= {name: 0.75 * patches[0].tensors[name] + 0.25 * patches[1].tensors[name] for name in names[2]}
    tensors |= {name: patches[1].tensors[name] for name in names[3]}
    apply_patch(by_hand, make_patch(tensors, model_before=hash_base(model, tensors), base=BASE))
    apply_patch(model, combined)
    torch.testing.assert_close(logits_of(model), logits_of(by_hand))


def test_disjoint_other_parts_are_exact_too(model, base):
    experts, head = patch_experts(model, {1: [0]}), train_patch(model, ["lm_head.weight", BIAS], seed=2)
    combined = combine_patches([experts, head], base=base).patch
    assert combined.metadata.non_expert_modules
    assert combined.metadata.balancing_bias
    assert not combined.metadata.shared_experts
    assert {name: record.after for name, record in combined.metadata.tensors.items()} == {
        name: record.after for patch in (experts, head) for name, record in patch.metadata.tensors.items()
    }


def test_conflicts_are_refused_and_every_one_is_named_with_who(model, base):
    law = named(patch_experts(model, {1: [0, 7], 2: [3]}), "law")
    tax = named(patch_experts(model, {1: [7], 2: [3, 4]}, seed=2), "tax")
    bias = [named(train_patch(model, [BIAS], seed=seed), f"bias{seed}") for seed in (3, 4)]
    with pytest.raises(ConflictError) as caught:
        combine_patches([law, tax, *bias], base=base)
    text = str(caught.value)
    assert "law and tax change expert 7 of layer 1, expert 3 of layer 2;" in text
    assert "bias3 and bias4 change the balancing bias of layer 1;" in text
    assert set(caught.value.tensors) == {*names_of(model, {1: [7], 2: [3]}), BIAS}


def test_what_all_have_the_same_or_only_one_changed_is_no_conflict(model, base):
    """As in a three-way merge: who left the base's bytes makes no claim on a tensor."""
    ours = patch_experts(model, {1: [0], 2: [3]})
    names = names_of(model, {1: [0], 2: [3]})
    mixed = {name: ours.tensors[name] if ".1.mlp" in name else all_tensors(model)[name] for name in names}
    theirs = make_patch(mixed, model_before=hash_base(model, names), base=BASE)
    combined = combine_patches([theirs, ours], base=base)
    assert {name: hash_tensor(tensor) for name, tensor in combined.patch.tensors.items()} == {
        name: record.after for name, record in ours.metadata.tensors.items()
    }
    assert [row.outcomes for row in combined.table.units] == [("equal",), ("one changed",)]
    assert combined.table.conflicts == ()


@pytest.mark.parametrize("method", ["mean", "ties", "dare", "dare_ties", "slerp"])
def test_the_order_of_the_patches_changes_no_bit(model, base, method):
    patches = [patch_experts(model, {1: [0, 1]}, seed=1), patch_experts(model, {1: [0, 2]}, seed=2)]
    if method != "slerp":
        patches.append(patch_experts(model, {1: [0]}, seed=3))
    weights = (1.0, 2.0, 0.5)[: len(patches)]
    there = combine_patches(patches, base=base, method=CombinationMethod(method, weights=weights))
    back = combine_patches(patches[::-1], base=base, method=CombinationMethod(method, weights=weights[::-1]))
    assert there.patch.metadata.tensors == back.patch.metadata.tensors
    again = combine_patches(patches, base=base, method=CombinationMethod(method, weights=weights))
    assert there.patch.metadata.tensors == again.patch.metadata.tensors


def test_dare_drops_other_numbers_of_each_patch_and_tensor(model, base):
    before = all_tensors(model)
    names = names_of(model, {1: [0]})
    patches = [
        make_patch({n: before[n] + size for n in names}, model_before=hash_base(model, names), base=BASE)
        for size in (1.0, 1.5)
    ]
    combined = combine_patches(patches, base=base, method=CombinationMethod("dare", density=0.5)).patch
    gate, up = ((combined.tensors[n] - before[n]).mul(2).round() for n in names if "down" not in n)
    assert set(gate.unique().tolist()) == {0.0, 2.0, 3.0, 5.0}  # neither, the first, the second, both
    assert not torch.equal(gate, up)


def test_ties_on_a_bfloat16_base_is_computed_in_float32_and_rounded_once(tmp_path):
    model = build_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    patches = [patch_experts(model, {1: [0]}, seed=seed) for seed in (1, 2)]
    combined = combine_patches(patches, base=tmp_path, method=CombinationMethod("ties", density=0.5)).patch
    name = names_of(model, {1: [0]})[0]
    before = all_tensors(model)[name].float().numpy()
    deltas = [patch.tensors[name].float().numpy() - before for patch in patches]
    for delta in deltas:
        delta[np.abs(delta) < np.sort(np.abs(delta), axis=None)[delta.size - delta.size // 2]] = 0
    stacked = np.stack(deltas)
    agrees = np.sign(stacked) == np.sign(stacked.sum(0))
    count = np.maximum((agrees & (stacked != 0)).sum(0), 1)
    expected = torch.from_numpy(before + np.where(agrees, stacked, 0).sum(0) / count).bfloat16()
    assert combined.tensors[name].dtype == torch.bfloat16
    torch.testing.assert_close(combined.tensors[name], expected)


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "slerp"])
@pytest.mark.parametrize("name", [ROUTER, BIAS])
def test_routers_and_balancing_bias_are_averaged_by_every_method(model, base, method, name):
    patches = [train_patch(model, [name], seed=seed) for seed in (1, 2)]
    combined = combine_patches(patches, base=base, method=CombinationMethod(method))
    expected = (patches[0].tensors[name] + patches[1].tensors[name]) / 2
    torch.testing.assert_close(combined.patch.tensors[name], expected)
    assert combined.table.tensors[0].outcomes == ("mean",)
    assert combined.table.tensors[0].kind == ("router" if name == ROUTER else "balancing_bias")


def test_a_router_that_one_changes_where_another_changes_experts_is_noted(model, base):
    law, tax = named(train_patch(model, [ROUTER, BIAS]), "law"), named(patch_experts(model, {1: [0], 2: [0]}), "tax")
    table = combine_patches([law, tax], base=base).table
    assert table.units == ()
    assert table.notes == (
        "law changes the balancing bias and router of layer 1, where tax changes experts: these will see other tokens "
        "than they were trained on.",
    )


def test_the_table_has_cosine_signs_norms_and_outcome_of_each_expert_and_tensor(model, base):
    ours, theirs = (patch_experts(model, {1: [4], 2: [2]}, seed=seed) for seed in (1, 2))
    table = find_conflicts([ours, theirs], base=base, method=CombinationMethod("ties"))
    assert [(row.layer, row.expert, row.tensor, row.outcomes) for row in table.units] == [
        (1, 4, None, ("ties",)),
        (2, 2, None, ("ties",)),
    ]
    assert len(table.tensors) == len(table.conflicts) == 6
    before = all_tensors(model)
    deltas = [
        np.concatenate([(patch.tensors[n] - before[n]).numpy().ravel() for n in names_of(model, {1: [4]})])
        for patch in (ours, theirs)
    ]
    size = np.sqrt(sum(float(before[n].double().square().sum()) for n in names_of(model, {1: [4]})))
    (row, _), (pair,) = table.units, table.units[0].agreements
    assert row.norms == pytest.approx([np.linalg.norm(delta) for delta in deltas], rel=1e-5)
    assert row.changes == pytest.approx([np.linalg.norm(delta) / size for delta in deltas], rel=1e-5)
    assert pair.cosine == pytest.approx(np.dot(*deltas) / np.prod([np.linalg.norm(d) for d in deltas]), abs=1e-6)
    assert pair.sign_agreement == pytest.approx(np.mean(np.sign(deltas[0]) == np.sign(deltas[1])))
    json.dumps(table.to_dict(), allow_nan=False)


def test_one_patch_or_the_same_twice_is_refused(model, base):
    patch = patch_experts(model, {1: [0]})
    with pytest.raises(PatchError, match="takes two patches or more, and 1 was given"):
        combine_patches([patch], base=base)
    with pytest.raises(PatchError, match="a and b are the same patch; give each once"):
        combine_patches([named(patch, "a"), named(patch, "b")], base=base)


def test_patches_of_another_base_are_refused(model, base):
    ours = patch_experts(model, {1: [0]})
    moved = Base("alice/base", "f" * 40, "hub_moe")
    with pytest.raises(
        PatchError, match=r"for different bases: patch 1 for .*0123.*, patch 2 for .*ffff.*; rebase one"
    ):
        combine_patches([ours, patch_experts(model, {1: [1]}, base=moved)], base=base)
    other = patch_experts(build_model(seed=5), {1: [1]})
    with pytest.raises(PatchError, match=r"is not the base of patch 2, .*: tensor 'model.layers.1.*' has other values"):
        combine_patches([ours, other], base=base)


def test_folders_of_one_base_may_be_called_differently(model, base):
    patches = [
        patch_experts(model, {1: [0]}, base=Base("runs/base", None, "hub_moe")),
        patch_experts(model, {1: [1]}, base=Base("copy", None, "hub_moe")),
    ]
    assert combine_patches(patches, base=base).patch.metadata.base.repo == "runs/base"


def test_shapes_and_dtypes_that_differ_are_refused(model, base):
    ours, theirs = patch_experts(model, {1: [0]}), patch_experts(model, {1: [0]}, seed=2)
    low = make_patch(
        {name: tensor.bfloat16() for name, tensor in theirs.tensors.items()},
        model_before={name: record.before for name, record in theirs.metadata.tensors.items()},
        base=BASE,
    )
    with pytest.raises(PatchError, match=r"is float32 of shape .* in patch 1 and bfloat16 of shape .* in patch 2"):
        combine_patches([ours, low], base=base, method=MEAN)
    other = patch_experts(build_model(moe_intermediate_size=24), {1: [0]})
    with pytest.raises(PatchError, match="is not the base of patch 2"):
        combine_patches([ours, other], base=base, method=MEAN)


def test_tensors_that_are_not_what_the_metadata_says_are_refused(model, base):
    ours, theirs = patch_experts(model, {1: [0]}), patch_experts(model, {1: [1]})
    name = next(iter(theirs.tensors))
    for tensor, message in (
        (torch.full_like(theirs.tensors[name], torch.nan), "NaN"),
        (ours.tensors[names_of(model, {1: [0]})[0]], "another sha256"),
    ):
        broken = replace(theirs, tensors={**theirs.tensors, name: tensor.reshape(theirs.tensors[name].shape)})
        with pytest.raises(CheckpointError, match=message):
            combine_patches([ours, broken], base=base)
    with pytest.raises(CheckpointError, match="holds other tensors than its metadata lists"):
        combine_patches([ours, replace(theirs, tensors={})], base=base)


def test_patches_of_different_tensors_of_one_layers_experts_are_refused(model, base):
    part = train_patch(model, ["model.layers.1.mlp.experts.0.up_proj.weight"])
    with pytest.raises(PatchError, match="different tensors of the experts of one layer"):
        combine_patches([part, patch_experts(model, {1: [1]})], base=base)


def test_a_result_that_overflows_is_refused(tmp_path):
    model = build_model(dtype=torch.float16)
    model.save_pretrained(tmp_path)
    names = names_of(model, {1: [0]})
    patches = [
        make_patch(
            {name: torch.full_like(all_tensors(model)[name], size) for name in names},
            model_before=hash_base(model, names),
            base=BASE,
        )
        for size in (60000.0, 61000.0)
    ]
    with pytest.raises(PatchError, match=r"combined by dare, does not fit into torch.float16: it overflows"):
        combine_patches(patches, base=tmp_path, method=CombinationMethod("dare", density=0.25))


def test_slerp_of_three_is_refused(model, base):
    patches = [patch_experts(model, {1: [0]}, seed=seed) for seed in range(3)]
    with pytest.raises(ConfigError, match="slerp is between two patches, and 3 were given"):
        combine_patches(patches, base=base, method=CombinationMethod("slerp"))


def test_a_base_that_is_truncated_is_named(model, base, tmp_path):
    patches = [patch_experts(model, {1: [0]}), patch_experts(model, {1: [1]})]
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="is truncated"):
        combine_patches(patches, base=tmp_path)
