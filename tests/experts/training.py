"""A tiny model of any family, trained for two steps on one batch."""

import torch
from transformers import AutoModelForCausalLM

from hub_moe.anatomy import find_moe_layers, hash_tensor, named_tensors

from ..anatomy.families import tiny_config

IDS = torch.arange(24).reshape(2, 12)
CHOSEN = {1: [6, 1], 2: [0]}


def build(model_type="hub_moe", **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).train()


def hashes(model):
    return {name: hash_tensor(view) for name, *_, view in named_tensors(model, find_moe_layers(model))}


def train(model, *, steps=2):
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    for _ in range(steps):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer
