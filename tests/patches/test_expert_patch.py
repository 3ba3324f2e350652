"""The format: written whole, read back with every hash checked, and every kind of damage named."""

import json
import os
import struct
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hub_moe.errors import CheckpointError, PatchError
from hub_moe.patches import Base, ExpertPatch, PatchMetadata, Selection, hash_base, make_patch
from hub_moe.patches.tensor_file import hash_file

from .patching import BASE, COMMIT, build_model, names_of, patch_experts, train_patch

METADATA, WEIGHTS = "expert_patch.json", "expert_patch.safetensors"
NAME = "model.layers.1.mlp.experts.4.up_proj.weight"


@pytest.fixture(scope="module")
def patch():
    model = build_model()
    selection = Selection("esft", score="token", top_p=0.2, profile_sha256="a" * 64)
    training = {"method": "experts", "steps": 3, "loss": {"before": 2.5, "after": 2.25}}
    return patch_experts(model, {1: [4, 0], 2: [3]}, selection=selection, training=training)


@pytest.fixture
def folder(patch, tmp_path):
    patch.save(tmp_path / "patch")
    return tmp_path / "patch"


def edit_metadata(folder, change):
    fields = json.loads((folder / METADATA).read_text())
    change(fields)
    (folder / METADATA).write_text(json.dumps(fields))


def rewrite_weights(folder, change, *, update_hash=True):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    if update_hash:
        edit_metadata(folder, lambda fields: fields["weights"].update(sha256=hash_file(folder / WEIGHTS)))


def refuse(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        ExpertPatch.load(folder)
    assert "\n" not in str(caught.value)


def test_what_is_saved_is_loaded_again(patch, folder):
    loaded = ExpertPatch.load(folder)
    assert replace(loaded.metadata, weights_sha256=None) == patch.metadata
    assert loaded.tensors.keys() == patch.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in patch.tensors.items())


def test_metadata_of_before_there_was_a_share_is_read(patch, folder):
    edit_metadata(folder, lambda fields: fields["selection"].pop("share"))
    assert ExpertPatch.load(folder).metadata.selection == patch.metadata.selection


def test_the_metadata_says_what_is_changed_in_which_base_and_how_it_was_chosen(folder):
    fields = json.loads((folder / METADATA).read_text())
    assert fields["format_version"] == 1
    assert fields["base"] == {"repo": "alice/base", "commit": COMMIT, "model_type": "hub_moe"}
    assert fields["experts"] == {"1": [0, 4], "2": [3]}
    chosen_by = {"method": "esft", "score": "token", "top_p": 0.2, "share": None, "profile_sha256": "a" * 64}
    assert fields["selection"] == chosen_by
    assert fields["training"]["method"] == "experts"
    assert (fields["shared_experts"], fields["non_expert_modules"], fields["balancing_bias"]) == (False, False, False)
    record = fields["tensors"][NAME]
    assert (record["shape"], record["dtype"]) == ([16, 32], "float32")
    assert sorted(record["before"]) == ["bfloat16", "float16", "float32"]
    assert fields["weights"] == {"file": WEIGHTS, "sha256": hash_file(folder / WEIGHTS)}


def test_the_weights_are_a_plain_safetensors_file_of_per_expert_names(folder, patch):
    assert set(load_file(folder / WEIGHTS)) == set(patch.tensors)
    assert len(patch.tensors) == 9


def test_metadata_can_be_read_without_the_weights(folder):
    (folder / WEIGHTS).unlink()
    assert PatchMetadata.read(folder).num_experts == 3
    refuse(folder, f"lacks {WEIGHTS}")


def test_metadata_is_read_without_torch(folder):
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from hub_moe.patches.metadata import PatchMetadata; "
        f"print(PatchMetadata.read(Path({str(folder)!r})).method, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["experts", "False"]


def test_the_card_has_the_front_matter_by_which_the_hub_finds_the_base(folder):
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "alice/base",
        "base_model_relation": "adapter",
        "library_name": "hub_moe",
        "pipeline_tag": "text-generation",
        "tags": ["expert-patch", "mixture-of-experts"],
    }
    assert "3 routed experts in 2 layers" in text
    assert "| 1 | 0, 4 |" in text


def test_a_card_of_a_base_in_a_folder_says_nothing_of_where_it_lies(patch):
    from hub_moe.patches.card import render_card

    text = render_card(replace(patch.metadata, base=Base("secret/alice/base", None, "hub_moe")))
    assert "the base `base` (a folder, whose commit is not known)" in text
    assert "alice" not in text
    assert "base_model" not in text


def test_a_card_of_a_hostile_base_name_stays_a_card():
    base = Base('x"\n---\n# `<script>', COMMIT, "hub_moe")
    from hub_moe.patches.card import render_card

    text = render_card(patch_experts(build_model(), {1: [0]}, base=base).metadata)
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == base.repo
    assert "\n# `" not in text


def test_the_tokenizer_lies_beside_the_patch(patch, tmp_path, tiny_tokenizer):
    from transformers import AutoTokenizer

    patch.save(tmp_path / "patch", tokenizer=tiny_tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "patch")("expert").input_ids == tiny_tokenizer("expert").input_ids


def test_a_folder_that_is_not_empty_is_not_written_to(patch, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        patch.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_is_not_a_folder(patch, tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "patch"):
        with pytest.raises(CheckpointError, match="in, a file"):
            patch.save(target)


def test_an_empty_folder_is_filled(patch, tmp_path):
    patch.save(tmp_path / "empty")
    (tmp_path / "again").mkdir()
    patch.save(tmp_path / "again")
    assert ExpertPatch.load(tmp_path / "again").metadata == ExpertPatch.load(tmp_path / "empty").metadata


def test_a_save_that_fails_leaves_nothing(patch, tmp_path):
    class NoRoom:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        patch.save(tmp_path / "patch", tokenizer=NoRoom())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 7, 100, -1, -4000])
def test_a_truncated_file_is_refused(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    refuse(folder, "is truncated")


def test_a_file_cut_in_its_data_names_the_tensor(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-4])
    refuse(folder, r"is truncated: it ends at [\d,]+ bytes, in tensor 'model\.layers\.\d")


def test_a_file_with_something_behind_the_tensors_is_refused(folder):
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")
    refuse(folder, "is too long")


def test_an_absurd_header_size_is_refused_without_reading_it(folder):
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(struct.pack("<Q", 2**62))
    refuse(folder, "is truncated or no safetensors file: .* a header of 4,611,686,018,427,387,904")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": 1}', "entry for tensor 'a' lacks dtype"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "no sound dtype, shape or offsets"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}', r"'a' of shape \[3\] does not fill 4 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "'a' overlaps another or leaves a gap"),
        (b'{"a": {}, "a": {}}', "stands in it twice"),
        (b"[]", "is no JSON object"),
        (b"[" * 5000, "header is not sound JSON"),
    ],
)
def test_a_forged_header_is_refused(folder, header, message):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    refuse(folder, message)


def test_a_pickle_is_no_patch(folder):
    torch.save({NAME: torch.zeros(3)}, folder / WEIGHTS)
    refuse(folder, "is truncated or no safetensors file")


def test_a_flipped_bit_is_found(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    refuse(folder, "has another sha256")


def test_a_changed_tensor_is_named_even_where_the_files_hash_was_forged(folder):
    rewrite_weights(folder, lambda tensors: tensors[NAME].add_(1))
    refuse(folder, f"tensor '{NAME}' has another sha256")


def test_a_missing_tensor_is_named(folder):
    rewrite_weights(folder, lambda tensors: tensors.pop(NAME))
    refuse(folder, f"lacks the tensor '{NAME}'")


def test_an_extra_tensor_is_named(folder):
    rewrite_weights(folder, lambda tensors: tensors.update(stowaway=torch.zeros(2)))
    refuse(folder, "holds the tensor 'stowaway'")


@pytest.mark.parametrize("replacement", [torch.zeros(16, 31), torch.zeros(16, 32, dtype=torch.float16)])
def test_a_tensor_of_another_shape_or_dtype_is_named(folder, replacement):
    rewrite_weights(folder, lambda tensors: tensors.update({NAME: replacement}))
    refuse(folder, f"tensor '{NAME}' is float.* and {METADATA} says float32 of shape")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_even_where_every_hash_is_right(folder, poison):
    from hub_moe.anatomy.expert_tensors import hash_tensor

    tensors = load_file(folder / WEIGHTS)
    tensors[NAME][0, 0] = poison
    rewrite_weights(folder, lambda found: found.update({NAME: tensors[NAME]}))
    edit_metadata(folder, lambda fields: fields["tensors"][NAME].update(after=hash_tensor(tensors[NAME])))
    refuse(folder, f"'{NAME}' of the patch holds NaN or infinity")


def test_a_link_to_a_file_elsewhere_is_refused(folder, tmp_path):
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    refuse(folder, "is a link to another place")


def test_the_links_of_the_hubs_cache_are_followed(folder, tmp_path):
    snapshot = tmp_path / "models--alice--law" / "snapshots" / COMMIT
    blobs = tmp_path / "models--alice--law" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / path.name, snapshot))
    assert ExpertPatch.load(snapshot).metadata.num_experts == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(format_version=2), "format version 2; this hub_moe reads version 1"),
        (lambda f: f.pop("base"), "lacks the field 'base'"),
        (lambda f: f.update(extra=1), "has the field 'extra'"),
        (lambda f: f.update(base="alice/base"), "'base' must be dict, not 'alice/base'"),
        (lambda f: f["base"].update(commit="main"), "commit of 40 hexadecimal digits or null"),
        (lambda f: f["base"].update(repo=""), "must be a name"),
        (lambda f: f.update(experts={"1": [0]}), "belongs to expert 4 of layer 1, which the patch does not list"),
        (lambda f: f["experts"].update({"2": [3, 5]}), "expert 5 of layer 2 is listed and lacks the tensor 'down_proj"),
        (lambda f: f.update(experts={"one": [0]}), "'experts' must map layer numbers to lists"),
        (lambda f: f["experts"].update({"1": [0, 4, 4]}), "must be some different numbers"),
        (lambda f: f.update(shared_experts=True), "a patch of shared_experts without a tensor of them"),
        (lambda f: f.update(shared_experts=1), "'shared_experts' must be bool, not 1"),
        (lambda f: f["tensors"][NAME].update(shape=[0, 4]), "sides > 0"),
        (lambda f: f["tensors"][NAME].update(before={}), "has no sha256 of the base's tensor"),
        (lambda f: f["tensors"][NAME].update(before={"float32": "no"}), "no sound sha256 of the base's float32"),
        (lambda f: f["tensors"][NAME].update(after="x"), "no sha256 of 64 hexadecimal digits"),
        (lambda f: f["weights"].update(file="../../etc/passwd"), "names another file"),
        (lambda f: f["selection"].update(top_p="all"), "'top_p' must be float or int or null"),
    ],
)
def test_damaged_metadata_is_refused_by_the_field_at_fault(folder, change, message):
    edit_metadata(folder, change)
    refuse(folder, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100000, '{"format_version": NaN}'])
def test_metadata_that_is_no_json_object_is_refused(folder, text):
    (folder / METADATA).write_text(text)
    refuse(folder, METADATA)


def test_a_tensor_outside_of_the_declared_parts_is_refused(patch):
    records = {**patch.metadata.tensors, "lm_head.weight": patch.metadata.tensors[NAME]}
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is outside of what the patch says it changes"):
        replace(patch.metadata, tensors=records)


def test_an_endless_name_is_refused_at_once(patch):
    name = ".1" * 100_000
    with pytest.raises(CheckpointError, match="longer than 500 characters"):
        replace(patch.metadata, tensors={name: patch.metadata.tensors[NAME]})


def test_a_folder_without_a_patch_and_a_name_that_is_none_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="holds no expert patch"):
        ExpertPatch.load(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder with an expert patch nor a repo id"):
        ExpertPatch.load(tmp_path / "nothing")


def test_a_subfolder_holds_a_patch_and_may_not_lead_out(folder, tmp_path):
    assert ExpertPatch.load(tmp_path, subfolder="patch").metadata.num_experts == 3
    for subfolder in ("../patch", "/etc"):
        with pytest.raises(CheckpointError, match="leads out of"):
            ExpertPatch.load(tmp_path, subfolder=subfolder)


def test_making_refuses_nan_integers_and_tensors_without_a_hash_of_the_base():
    model = build_model()
    names = names_of(model, {1: [0]})
    before = hash_base(model, names)
    tensors = {name: torch.ones(2, 2) for name in names}
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        make_patch({**tensors, names[0]: torch.full((2, 2), float("nan"))}, model_before=before, base=BASE)
    with pytest.raises(CheckpointError, match="is int64"):
        make_patch({**tensors, names[0]: torch.ones(2, 2).long()}, model_before=before, base=BASE)
    with pytest.raises(CheckpointError, match=f"no hash of the base's tensor '{min(names)}'"):
        make_patch(tensors, model_before={}, base=BASE)
    with pytest.raises(CheckpointError, match="training facts of the patch cannot be written as JSON"):
        make_patch(tensors, model_before=before, base=BASE, training={"loss": float("nan")})
    with pytest.raises(CheckpointError, match="without a tensor"):
        make_patch({}, model_before={}, base=BASE)


def test_hashing_a_tensor_that_the_model_lacks_names_it():
    with pytest.raises(PatchError, match="has no tensor 'model.layers.9"):
        hash_base(build_model(), ["model.layers.9.mlp.experts.0.up_proj.weight"])


def test_a_patch_without_routed_experts_is_a_patch_too(tmp_path):
    name = "model.layers.1.mlp.shared_experts.up_proj.weight"
    train_patch(build_model(), [name]).save(tmp_path / "patch")
    loaded = ExpertPatch.load(tmp_path / "patch")
    assert (loaded.metadata.experts, loaded.metadata.shared_experts) == ({}, True)
