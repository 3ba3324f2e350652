import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hub_moe.anatomy import find_moe_layers, hash_tensor
from hub_moe.experts import freeze_all_but, merge_experts, split_experts, trained_tensors

from ..anatomy.families import FAMILIES
from .training import CHOSEN, IDS, build, hashes, train


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_split_model_is_saved_merged_and_stays_split(model_type, tmp_path):
    model = build(model_type)
    index = find_moe_layers(model)[-1].index
    freeze_all_but(model, {index: [6, 1]}, shared_experts=False, non_expert_modules=False)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model)
    trained = {name: hash_tensor(view) for name, view in trained_tensors(model).items()}
    logits = model.eval()(IDS, use_cache=False).logits
    model.save_pretrained(tmp_path)

    assert {name: hash_tensor(view) for name, view in trained_tensors(model).items()} == trained
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items() if ".chosen." not in name)
    assert "_split" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hashes(loaded).items() >= trained.items()
    torch.testing.assert_close(loaded(IDS, use_cache=False).logits, logits)


def test_a_state_dict_given_to_save_pretrained_is_merged_too_and_not_changed(tmp_path):
    model = build()
    freeze_all_but(model, CHOSEN, shared_experts=False, non_expert_modules=False)
    train(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = dict(state)
    model.save_pretrained(tmp_path, state_dict=given)

    assert given.keys() == state.keys()
    loaded = hashes(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert loaded.items() >= {name: hash_tensor(view) for name, view in trained_tensors(model).items()}.items()


def test_a_failed_save_leaves_the_frozen_stack_as_it_was(tmp_path):
    model = build()
    freeze_all_but(model, CHOSEN, shared_experts=False, non_expert_modules=False)
    train(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="it is a file"):
        model.save_pretrained(tmp_path / "file")

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_split_model_trains_merges_and_saves_by_itself(duplicate, tmp_path):
    model = build()
    freeze_all_but(model, CHOSEN, shared_experts=False, non_expert_modules=False)
    before = hashes(model)
    twin = duplicate(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    train(twin)
    twin.save_pretrained(tmp_path)
    trained = {name: hash_tensor(view) for name, view in trained_tensors(twin).items()}
    merge_experts(twin)

    assert hashes(twin).items() >= trained.items()
    assert hashes(AutoModelForCausalLM.from_pretrained(tmp_path)).items() >= trained.items()
    assert hashes(model) == before
    merge_experts(model)


def test_a_state_dict_brings_a_split_model_back_exactly():
    model, other = build(), build()
    for each in (model, other):
        freeze_all_but(each, CHOSEN, shared_experts=False, non_expert_modules=False)
    train(model)
    other.load_state_dict(model.state_dict())

    assert hashes(other) == hashes(model)


@pytest.mark.parametrize("model_type", ["hub_moe", "qwen3_moe"])
def test_a_split_model_takes_the_state_dict_of_a_merged_one(model_type):
    merged, model = build(model_type), build(model_type)
    for each in (merged, model):
        freeze_all_but(each, CHOSEN, shared_experts=False, non_expert_modules=False)
    train(merged)
    merge_experts(merged)
    base = find_moe_layers(model)[0].experts.down_proj.detach().clone()
    model.load_state_dict(merged.state_dict())

    assert hashes(model) == hashes(merged)
    assert torch.equal(find_moe_layers(model)[0].experts.down_proj, base)
    assert all(each.requires_grad == (".chosen." in name) for name, each in model.named_parameters())


def test_a_split_model_takes_a_saved_checkpoint_by_its_names_on_disk(tmp_path):
    saved, model = build(), build()
    for each in (saved, model):
        freeze_all_but(each, CHOSEN, shared_experts=False, non_expert_modules=False)
    train(saved)
    saved.save_pretrained(tmp_path)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))

    assert hashes(model) == hashes(saved)


def test_a_part_of_a_state_dict_leaves_the_trained_experts_alone():
    model = build().to(torch.bfloat16)
    freeze_all_but(model, CHOSEN, shared_experts=False, non_expert_modules=False, dtype=torch.float32)
    train(model)
    chosen = find_moe_layers(model)[0].experts.chosen
    trained = {name: each.detach().clone() for name, each in chosen.named_parameters()}
    model.load_state_dict({"lm_head.weight": torch.ones(128, 32)}, strict=False)

    assert find_moe_layers(model)[0].experts.chosen is chosen
    assert all(torch.equal(each, trained[name]) for name, each in chosen.named_parameters())


def test_a_state_dict_that_lacks_something_is_refused_and_the_model_stays_split():
    model = build()
    split_experts(model, CHOSEN)
    state = build().state_dict()
    del state["model.layers.1.mlp.experts.down_proj"]
    before = hashes(model)
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.1\.mlp\.experts\.down_proj"):
        model.load_state_dict(state)

    assert hashes(model) == before
    assert find_moe_layers(model)[0].experts.chosen.expert_ids == (1, 6)
