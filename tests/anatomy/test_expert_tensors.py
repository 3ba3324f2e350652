import hashlib

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn
from transformers import AutoModelForCausalLM

from hub_moe.anatomy import expert_tensors, find_moe_layers, hash_tensor, named_tensors, sort_parameters
from hub_moe.anatomy.moe_layers import CHOSEN, ChosenExperts
from hub_moe.errors import CheckpointError, ConfigError

from .families import FAMILIES, tiny_config

# checkpoints of the others rename the block, or keep the experts in stacks
NAMED_ON_DISK_AS_IN_MEMORY = ["hub_moe", "deepseek", "deepseek_v2", "deepseek_v3", "qwen3_moe", "olmoe", "glm4_moe"]


def build(model_type, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))


def split_by_hand(layer, expert_ids):
    layer.experts.add_module(CHOSEN, ChosenExperts(layer.experts, expert_ids))


@pytest.mark.parametrize("model_type", NAMED_ON_DISK_AS_IN_MEMORY)
def test_names_and_contents_are_those_of_a_saved_checkpoint(model_type, tmp_path):
    model = build(model_type)
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    tensors = {name: view for name, _, _, view in named_tensors(model, find_moe_layers(model))}

    assert tensors.keys() == on_disk.keys()
    assert all(torch.equal(tensors[name], on_disk[name]) for name in on_disk)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_number_of_the_model_comes_exactly_once(model_type):
    model = build(model_type)
    layers = find_moe_layers(model)
    persistent = sum(tensor.numel() for tensor in model.state_dict().values())

    rows = list(named_tensors(model, layers))
    assert sum(view.numel() for *_, view in rows) == persistent
    assert len({name for name, *_ in rows}) == len(rows)
    assert {kind for _, kind, *_ in rows} >= {kind.kind for kind in sort_parameters(model, layers)}
    assert all(
        (index is None) == (kind in ("embeddings", "head", "norms")) for _, kind, index, _ in rows if index is None
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_writing_into_a_view_changes_the_model_and_only_that_expert(model_type):
    model = build(model_type)
    layer = find_moe_layers(model)[-1]
    before = {name: parameter.detach().clone() for name, parameter in layer.experts.named_parameters()}
    for view in expert_tensors(layer, 5).values():
        view.fill_(7.0)

    for name, parameter in layer.experts.named_parameters():
        assert (parameter[5] == 7.0).all()
        others = [expert for expert in range(8) if expert != 5]
        assert torch.equal(parameter[others], before[name][others])


def test_a_tied_head_comes_once_under_the_name_of_the_embedding():
    model = build("hub_moe", tie_word_embeddings=True)
    names = [name for name, *_ in named_tensors(model, find_moe_layers(model))]

    assert names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in names


def test_the_balancing_bias_is_there_as_part_of_the_router_and_has_its_layer():
    model = build("deepseek_v3")
    rows = {name: (kind, index) for name, kind, index, _ in named_tensors(model, find_moe_layers(model))}

    assert rows["model.layers.2.mlp.gate.e_score_correction_bias"] == ("router", 2)
    assert rows["model.layers.1.self_attn.o_proj.weight"] == ("attention", 1)
    assert rows["model.norm.weight"] == ("norms", None)


def test_experts_of_an_mtp_layer_are_of_kind_mtp():
    model = build("hub_moe", num_mtp_layers=1)
    rows = {name: (kind, index) for name, kind, index, _ in named_tensors(model, find_moe_layers(model))}

    assert rows["model.layers.3.mlp.experts.0.up_proj.weight"] == ("mtp", 3)


def test_interleaved_experts_with_biases_keep_their_own_names():
    layer = find_moe_layers(build("gpt_oss"))[0]
    shapes = {name: tuple(view.shape) for name, view in expert_tensors(layer, 3).items()}

    assert shapes == {
        "model.layers.0.mlp.experts.3.gate_up_proj": (32, 96),
        "model.layers.0.mlp.experts.3.gate_up_proj_bias": (96,),
        "model.layers.0.mlp.experts.3.down_proj": (48, 32),
        "model.layers.0.mlp.experts.3.down_proj_bias": (32,),
    }


@pytest.mark.parametrize("model_type", FAMILIES)
def test_views_of_chosen_experts_are_the_trained_rows(model_type):
    model = build(model_type)
    layer = find_moe_layers(model)[0]
    split_by_hand(layer, [6, 1])
    for parameter in layer.experts.chosen.parameters():
        nn.init.constant_(parameter, 3.0)

    found = find_moe_layers(model)[0]
    assert found.num_experts == 8
    assert all((view == 3.0).all() for expert in (1, 6) for view in expert_tensors(found, expert).values())
    assert not any((view == 3.0).any() for view in expert_tensors(found, 0).values())


def test_a_split_model_has_the_tensors_and_sizes_of_the_whole_one():
    whole, split = build("hub_moe"), build("hub_moe")
    split_by_hand(find_moe_layers(split)[0], [2])

    def describe(model):
        layers = find_moe_layers(model)
        return [(*row[:3], tuple(row[3].shape)) for row in named_tensors(model, layers)], sort_parameters(model, layers)

    assert describe(split) == describe(whole)


@pytest.mark.parametrize("expert", [-1, 8])
def test_an_expert_out_of_range_is_an_error_that_says_what_there_is(expert):
    with pytest.raises(ConfigError, match=rf"Layer 1 has no expert {expert}; .* from 0 to 7"):
        expert_tensors(find_moe_layers(build("hub_moe"))[0], expert)


def test_names_and_shapes_can_be_had_without_weights():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("hub_moe"))
    real = build("hub_moe")

    def shapes(model):
        return [(name, tuple(view.shape)) for name, *_, view in named_tensors(model, find_moe_layers(model))]

    assert shapes(model) == shapes(real)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_a_hash_is_that_of_the_bytes_in_a_safetensors_file(dtype):
    tensor = torch.arange(-6, 6).reshape(3, 4).to(dtype)
    file = save({"x": tensor})
    header = 8 + int.from_bytes(file[:8], "little")

    assert hash_tensor(tensor) == hashlib.sha256(file[header:]).hexdigest()


def test_a_hash_does_not_depend_on_how_the_tensor_lies_in_memory():
    tensor = torch.randn(5, 6)
    assert hash_tensor(tensor.t().contiguous().t()) == hash_tensor(tensor)
    assert hash_tensor(torch.stack([tensor, tensor])[1]) == hash_tensor(tensor)
    assert hash_tensor(torch.tensor(1.5)) == hashlib.sha256(b"\x00\x00\xc0\x3f").hexdigest()
    assert hash_tensor(torch.zeros(0, 3)) == hashlib.sha256(b"").hexdigest()
    assert hash_tensor(tensor) != hash_tensor(tensor + 1e-6)


def test_a_tensor_without_bytes_has_no_hash():
    with pytest.raises(CheckpointError, match=r"\(2, 3\) is on the meta device"):
        hash_tensor(torch.empty(2, 3, device="meta"))
