"""A patch for an older commit of its base moves to a newer one, if nothing that it changes changed there."""

import json

import pytest
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from hub_moe.errors import CheckpointError, ConflictError, PatchError
from hub_moe.patches import Base, ExpertPatch, PatchMetadata, apply_patch, merge_into_base, rebase_patch
from hub_moe.patches.base_files import find_shards
from tests.anatomy.families import FAMILIES

from .patching import BASE, build_model, hashes, last_layers, names_of, patch_experts, train_patch


def move_on(model, chosen, names=()):
    """Change other experts, or tensors by name, as a later commit of the base would."""
    for changed in filter(None, (names_of(model, chosen), names)):
        apply_patch(model, train_patch(model, changed, seed=9))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_is_moved_to_a_base_that_changed_elsewhere(tmp_path, family):
    model = build_model(family)
    first, second = last_layers(model)
    patch = patch_experts(model, {first: [0], second: [3]}, base=Base("alice/base", BASE.commit, family))
    move_on(model, {first: [1], second: [0, 7]}).save_pretrained(tmp_path / "newer")
    rebased = rebase_patch(patch, tmp_path / "newer")
    assert rebased.metadata.base == Base(str(tmp_path / "newer"), None, family)
    assert rebased.metadata.rebased_from == (patch.metadata.base,)
    assert rebased.metadata.tensors == patch.metadata.tensors
    rebased.save(tmp_path / "patch")
    assert PatchMetadata.read(tmp_path / "patch").rebased_from == (patch.metadata.base,)
    assert "Made for `alice/base` at commit" in (tmp_path / "patch" / "README.md").read_text()
    merge_into_base(tmp_path / "patch", tmp_path / "merged")
    apply_patch(model, rebased)
    assert hashes(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == hashes(model)


def test_a_base_that_changed_what_the_patch_changes_is_refused_with_the_list(tmp_path):
    model = build_model()
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    patch = train_patch(model, [*names_of(model, {1: [0, 2], 2: [3]}), bias])
    move_on(model, {1: [2], 2: [0, 3]}, [bias, "lm_head.weight"]).save_pretrained(tmp_path)
    with pytest.raises(ConflictError) as caught:
        rebase_patch(patch, tmp_path)
    assert "expert 2 of layer 1, expert 3 of layer 2, the balancing bias of layer 1 (7 of 10 tensors;" in str(
        caught.value
    )
    assert set(caught.value.tensors) == {*names_of(model, {1: [2], 2: [3]}), bias}


def test_a_tensor_that_the_newer_base_lacks_is_in_the_list(tmp_path):
    model = build_model()
    patch = patch_experts(model, {1: [7]})
    build_model(n_routed_experts=4).save_pretrained(tmp_path)
    with pytest.raises(ConflictError, match=r"expert 7 of layer 1 .* is not in its files"):
        rebase_patch(patch, tmp_path)


def test_another_kind_of_model_is_refused(tmp_path):
    build_model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(PatchError, match="is a 'mixtral', and the patch is for a 'hub_moe'"):
        rebase_patch(patch_experts(build_model(), {1: [0]}), tmp_path)


def test_a_patch_as_new_base_is_refused(tmp_path):
    patch = patch_experts(build_model(), {1: [0]})
    patch.save(tmp_path / "patch")
    with pytest.raises(CheckpointError, match="is itself an expert patch; merge that one into its base first"):
        rebase_patch(patch, tmp_path / "patch")


def test_rebasing_again_keeps_the_whole_history_and_to_the_same_base_nothing(tmp_path):
    model = build_model()
    patch = patch_experts(model, {1: [0]})
    model.save_pretrained(tmp_path / "a")
    move_on(model, {1: [1]}).save_pretrained(tmp_path / "b")
    once = rebase_patch(patch, tmp_path / "a")
    twice = rebase_patch(once, tmp_path / "b")
    assert once.metadata.base.repo == str(tmp_path / "a")
    assert twice.metadata.rebased_from == (patch.metadata.base, Base("a", None, "hub_moe"))
    assert rebase_patch(twice, tmp_path / "b") is twice


@pytest.mark.parametrize(
    ("entry", "message"),
    [("alice/base", "must hold a JSON object"), ({"repo": "a/b", "commit": "main", "model_type": "x"}, "hexadecimal")],
)
def test_damage_in_the_history_is_named(entry, message):
    fields = patch_experts(build_model(), {1: [0]}).metadata.to_dict()
    fields |= {"weights": {"file": "expert_patch.safetensors", "sha256": "a" * 64}, "rebased_from": [entry]}
    with pytest.raises(CheckpointError, match=message):
        PatchMetadata.from_dict(json.loads(json.dumps(fields)), source="expert_patch.json")


def test_shards_are_found_by_name_by_stack_or_by_layer(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    names = {"model.layers.1.mlp.experts.5.up_proj.weight": "a", "model.layers.2.mlp.experts.gate_up_proj": "b"}
    index.write_text(
        json.dumps({"weight_map": {**names, "model.layers.3.mlp.w1": "c", "model.layers.3.norm": "d", "x": "e"}})
    )
    assert find_shards(tmp_path, ["model.layers.1.mlp.experts.5.up_proj.weight"]) == ["a"]
    assert find_shards(tmp_path, ["model.layers.2.mlp.experts.0.up_proj.weight"]) == ["b"]
    assert find_shards(tmp_path, ["model.layers.3.mlp.experts.0.up_proj.weight"]) == ["c", "d"]
    assert find_shards(tmp_path, ["lm_head.weight"]) == ["a", "b", "c", "d", "e"]
    index.write_text('{"weight_map": {"x": "../../etc/passwd"}}')
    with pytest.raises(CheckpointError, match="lacks ../../etc/passwd"):
        find_shards(tmp_path, ["x"])
    index.unlink()
    assert find_shards(tmp_path, ["x"]) == ["model.safetensors"]


REBASE_AND_COMBINE = """
import json, os
from pathlib import Path
from hub_moe.patches import ExpertPatch, combine_patches, rebase_patch
repo, folder = "alice/rebase-base", Path({folder!r})
first = rebase_patch(ExpertPatch.load(folder / "old"), repo)
second = rebase_patch(ExpertPatch.load(repo, subfolder="patches/new"), repo + "@main")
combined = combine_patches([first, second], base=repo).patch
combined.save(folder / "both")
cache = Path(os.environ["HF_HOME"]) / "hub" / "models--alice--rebase-base" / "snapshots"
files = sorted({{path.name for path in cache.rglob("model*.safetensors")}})
print(json.dumps({{"files": files, "commit": combined.metadata.base.commit}}))
"""


def test_of_a_repo_only_the_shards_with_the_patches_tensors_are_fetched(hub, tmp_path):
    api = HfApi(endpoint=hub.url, token=hub.tokens["alice"])
    api.create_repo("alice/rebase-base")
    model = build_model()
    model.save_pretrained(tmp_path / "first", max_shard_size="20KB")
    old = api.upload_folder(repo_id="alice/rebase-base", folder_path=tmp_path / "first").oid
    patch_experts(model, {1: [0]}, base=Base("alice/rebase-base", old, "hub_moe")).save(tmp_path / "old")
    move_on(model, {2: [0]}, ["lm_head.weight"]).save_pretrained(tmp_path / "second", max_shard_size="20KB")
    new = api.upload_folder(repo_id="alice/rebase-base", folder_path=tmp_path / "second").oid
    base = Base("alice/rebase-base", new, "hub_moe")
    patch_experts(model, {1: [1]}, base=base, seed=2).save(tmp_path / "new")
    tip = api.upload_folder(repo_id="alice/rebase-base", folder_path=tmp_path / "new", path_in_repo="patches/new").oid
    done = json.loads(hub.run_python(REBASE_AND_COMBINE.format(folder=str(tmp_path))))
    index = json.loads((tmp_path / "second" / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = {index[name] for name in names_of(model, {1: [0, 1]})}
    assert set(done["files"]) == wanted < set(index.values())
    assert done["commit"] == tip
    both = ExpertPatch.load(tmp_path / "both")
    credited = [(each.name, each.revision) for each in both.metadata.combination.contributors]
    assert credited == [("old", None), ("alice/rebase-base/patches/new", tip)]
    apply_patch(model, both)
