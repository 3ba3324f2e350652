"""A combined patch names those it was made of, in its metadata and on its card."""

import json
from dataclasses import replace

import pytest

from hub_moe.anatomy.expert_tensors import hash_tensor
from hub_moe.errors import CheckpointError, PatchError
from hub_moe.patches import CombinationMethod, ExpertPatch, PatchMetadata, combine_patches
from hub_moe.patches.combining import _name_patches
from hub_moe.patches.expert_patch import hash_casts
from hub_moe.patches.folders import Origin
from hub_moe.patches.metadata import Combination, Contributor

from .patching import BASE, COMMIT, all_tensors, build_model, named, patch_experts


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def test_the_metadata_credits_every_contributor_and_survives_the_disk(model, base, tmp_path):
    patch_experts(model, {1: [0]}).save(tmp_path / "law" / "patch")
    patch_experts(model, {1: [0, 1]}, seed=2).save(tmp_path / "tax" / "patch")
    law, tax = (ExpertPatch.load(tmp_path / name / "patch") for name in ("law", "tax"))
    how = CombinationMethod("dare", weights=(2.0, 1.0), density=0.75, seed=5)
    combined = combine_patches([law, tax], base=base, method=how).patch
    written = combined.save(tmp_path / "both")
    assert PatchMetadata.read(tmp_path / "both") == written
    assert written.combination == Combination(
        "dare",
        (
            Contributor("law/patch", None, law.metadata.weights_sha256, 2.0),
            Contributor("tax/patch", None, tax.metadata.weights_sha256, 1.0),
        ),
        density=0.75,
        seed=5,
    )
    assert written.base == BASE
    for name, record in written.tensors.items():
        assert record.after == hash_tensor(combined.tensors[name])
        assert record.before == hash_casts(all_tensors(model)[name])
    card = (tmp_path / "both" / "README.md").read_text()
    assert "Combined from these patches by `dare`, density 0.75, seed 5:" in card
    assert f"| `law/patch` | a folder | 2 | `{law.metadata.weights_sha256}` |" in card
    assert str(tmp_path) not in card + (tmp_path / "both" / "expert_patch.json").read_text()


def test_an_unsaved_patch_is_credited_with_the_hash_that_saving_it_gives(model, base, tmp_path):
    patches = [patch_experts(model, {1: [0]}), patch_experts(model, {1: [1]})]
    combination = combine_patches(patches, base=base).patch.metadata.combination
    hashes_on_disk = [patch.save(tmp_path / str(i)).weights_sha256 for i, patch in enumerate(patches)]
    assert [each.weights_sha256 for each in combination.contributors] == hashes_on_disk
    assert [each.name for each in combination.contributors] == ["patch 1", "patch 2"]


def test_combined_patches_can_be_combined_again_and_all_contributors_stay(model, base, tmp_path):
    parts = [named(patch_experts(model, {1: [expert]}), f"p{expert}") for expert in range(3)]
    parts = [replace(part, metadata=part.save(tmp_path / str(i))) for i, part in enumerate(parts)]
    inner = combine_patches(parts[:2], base=base).patch
    outer = combine_patches([replace(inner, origin=Origin("runs/inner")), parts[2]], base=base).patch
    outer.save(tmp_path / "outer")
    names = [each.name for each in PatchMetadata.read(tmp_path / "outer").combination.all_contributors()]
    assert names == ["inner", "p2", "p0", "p1"]
    assert "| ↳ `p0` |" in (tmp_path / "outer" / "README.md").read_text()
    with pytest.raises(PatchError, match=r"p0 and outer hold the same patch, which would count twice"):
        combine_patches([parts[0], named(outer, "outer")], base=base)


def test_patches_are_told_apart_by_as_little_of_their_path_as_will_do(model):
    patch = patch_experts(model, {1: [0]})

    def names(*origins):
        return _name_patches([replace(patch, origin=origin) for origin in origins])

    assert names(Origin("runs/law"), Origin("runs/tax")) == ["law", "tax"]
    assert names(Origin("runs/law/patch"), Origin("runs/tax/patch"), None) == ["law/patch", "tax/patch", "patch 3"]
    assert names(Origin("alice/law", COMMIT), Origin("bob/law", COMMIT)) == ["alice/law", "bob/law"]
    assert names(Origin("alice/law", COMMIT), Origin("alice/law", "f" * 40)) == [
        f"alice/law@{COMMIT}",
        f"alice/law@{'f' * 40}",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(contributors=c["contributors"][:1]), "has 1 contributors; expected two or more"),
        (lambda c: c.update(colour="red"), "has the field 'colour'"),
        (lambda c: c["contributors"][0].update(revision="main"), "a commit of 40 hexadecimal digits or null"),
        (lambda c: c["contributors"][0].update(weights_sha256="x"), "is no sha256"),
        (lambda c: c["contributors"].append("alice/law"), "must hold a JSON object"),
        (
            lambda c: [
                c.update(contributors=[{**c["contributors"][0], "combination": dict(c)}] * 2) for _ in range(20)
            ],
            "deep",
        ),
    ],
)
def test_damage_in_the_list_of_contributors_is_named(model, base, tmp_path, change, message):
    combined = combine_patches([patch_experts(model, {1: [0]}), patch_experts(model, {1: [1]})], base=base).patch
    combined.save(tmp_path / "both")
    fields = combined.metadata.to_dict() | {"weights": {"file": "expert_patch.safetensors", "sha256": "a" * 64}}
    fields = json.loads(json.dumps(fields))
    change(fields["combination"])
    with pytest.raises(CheckpointError, match=message):
        PatchMetadata.from_dict(fields, source="expert_patch.json")


def test_a_patch_that_was_not_combined_is_written_as_before(model):
    fields = patch_experts(model, {1: [0]}).metadata.to_dict()
    assert fields.keys().isdisjoint({"combination", "rebased_from"})
