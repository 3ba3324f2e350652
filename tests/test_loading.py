"""`hub_moe.load`: every family as `from_pretrained` loads it, and with its experts left in their files."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import hub_moe
from hub_moe.errors import CheckpointError, ConfigError, UnsupportedModelError
from hub_moe.experts.offload import PlacedExperts
from hub_moe.modeling.checkpoint import DirectLoadingMixin
from tests.anatomy.families import FAMILIES, tiny_config

TOKENS = torch.arange(20).view(2, 10) * 7 % 128


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A checkpoint of each family, in shards."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(tiny_config(request.param)).save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_loads_bit_equal_to_from_pretrained(saved, dtype):
    expected, expected_info = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype, output_loading_info=True)
    model, info = hub_moe.load(saved, dtype=dtype, output_loading_info=True)
    assert type(model) is type(expected)
    assert info == expected_info
    tensors = model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_every_family_is_saved_as_it_was_loaded(saved, tmp_path):
    hub_moe.load(saved).save_pretrained(tmp_path / "again")
    before, after = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (saved, tmp_path / "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_every_family_runs_with_its_experts_in_their_files(saved):
    whole = hub_moe.load(saved, experts_implementation="grouped_mm")
    size = sum(p.nbytes for name, p in whole.named_parameters() if ".experts." in name)
    model = hub_moe.load(saved, expert_budget=size * 2 // 3, experts_implementation="grouped_mm")
    assert type(model) is type(whole)
    assert any(isinstance(module, PlacedExperts) for module in model.modules())
    if whole.config.model_type == "gpt_oss":  # torch rounds its gate, which is strided, by the number of rows
        torch.testing.assert_close(model(TOKENS).logits, whole(TOKENS).logits, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(model(TOKENS).logits, whole(TOKENS).logits)
    assert torch.equal(model(TOKENS[:1, :3]).logits, whole(TOKENS[:1, :3]).logits)
    with pytest.raises(CheckpointError, match="stay in their files"):
        model.save_pretrained(saved / "copy")


def test_a_checkpoint_that_lacks_an_expert_loads_as_from_pretrained_loads_it(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config("olmoe")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj cannot stay"):
        hub_moe.load(tmp_path, expert_budget="20KiB")
    for load in (AutoModelForCausalLM.from_pretrained, hub_moe.load):
        with pytest.raises(RuntimeError):
            load(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config("olmoe")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        hub_moe.load(tmp_path)


def test_a_dense_model_loads_and_has_no_budget(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16)).save_pretrained(tmp_path)
    model = hub_moe.load(tmp_path)
    assert type(model) is GPT2LMHeadModel
    assert not isinstance(model, DirectLoadingMixin)
    with pytest.raises(UnsupportedModelError, match="has no routed experts"):
        hub_moe.load(tmp_path, expert_budget="1GiB")
    with pytest.raises(ConfigError, match="give an expert_budget too"):
        hub_moe.load(tmp_path, expert_profile="profile.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "There is no folder ./nowhere."),
        ("/nowhere/at/all", "There is no folder /nowhere/at/all."),
        (Path("nowhere"), "There is no folder nowhere."),
        ("", "a folder or a repo, OWNER/NAME, was expected"),
        (None, "a folder or a repo, OWNER/NAME, was expected"),
    ],
)
def test_what_names_no_model_is_told_in_one_sentence(name, message):
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(message)):
        hub_moe.load(name)
