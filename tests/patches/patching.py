"""Tiny models of every family and patches for them, as a training run would leave them."""

from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from hub_moe.anatomy import find_moe_layers
from hub_moe.anatomy.expert_tensors import expert_tensors, hash_tensor, named_tensors
from hub_moe.patches import Base, hash_base, make_patch
from hub_moe.patches.folders import Origin
from tests.anatomy.families import tiny_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE = Base("alice/base", COMMIT, "hub_moe")


def build_model(family="hub_moe", *, dtype=torch.float32, seed=0, **changes):
    """A random model of a family of `tests/anatomy/families.py`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # some families start experts and biases at zero or empty
    return model


def last_layers(model, count=2):
    """The index of the last MoE layers."""
    return [layer.index for layer in find_moe_layers(model)][-count:]


def names_of(model, chosen):
    """The tensor names of experts given as layer -> ids."""
    layers = {layer.index: layer for layer in find_moe_layers(model)}
    return [name for index, ids in chosen.items() for expert in ids for name in expert_tensors(layers[index], expert)]


def train_patch(model, names, *, base=BASE, seed=1, size=0.05, **facts):
    """A patch that adds noise to the tensors `names` of `model`, which itself stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor for name, _, _, tensor in named_tensors(model, find_moe_layers(model)) if name in set(names)
    }
    trained = {
        name: (tensor + size * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in tensors.items()
    }
    return make_patch(trained, model_before=hash_base(model, names), base=base, **facts)


def patch_experts(model, chosen, **kwargs):
    """A patch for experts given as layer -> ids."""
    return train_patch(model, names_of(model, chosen), **kwargs)


def hashes(model):
    """Every tensor of a model, experts one by one: name -> sha256."""
    return {name: hash_tensor(tensor) for name, _, _, tensor in named_tensors(model, find_moe_layers(model))}


def changed_names(before, after):
    """The names whose hashes differ."""
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


@torch.no_grad()
def logits_of(model):
    """Logits for one fixed sequence."""
    return model(torch.arange(2, 14)[None]).logits


def all_tensors(model):
    """Every tensor of a model, experts one by one: copies by name."""
    layers = find_moe_layers(model)
    return {name: tensor.clone() for name, _, _, tensor in named_tensors(model, layers)}


def named(patch, name):
    """The patch as if loaded from a folder of this name."""
    return replace(patch, origin=Origin(f"runs/{name}"))
