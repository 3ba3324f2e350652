"""What lies on the disk, and what happens when it is not what the config says."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from hub_moe.errors import CheckpointError
from hub_moe.modeling import (
    HubMoeForCausalLM,
    HubMoeForSequenceClassification,
    HubMoeModel,
    conversion,
    safetensors_files,
)
from hub_moe.modeling.safetensors_files import dequantize_blocks
from tests.modeling.stock_models import VARIANTS, save_stock


@pytest.fixture
def saved(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _edit_tensors(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_saved_checkpoint_has_per_expert_names_and_reloads_bit_equal(tiny_model, saved):
    tensors = load_file(saved / "model.safetensors")
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in tensors
    assert not any("gate_up_proj" in name for name in tensors)
    gate_up = tiny_model.model.layers[1].mlp.experts.gate_up_proj[7]
    assert torch.equal(tensors["model.layers.1.mlp.experts.7.gate_proj.weight"], gate_up[:16])
    reloaded = AutoModelForCausalLM.from_pretrained(saved)
    assert type(reloaded) is HubMoeForCausalLM
    assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in tiny_model.state_dict().items())


@pytest.mark.parametrize("piece_bytes", [1000, 8 * 2**20])  # less than an expert, and more than the model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_direct_loading_equals_transformers_own(dtype, piece_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(conversion, "PIECE_BYTES", piece_bytes)  # from so many on reading begins before it is asked for
    save_stock("v3", tmp_path)
    stock = VARIANTS["v3"][0].from_pretrained(tmp_path, dtype=dtype)
    ours = HubMoeForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, tensor in stock.state_dict().items():
        assert ours.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_balancing_bias_stays_in_float32(saved):
    model = HubMoeForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16


def test_fused_checkpoint_loads_too(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in load_file(tmp_path / "model.safetensors"))
    reloaded = HubMoeForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in tiny_model.state_dict().items())


def test_backbone_and_heads_load_from_each_other(saved, tmp_path):
    backbone, info = HubMoeModel.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]
    backbone.save_pretrained(tmp_path / "backbone")
    classifier, info = HubMoeForSequenceClassification.from_pretrained(
        tmp_path / "backbone", output_loading_info=True, num_labels=3
    )
    assert info["missing_keys"] == {"score.weight"}
    assert torch.equal(classifier.model.embed_tokens.weight, backbone.embed_tokens.weight)


def test_missing_expert_is_named(saved):
    _edit_tensors(saved, lambda tensors: tensors.pop("model.layers.2.mlp.experts.5.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 'layers\.2\.mlp\.experts\.5\.up_proj\.weight'.*8 experts"):
        HubMoeForCausalLM.from_pretrained(saved)


def test_checkpoint_without_any_expert_is_refused(saved):
    def strip(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    _edit_tensors(saved, strip)
    with pytest.raises(CheckpointError, match=r"lacks 'layers\.1\.mlp\.experts\.0\.gate_proj\.weight'"):
        HubMoeForCausalLM.from_pretrained(saved)


def test_superfluous_expert_is_named(saved):
    def add(tensors):
        tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = torch.zeros(16, 32)

    _edit_tensors(saved, add)
    with pytest.raises(CheckpointError, match=r"experts\.8\.up_proj\.weight' is superfluous.*0 to 7"):
        HubMoeForCausalLM.from_pretrained(saved)


def test_expert_in_a_dense_layer_is_named(saved):
    def add(tensors):
        tensors["model.layers.0.mlp.experts.0.up_proj.weight"] = torch.zeros(16, 32)

    _edit_tensors(saved, add)
    with pytest.raises(CheckpointError, match="is an expert of layer 0, which has none by config"):
        HubMoeForCausalLM.from_pretrained(saved)


def test_misshapen_expert_is_named_unless_sizes_may_differ(saved):
    def shrink(tensors):
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
        tensors[name] = tensors[name][:, :-1].contiguous()

    _edit_tensors(saved, shrink)
    with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj\.weight' has shape \(32, 15\).*\(32, 16\)"):
        HubMoeForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("kept", [0, 5, 4000, -1])
def test_truncated_file_is_named(saved, kept):
    file = saved / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(file))}.*truncated"):
        HubMoeForCausalLM.from_pretrained(saved)


def test_file_of_another_format_is_named(saved):
    file = saved / "model.safetensors"
    file.write_bytes((40).to_bytes(8, "little") + b"this is not json" * 10)
    with pytest.raises(CheckpointError, match="its header is not JSON"):
        HubMoeForCausalLM.from_pretrained(saved)


def test_pickle_is_refused_unless_asked_for(tiny_model, saved):
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(tensors, saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*use_safetensors=False"):
        HubMoeForCausalLM.from_pretrained(saved)
    reloaded = HubMoeForCausalLM.from_pretrained(saved, use_safetensors=False)
    assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in tiny_model.state_dict().items())


def test_folder_without_weights_says_so(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        HubMoeForCausalLM.from_pretrained(saved)


def test_saving_onto_a_file_is_refused(tiny_model, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="it is a file"):
        tiny_model.save_pretrained(tmp_path / "taken")


def test_saving_again_replaces_the_old_shards(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    (tmp_path / "model" / "README.md").write_text("kept")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    tiny_model.save_pretrained(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "model" / "README.md").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    HubMoeForCausalLM.from_pretrained(tmp_path / "model")


def test_saving_leaves_other_files_and_variants_alone(tiny_model, tmp_path):
    (tmp_path / "model_ema.safetensors").write_text("mine")
    tiny_model.save_pretrained(tmp_path, variant="fp16", max_shard_size="30KB")
    variant_files = {path.name for path in tmp_path.glob("*fp16*")}
    tiny_model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert variant_files | {"model.safetensors", "model_ema.safetensors"} <= names
    HubMoeForCausalLM.from_pretrained(tmp_path, variant="fp16")
    tiny_model.save_pretrained(tmp_path, variant="fp16")
    assert {path.name for path in tmp_path.glob("model*fp16*")} == {"model.fp16.safetensors"}


def test_saving_through_a_link_writes_where_it_points(tiny_model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    tiny_model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    HubMoeForCausalLM.from_pretrained(tmp_path / "real")


def test_leftover_of_a_killed_save_goes_with_the_next_one(tiny_model, tmp_path):
    (tmp_path / ".unfinished-abc").mkdir()
    tiny_model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob(".unfinished-*"))


def test_subclass_of_a_user_is_saved_as_our_class(tiny_config, tmp_path):
    class Mine(HubMoeForCausalLM):
        pass

    Mine(tiny_config).save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is HubMoeForCausalLM


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.uint16])
def test_experts_that_are_no_plain_floats_are_refused(saved, dtype):
    def convert(tensors):
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
        tensors[name] = tensors[name].to(dtype)

    _edit_tensors(saved, convert)
    with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj\.weight' is .*plain floats"):
        HubMoeForCausalLM.from_pretrained(saved)


def test_missing_shard_and_broken_index_are_named(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path, max_shard_size="30KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{re.escape(shard.name)} is missing"):
        HubMoeForCausalLM.from_pretrained(tmp_path)


def test_trailing_bytes_are_noticed(saved):
    with open(saved / "model.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="is too long"):
        HubMoeForCausalLM.from_pretrained(saved)


def test_config_that_wants_more_mtp_layers_than_there_are_is_refused(tiny_config, tmp_path):
    tiny_config.num_mtp_layers = 1
    HubMoeForCausalLM(tiny_config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="lacks MTP layer 4; the config has num_mtp_layers=2"):
        HubMoeForCausalLM.from_pretrained(tmp_path, num_mtp_layers=2)


@pytest.mark.slow
def test_killed_save_leaves_nothing_that_looks_complete(tmp_path):
    """A process saves over and over and is killed at some moment: what is left loads, or is no checkpoint."""
    code = f"""
import torch
from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM
model = HubMoeForCausalLM(HubMoeConfig.from_preset("nano", vocab_size=512))
print("ready", flush=True)
for version in range(1000):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(version)
    model.save_pretrained({str(tmp_path / "model")!r}, max_shard_size="1MB")
"""
    for delay_s in (0.3, 0.45, 0.6, 0.85):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        if (tmp_path / "model" / "config.json").exists():
            model = HubMoeForCausalLM.from_pretrained(tmp_path / "model")
            assert len({parameter.unique().item() for parameter in model.parameters()}) == 1


def _quantize(tensors):
    """Turn every projection into FP8 with a scale for each 128 x 128 block, as DeepSeek-V3 ships them."""
    for name in [name for name in tensors if name.endswith(("_proj.weight", "_with_mqa.weight"))]:
        weight = tensors[name]
        rows, columns = (-(-side // 128) for side in weight.shape)
        scale = torch.rand(rows, columns) * 0.002 + 0.0001
        full = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
        tensors[name] = (weight.float() / full).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale


@pytest.fixture
def fp8_checkpoint(tmp_path):
    """A native FP8 checkpoint in which no side is a multiple of 128, as kv_a_proj_with_mqa's 576 in DeepSeek-V3."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from tests.modeling.stock_models import SHAPE

    wide = {"hidden_size": 200, "moe_intermediate_size": 136, "intermediate_size": 300, "kv_lora_rank": 140}
    torch.manual_seed(0)
    folder = tmp_path / "fp8"
    DeepseekV3ForCausalLM(DeepseekV3Config(**{**SHAPE, **wide})).save_pretrained(folder)
    _edit_tensors(folder, _quantize)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                     "weight_block_size": [128, 128]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_checkpoint_is_dequantised_while_loading(fp8_checkpoint, dtype):
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    model = HubMoeForCausalLM.from_pretrained(fp8_checkpoint, dtype=dtype, **options)
    stored = load_file(fp8_checkpoint / "model.safetensors")
    names = [name for name in stored if name + "_scale_inv" in stored]
    assert len(names) > 50
    for name in names:
        scale = stored[name + "_scale_inv"]
        full = scale.repeat_interleave(128, 0)[: stored[name].shape[0]]
        full = full.repeat_interleave(128, 1)[:, : stored[name].shape[1]]
        expected = (stored[name].float() * full).to(dtype)
        assert torch.equal(_tensor_by_disk_name(model, name), expected), name


def _tensor_by_disk_name(model, name):
    match = re.search(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj", name)
    if match is None:
        return model.state_dict()[name]
    experts = model.get_submodule(match[1])
    if match[3] == "down":
        return experts.down_proj[int(match[2])]
    gate, up = experts.gate_up_proj[int(match[2])].chunk(2)
    return gate if match[3] == "gate" else up


def test_dequantised_model_is_saved_as_a_plain_one(fp8_checkpoint, tmp_path):
    model = HubMoeForCausalLM.from_pretrained(fp8_checkpoint, quantization_config=FineGrainedFP8Config(dequantize=True))
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not any("scale_inv" in name for name in load_file(tmp_path / "plain" / "model.safetensors"))
    plain = HubMoeForCausalLM.from_pretrained(tmp_path / "plain")
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_fp8_scales_that_fit_no_block_size_are_refused():
    weight = torch.zeros(300, 128).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="300 cannot be cut into 7 FP8 blocks"):
        dequantize_blocks(weight, torch.ones(7, 1), torch.bfloat16)
