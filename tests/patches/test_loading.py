"""`AutoModelForCausalLM.from_pretrained` of a patch's name: the base, patched."""

import json
import os

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hub_moe.modeling  # noqa: F401  (registers expert patches)
from hub_moe.errors import CheckpointError, PatchError
from hub_moe.patches import Base, applied_patches, apply_patch, remove_patch
from tests.anatomy.families import FAMILIES

from .patching import build_model, hashes, last_layers, logits_of, patch_experts


def save_both(tmp_path, model, *, name="patch", **kwargs):
    """A base and a patch for it in folders; the patched model."""
    model.save_pretrained(tmp_path / "base")
    base = Base(str(tmp_path / "base"), None, model.config.model_type)
    first, second = last_layers(model)
    patch = patch_experts(model, {first: [0], second: [3, 5]}, base=base)
    patch.save(tmp_path / name, **kwargs)
    apply_patch(model, patch)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_name_of_a_patch_loads_the_patched_base_in_its_own_class(tmp_path, family):
    patched = save_both(tmp_path, build_model(family))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patch")
    assert type(loaded) is type(patched)
    assert loaded.config.model_type == family
    assert hashes(loaded) == hashes(patched)
    torch.testing.assert_close(logits_of(loaded), logits_of(patched))
    remove_patch(loaded)
    assert hashes(loaded) == hashes(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))


def test_what_is_asked_of_the_model_reaches_the_base(tmp_path):
    save_both(tmp_path, build_model(num_mtp_layers=1))
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "patch",
        dtype=torch.bfloat16,
        attn_implementation="eager",
        experts_implementation="eager",
        device_map="cpu",
        use_cache=False,
        num_mtp_layers=1,
    )
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config._experts_implementation == "eager"
    assert loaded.config.use_cache is False
    assert len(applied_patches(loaded)) == 1


def test_a_base_that_is_offloaded_is_refused(tmp_path):
    save_both(tmp_path, build_model())
    parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    places = {**{f"model.{part}": "cpu" for part in parts}, "model.layers.2": "disk", "lm_head": "cpu"}
    with pytest.raises(PatchError, match=r"'model.layers.2.mlp.experts.3.* is not in memory \(offloaded\)"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "patch", device_map=places, offload_folder=str(tmp_path / "offload")
        )


def test_the_loading_info_of_the_base_comes_through(tmp_path):
    save_both(tmp_path, build_model())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "patch", output_loading_info=True)
    assert applied_patches(model)
    assert not info["missing_keys"]


def test_a_misspelt_argument_is_an_error_as_it_is_for_the_base(tmp_path):
    save_both(tmp_path, build_model())
    with pytest.raises(TypeError, match="atn_implementation"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "patch", atn_implementation="eager")


def test_a_patch_in_a_subfolder_is_found(tmp_path):
    patched = save_both(tmp_path, build_model(), name="patches/law")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="patches/law")
    assert hashes(loaded) == hashes(patched)


def test_the_base_may_be_elsewhere(tmp_path):
    patched = save_both(tmp_path, build_model())
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(PatchError, match="a folder where it was made, which is not here; say where the base is"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "patch")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patch", base=tmp_path / "moved")
    assert hashes(loaded) == hashes(patched)


def test_another_base_is_refused(tmp_path):
    save_both(tmp_path, build_model())
    build_model(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(PatchError, match="this is another model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "patch", base=tmp_path / "other")


def test_a_base_that_is_no_model_says_so(tmp_path):
    save_both(tmp_path, build_model())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty has no readable config.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "patch", base=tmp_path / "empty")


def test_a_patch_on_a_patch_loads_both(tmp_path):
    patched = save_both(tmp_path, build_model())
    second = patch_experts(patched, {2: [3]}, seed=7, base=Base(str(tmp_path / "patch"), None, "hub_moe_expert_patch"))
    second.save(tmp_path / "second")
    apply_patch(patched, second)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert hashes(loaded) == hashes(patched)
    assert len(applied_patches(loaded)) == 2


def test_a_patch_that_is_its_own_base_comes_to_an_end(tmp_path):
    base = Base(str(tmp_path / "patch"), None, "hub_moe")
    patch_experts(build_model(), {1: [0]}, base=base).save(tmp_path / "patch")
    with pytest.raises(PatchError, match="more than 8 deep"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "patch")


def test_a_folder_in_the_place_of_a_repo_is_not_taken_for_it(tmp_path, monkeypatch):
    patch_experts(build_model(), {1: [0]}).save(tmp_path / "patch")
    (tmp_path / "alice" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PatchError, match=r"give './alice/base' as base"):
        AutoModelForCausalLM.from_pretrained("patch")


def test_the_config_names_the_base_and_survives_saving(tmp_path):
    patch_experts(build_model(), {1: [0]}).save(tmp_path / "patch")
    config = AutoConfig.from_pretrained(tmp_path / "patch")
    assert (config.model_type, config.base_model, config.base_model_type) == (
        "hub_moe_expert_patch",
        "alice/base",
        "hub_moe",
    )
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["base_model_commit"] == config.base_model_commit


def test_a_patched_model_saves_as_a_full_checkpoint(tmp_path):
    save_both(tmp_path, build_model())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patch")
    loaded.save_pretrained(tmp_path / "full")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert hashes(full) == hashes(loaded)
    assert applied_patches(full) == ()


def test_a_pipeline_takes_the_name_of_a_patch(tmp_path, tiny_tokenizer):
    from transformers import pipeline

    save_both(tmp_path, build_model(), tokenizer=tiny_tokenizer)
    generate = pipeline("text-generation", model=str(tmp_path / "patch"), device="cpu")
    (result,) = generate("A router", max_new_tokens=3, do_sample=False)
    assert result["generated_text"].startswith("A router")
    assert applied_patches(generate.model)


def test_lm_eval_takes_the_name_of_a_patch(tmp_path, tiny_tokenizer):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    patched = save_both(tmp_path, build_model(), tokenizer=tiny_tokenizer)
    adapter = huggingface.HFLM(pretrained=str(tmp_path / "patch"), device="cpu", batch_size=1, dtype="float32")
    assert hashes(adapter.model) == hashes(patched)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "patch")
    tokens = torch.tensor(tokenizer("A router scores").input_ids)[None]
    torch.testing.assert_close(adapter._model_call(tokens), patched(tokens).logits)


HUB_STEPS = """
import json
import hub_moe.modeling
from transformers import AutoModelForCausalLM
from hub_moe.errors import HubMoeError
from hub_moe.patches import ExpertPatch
from tests.patches.patching import hashes
def load(name, **kwargs):
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except HubMoeError as error:
        return f"{type(error).__name__}: {error}"
    return hashes(model)
def fetch(name):
    try:
        ExpertPatch.load(name)
    except HubMoeError as error:
        return f"{type(error).__name__}: {error}"
"""


@pytest.fixture
def pushed(hub, tmp_path, request):
    """A base and a patch for its first commit on the Hub; then the base moves on."""
    from huggingface_hub import HfApi

    name = f"alice/{request.node.name[:60].replace('[', '-').rstrip(']')}"
    api = HfApi(endpoint=hub.url, token=hub.tokens["alice"])
    base, patch_repo = f"{name}-base", f"{name}-patch"
    model = build_model()
    for repo in (base, patch_repo):
        api.create_repo(repo)
    model.save_pretrained(tmp_path / "base")
    commit = api.upload_folder(repo_id=base, folder_path=tmp_path / "base").oid
    patch = patch_experts(model, {1: [0], 2: [3]}, base=Base(base, commit, "hub_moe"))
    patch.save(tmp_path / "patch")
    api.upload_folder(repo_id=patch_repo, folder_path=tmp_path / "patch")
    api.upload_folder(repo_id=patch_repo, folder_path=tmp_path / "patch", path_in_repo="patches/law")
    build_model(seed=5).save_pretrained(tmp_path / "moved-on")
    api.upload_folder(repo_id=base, folder_path=tmp_path / "moved-on")
    apply_patch(model, patch)
    return api, base, patch_repo, hashes(model)


def load_on(hub, tmp_path, call, *, user="alice"):
    import subprocess
    import sys

    environment = hub.environment(user, xet=True, home=tmp_path / f"home-{user}")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), environment.get("PYTHONPATH")]))
    code = f"{HUB_STEPS}\nprint(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_patch_on_the_hub_is_loaded_by_name_with_the_base_at_its_pinned_commit(hub, pushed, tmp_path):
    api, base, patch_repo, expected = pushed
    assert [model.id for model in api.list_models(filter=f"base_model:adapter:{base}")] == [patch_repo]
    calls = [
        f"load({patch_repo!r})",
        f"load({patch_repo!r}, subfolder='patches/law')",
        f"load({patch_repo!r}, revision={api.model_info(patch_repo).sha!r}, token={hub.tokens['alice']!r})",
        f"load({patch_repo!r}, local_files_only=True)",
    ]
    assert load_on(hub, tmp_path, f"[{', '.join(calls)}]") == [expected] * 4


def test_a_patch_whose_base_is_private_loads_for_those_who_may_read_it(hub, pushed, tmp_path):
    api, base, patch_repo, expected = pushed
    api.update_repo_settings(base, private=True)
    assert load_on(hub, tmp_path, f"load({patch_repo!r})", user="alice") == expected
    assert load_on(hub, tmp_path, f"load({patch_repo!r}, token={hub.tokens['alice']!r})", user=None) == expected
    refused = load_on(hub, tmp_path, f"load({patch_repo!r})", user="bob")
    assert refused.startswith(f"HubError: The patch's base {base} at commit ")
    assert "it is private and needs `hf auth login`" in refused


def test_a_patch_whose_base_was_deleted_says_so_and_takes_a_copy(hub, pushed, tmp_path):
    api, base, patch_repo, expected = pushed
    api.delete_repo(base)
    refused = load_on(hub, tmp_path, f"load({patch_repo!r})")
    assert refused.startswith(f"HubError: The patch's base {base} at commit ")
    assert "it was deleted or renamed" in refused
    copy = str(tmp_path / "base")
    assert load_on(hub, tmp_path, f"load({patch_repo!r}, base={copy!r})") == expected


def test_a_base_that_moved_on_is_refused_and_a_repo_without_a_patch_says_so(hub, pushed, tmp_path):
    _, base, patch_repo, _ = pushed
    steps = f"[load({patch_repo!r}, base={base!r}), fetch({base!r})]"
    moved_on, no_patch = load_on(hub, tmp_path, steps)
    assert moved_on.startswith("PatchError: The patch is for")
    assert no_patch.startswith("CheckpointError")
    assert "holds no expert patch" in no_patch
