"""Checkpoints that leave hub_moe: native ones, and ones that carry their code. Both are loaded by a fresh process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hub_moe.errors import CheckpointError, ConfigError
from hub_moe.modeling import DeepseekConfig, DeepseekForCausalLM, HubMoeForCausalLM
from hub_moe.modeling.export import export_checkpoint
from tests.modeling.stock_models import save_stock

TOKENS = list(range(3, 20))


def _logits_without_hub_moe(folder, work, *, trust_remote_code=False):
    """The last logits of the checkpoint in a process that cannot import hub_moe, and the class that gave them."""
    code = f"""
import sys
sys.modules["hub_moe"] = None  # importing it raises ImportError
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code={trust_remote_code})
torch.save(model(torch.tensor([{TOKENS}])).logits, {str(work / "logits.pt")!r})
print(type(model).__name__, type(model).__module__.split(".")[0], model.config._experts_implementation)
"""
    environment = {**os.environ, "HF_HOME": str(work / "hf"), "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=work, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return torch.load(work / "logits.pt"), result.stdout.split()


def _logits(folder):
    """By the experts that a process without hub_moe uses, too: only then is every bit the same."""
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm")
        return model(torch.tensor([TOKENS])).logits


@pytest.fixture
def saved_mtp_model(tiny_config, tmp_path):
    tiny_config.num_mtp_layers = 1
    torch.manual_seed(0)
    model = HubMoeForCausalLM(tiny_config)
    model.model.layers[1].mlp.gate.e_score_correction_bias.normal_(std=0.2)
    model.save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


def test_native_export_loads_without_hub_moe_and_gives_identical_logits(saved_mtp_model, tmp_path):
    report = export_checkpoint(str(saved_mtp_model), str(tmp_path / "native"), to="deepseek_v3", max_shard_size="60KB")
    logits, (name, package, _) = _logits_without_hub_moe(tmp_path / "native", tmp_path)
    assert (name, package) == ("DeepseekV3ForCausalLM", "transformers")
    assert torch.equal(logits, _logits(saved_mtp_model))
    assert sum(kind.tensors for kind in report.kinds) == len(_tensors(saved_mtp_model)) + 2


def _tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_native_export_is_bit_equal_and_keeps_the_mtp_layer_with_its_copies(saved_mtp_model, tmp_path):
    export_checkpoint(str(saved_mtp_model), str(tmp_path / "native"))
    before, after = _tensors(saved_mtp_model), _tensors(tmp_path / "native")
    added = {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}
    assert after.keys() - before.keys() == added
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(after["model.layers.3.shared_head.head.weight"], before["lm_head.weight"])
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3"
    assert config["num_nextn_predict_layers"] == 1
    assert "auto_map" not in config
    assert not list((tmp_path / "native").glob("*.py"))


def test_export_comes_back_as_the_same_model(saved_mtp_model, tmp_path):
    export_checkpoint(str(saved_mtp_model), str(tmp_path / "native"))
    ours = HubMoeForCausalLM.from_pretrained(saved_mtp_model)
    back = HubMoeForCausalLM.from_pretrained(tmp_path / "native")
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    ("variant", "to"), [("v2", "deepseek_v2"), ("v2_lite", "deepseek_v2"), ("v3_tied", "deepseek_v3")]
)
def test_native_checkpoint_passes_through_hub_moe_and_back(variant, to, tmp_path):
    save_stock(variant, tmp_path / "stock")
    HubMoeForCausalLM.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "ours")
    export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "native"), to=to)
    logits, (name, _, _) = _logits_without_hub_moe(tmp_path / "native", tmp_path)
    assert name.lower().startswith(to.replace("_", ""))
    assert torch.equal(logits, _logits(tmp_path / "stock"))
    assert _tensors(tmp_path / "native").keys() == _tensors(tmp_path / "stock").keys()


@pytest.mark.parametrize(
    ("variant", "to", "message"),
    [
        ("v2", "deepseek_v3", r"cannot express scoring_func='softmax'.*Try --to deepseek_v2"),
        ("v3", "deepseek_v2", r"cannot express scoring_func='sigmoid'.*Try --to deepseek_v3"),
        ("v3", "llama", r"Cannot export to 'llama'; the choices are deepseek_v2, deepseek_v3"),
    ],
)
def test_export_that_would_change_the_model_is_refused(variant, to, message, tmp_path):
    save_stock(variant, tmp_path / "stock")
    with pytest.raises(ConfigError, match=message):
        export_checkpoint(str(tmp_path / "stock"), str(tmp_path / "native"), to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


def test_export_does_not_overwrite(saved_mtp_model, tmp_path):
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "precious.txt").write_text("")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export_checkpoint(str(saved_mtp_model), str(tmp_path / "native"))


def test_export_of_fused_experts_is_refused(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "fused", save_original_format=False)
    with pytest.raises(CheckpointError, match="holds fused experts"):
        export_checkpoint(str(tmp_path / "fused"), str(tmp_path / "native"))


def test_tokenizer_and_generation_settings_come_along(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.generation_config.temperature = 0.7
    tiny_model.generation_config.do_sample = True
    tiny_model.save_pretrained(tmp_path / "ours")
    tiny_tokenizer.save_pretrained(tmp_path / "ours")
    export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "native"))
    names = {path.name for path in (tmp_path / "native").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"} <= names
    assert json.loads((tmp_path / "native" / "generation_config.json").read_text())["temperature"] == 0.7


def test_remote_code_loads_where_hub_moe_is_not_installed(saved_mtp_model, tmp_path):
    logits, (name, package, experts) = _logits_without_hub_moe(saved_mtp_model, tmp_path, trust_remote_code=True)
    assert (name, package, experts) == ("HubMoeForCausalLM", "transformers_modules", "grouped_mm")
    assert torch.equal(logits, _logits(saved_mtp_model))


def test_remote_code_of_the_first_deepseek_moe_loads_too(tmp_path):
    torch.manual_seed(0)
    config = DeepseekConfig(vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
                            num_hidden_layers=2, num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=2,
                            n_shared_experts=2, first_k_dense_replace=1)  # fmt: skip
    DeepseekForCausalLM(config).save_pretrained(tmp_path / "v1")
    logits, (name, package, _) = _logits_without_hub_moe(tmp_path / "v1", tmp_path, trust_remote_code=True)
    assert (name, package) == ("DeepseekForCausalLM", "transformers_modules")
    assert torch.equal(logits, _logits(tmp_path / "v1"))


def test_remote_code_saves_itself_again(saved_mtp_model, tmp_path):
    code = f"""
import sys
sys.modules["hub_moe"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(saved_mtp_model)!r}, trust_remote_code=True)
model.save_pretrained({str(tmp_path / "again")!r})
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment, cwd=tmp_path)
    first = {path.name: path.read_text() for path in saved_mtp_model.glob("*.py")}
    assert {path.name: path.read_text() for path in (tmp_path / "again").glob("*.py")} == first
    logits, _ = _logits_without_hub_moe(tmp_path / "again", tmp_path, trust_remote_code=True)
    assert torch.equal(logits, _logits(saved_mtp_model))


def test_installed_hub_moe_wins_over_the_code_beside_the_checkpoint(saved_mtp_model):
    assert type(AutoModelForCausalLM.from_pretrained(saved_mtp_model)) is HubMoeForCausalLM


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("model.layers.1.mlp.experts.3.up_proj.weight", None, r"lacks 'layers\.1\.mlp\.experts\.3\.up_proj"),
        ("model.norm.weight", None, r"lacks 'model\.norm\.weight'"),
        ("lm_head.weight", lambda tensor: tensor[:-1].contiguous(), r"'lm_head\.weight' has shape \(127, 32\)"),
        ("model.norm.weight", lambda tensor: tensor.to(torch.uint16), "is of a type that hub_moe does not read"),
    ],
)
def test_export_refuses_what_would_not_load(saved_mtp_model, tmp_path, name, edit, message):
    file = saved_mtp_model / "model.safetensors"
    tensors = load_file(file)
    tensor = tensors.pop(name)
    if edit is not None:
        tensors[name] = edit(tensor)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(str(saved_mtp_model), str(tmp_path / "native"))
    assert not (tmp_path / "native").exists()


def test_export_of_a_misspelt_folder_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="'nope' is neither a folder nor a repo id"):
        export_checkpoint("nope", str(tmp_path / "native"))


def test_installed_hub_moe_wins_though_the_copy_came_first(saved_mtp_model, tmp_path):
    code = f"""
from transformers import AutoModelForCausalLM
first = AutoModelForCausalLM.from_pretrained({str(saved_mtp_model)!r}, trust_remote_code=True)
import hub_moe.modeling
second = AutoModelForCausalLM.from_pretrained({str(saved_mtp_model)!r})
print(type(first).__module__.split(".")[0], type(second) is hub_moe.modeling.HubMoeForCausalLM)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert result.stdout.split() == ["transformers_modules", "True"]
