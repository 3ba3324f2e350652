"""A patch merged into its base: a full checkpoint in the base's own names, proved byte by byte."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hub_moe.errors import CheckpointError, PatchError
from hub_moe.patches import Base, ExpertPatch, apply_patch, merge_into_base
from tests.anatomy.families import FAMILIES

from .patching import build_model, hashes, last_layers, names_of, patch_experts, train_patch


def save_both(tmp_path, model, *, save=None, **kwargs):
    """Base and patch in folders, and the hashes of the patched model."""
    model.save_pretrained(tmp_path / "base", **(save or {}))
    base = Base(str(tmp_path / "base"), None, model.config.model_type)
    first, second = last_layers(model)
    patch = patch_experts(model, {first: [0, 7], second: [3]}, base=base, **kwargs)
    patch.save(tmp_path / "patch")
    apply_patch(model, patch)
    return patch, hashes(model)


def load_all(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_checkpoint_is_the_patched_model_under_the_bases_names(tmp_path, family):
    _, expected = save_both(tmp_path, build_model(family))
    report = merge_into_base(tmp_path / "patch", tmp_path / "merged")
    assert hashes(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == expected
    base, merged = load_all(tmp_path / "base"), load_all(tmp_path / "merged")
    assert base.keys() == merged.keys()
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    assert len(changed) == sum(kind.changed for kind in report.kinds) == sum(kind.patched for kind in report.kinds)
    assert changed


def test_the_report_says_by_kind_and_layer_what_changed(tmp_path):
    save_both(tmp_path, build_model())
    report = merge_into_base(tmp_path / "patch", tmp_path / "merged")
    rows = {(kind.kind, kind.layer): kind for kind in report.kinds}
    assert [(kind.layer, kind.tensors, kind.patched, kind.changed) for kind in report.kinds[-3:-1]] == [
        (1, 24, 6, 6),
        (2, 24, 3, 3),
    ]
    assert rows["other", None].changed == 0
    assert rows["other", None].sha256_before == rows["other", None].sha256_after
    assert rows["routed_experts", 1].sha256_before != rows["routed_experts", 1].sha256_after
    assert sum(kind.tensors for kind in report.kinds) == len(load_all(tmp_path / "base"))


def test_all_else_of_the_base_comes_along_but_its_card_and_other_formats(tmp_path, tiny_tokenizer):
    save_both(tmp_path, build_model())
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", ".hidden"):
        (tmp_path / "base" / name).write_text("base")
    (tmp_path / "base" / "LICENSE").write_text("MIT")
    merge_into_base(tmp_path / "patch", tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE", "README.md"} <= names
    assert names.isdisjoint({"pytorch_model.bin", "consolidated.safetensors", ".hidden", "expert_patch.json"})
    assert "changed by an expert patch" in (tmp_path / "merged" / "README.md").read_text()


def test_a_sharded_base_stays_sharded(tmp_path):
    _, expected = save_both(tmp_path, build_model(), save={"max_shard_size": "60KB"})
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    merge_into_base(tmp_path / "patch", tmp_path / "merged")
    index = "model.safetensors.index.json"
    assert (tmp_path / "merged" / index).read_text() == (tmp_path / "base" / index).read_text()
    assert hashes(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == expected


def test_mtp_layers_that_the_models_class_would_drop_stay(tmp_path):
    model = build_model(num_mtp_layers=1)
    model.save_pretrained(tmp_path / "base")
    names = [*names_of(model, {3: [1]}), "model.layers.1.mlp.gate.e_score_correction_bias"]
    train_patch(model, names, base=Base(str(tmp_path / "base"), None, "hub_moe")).save(tmp_path / "patch")
    report = merge_into_base(tmp_path / "patch", tmp_path / "merged")
    assert {(kind.kind, kind.layer): kind.changed for kind in report.kinds if kind.changed} == {
        ("routed_experts", 3): 3,
        ("balancing_bias", None): 1,
    }


def test_fused_experts_on_disk_are_patched_row_by_row(tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_all(tmp_path / "base")
    patch = patch_experts(model, {1: [0, 7]}, base=Base(str(tmp_path / "base"), None, "hub_moe"))
    patch.save(tmp_path / "patch")
    merge_into_base(tmp_path / "patch", tmp_path / "merged")
    base, merged = load_all(tmp_path / "base"), load_all(tmp_path / "merged")
    stack, was = (each["model.layers.1.mlp.experts.gate_up_proj"] for each in (merged, base))
    assert torch.equal(stack[7, 16:], patch.tensors["model.layers.1.mlp.experts.7.up_proj.weight"])
    assert torch.equal(stack[1:7], was[1:7])
    assert sum(not torch.equal(base[name], merged[name]) for name in base) == 2


def test_a_float32_patch_is_cast_into_a_bfloat16_base_as_applying_it_does(tmp_path):
    model = build_model()
    patch = patch_experts(model, {1: [0]}, base=Base(str(tmp_path / "base"), None, "hub_moe"))
    patch.save(tmp_path / "patch")
    model.bfloat16().save_pretrained(tmp_path / "base")
    low = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merge_into_base(tmp_path / "patch", tmp_path / "merged")
    apply_patch(low, patch)
    assert hashes(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == hashes(low)


def test_a_base_of_other_values_is_refused_and_nothing_is_written(tmp_path):
    save_both(tmp_path, build_model())
    build_model(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(PatchError, match=r"cannot be merged into .*other: tensor .* has other values"):
        merge_into_base(tmp_path / "patch", tmp_path / "merged", base=tmp_path / "other")
    assert not (tmp_path / "merged").exists()


def test_a_base_of_another_family_is_refused(tmp_path):
    save_both(tmp_path, build_model())
    build_model("mixtral").save_pretrained(tmp_path / "other")
    with pytest.raises(PatchError, match="is not in its files, by name or by content"):
        merge_into_base(tmp_path / "patch", tmp_path / "merged", base=tmp_path / "other")


def test_a_base_in_fp8_is_refused(tmp_path):
    save_both(tmp_path, build_model())
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    low = {name: tensor.to(torch.float8_e4m3fn) if ".experts." in name else tensor for name, tensor in tensors.items()}
    save_file(low, path, metadata={"format": "pt"})
    with pytest.raises(PatchError, match="is stored as float8_e4m3fn, and the patch knows it in float32"):
        merge_into_base(tmp_path / "patch", tmp_path / "merged")


def test_a_patch_that_overflows_the_bases_dtype_is_refused(tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path / "base")
    patch = patch_experts(model, {1: [0]}, base=Base(str(tmp_path / "base"), None, "hub_moe"), size=1e6)
    patch.save(tmp_path / "patch")
    model.half().save_pretrained(tmp_path / "half")
    with pytest.raises(PatchError, match="does not fit into the base's float16: it overflows"):
        merge_into_base(tmp_path / "patch", tmp_path / "merged", base=tmp_path / "half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "half", "patch"]


def test_a_target_that_is_not_empty_is_refused(tmp_path):
    save_both(tmp_path, build_model())
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        merge_into_base(tmp_path / "patch", tmp_path / "base")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("model.safetensors.index.json", "{}", "is no index"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../base/model.safetensors"}}', "lacks ../base"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}', "lacks gone.safetensors"),
        ("model.safetensors", "short", "truncated"),
        ("config.json", "{", "no readable config.json"),
    ],
)
def test_a_damaged_base_is_named(tmp_path, name, text, message):
    save_both(tmp_path, build_model())
    (tmp_path / "base" / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        merge_into_base(tmp_path / "patch", tmp_path / "merged")


def test_a_base_that_is_a_patch_is_to_be_merged_first(tmp_path):
    patch, _ = save_both(tmp_path, build_model())
    model = build_model()
    apply_patch(model, ExpertPatch(patch.metadata, patch.tensors))
    patch_experts(model, {1: [0]}, base=Base(str(tmp_path / "patch"), None, "hub_moe")).save(tmp_path / "second")
    with pytest.raises(CheckpointError, match="is itself an expert patch; merge that one into its base first"):
        merge_into_base(tmp_path / "second", tmp_path / "merged")


def test_the_config_of_the_base_is_kept_word_for_word(tmp_path):
    save_both(tmp_path, build_model())
    merge_into_base(tmp_path / "patch", tmp_path / "merged")
    texts = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("base", "merged")]
    assert texts[0] == texts[1]


def test_a_base_on_the_hub_is_fetched_at_its_pinned_commit(hub, tmp_path):
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=hub.tokens["alice"])
    api.create_repo("alice/merge-base")
    model = build_model()
    model.save_pretrained(tmp_path / "base")
    commit = api.upload_folder(repo_id="alice/merge-base", folder_path=tmp_path / "base").oid
    patch = patch_experts(model, {1: [0]}, base=Base("alice/merge-base", commit, "hub_moe"))
    patch.save(tmp_path / "patch")
    api.upload_folder(repo_id="alice/merge-base", folder_path=tmp_path / "patch", path_in_repo="patches/law")
    build_model(seed=5).save_pretrained(tmp_path / "moved-on")
    api.upload_folder(repo_id="alice/merge-base", folder_path=tmp_path / "moved-on")
    code = (
        "from hub_moe.patches import merge_into_base; "
        f"merge_into_base('alice/merge-base', {str(tmp_path / 'merged')!r}, subfolder='patches/law')"
    )
    hub.run_python(code)
    apply_patch(model, patch)
    assert hashes(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == hashes(model)
    assert 'base_model_relation: "finetune"' in (tmp_path / "merged" / "README.md").read_text()
