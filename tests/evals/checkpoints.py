"""Tiny models, patches and adapters in folders, and their records on a part of the offline suite."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hub_moe.evals.models import ModelRequest, load_model
from hub_moe.evals.run import RunFacts, evaluate_suite
from hub_moe.evals.suites import load_suite
from hub_moe.evals.tasks import build_suite
from hub_moe.modeling import HubMoeForCausalLM
from hub_moe.patches import Base
from tests.patches.patching import patch_experts

TASKS = ("cloze", "brackets", "running_text", "copying")


def save_model(folder, config, tokenizer, *, seed=0):
    """A random HubMoe whose answers are not all alike, and its tokenizer."""
    config.max_position_embeddings = 1024
    torch.manual_seed(seed)
    model = HubMoeForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_patch(folder, base, tokenizer, *, seed=1):
    """An expert patch on the model in the folder `base`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    patch = patch_experts(model, {1: [0, 3], 2: [1]}, base=Base(str(base), None, "hub_moe"), seed=seed, size=0.3)
    patch.save(folder, tokenizer=tokenizer)
    return folder


def build(tokenizer, *, limit=6, tasks=TASKS):
    """A part of the offline suite with its requests."""
    return build_suite(load_suite("offline", limit=limit, tasks=tasks), tokenizer=tokenizer)


def evaluate(model, folder, *, limit=6, tasks=TASKS, **request):
    """The record of the model in a folder."""
    loaded = load_model(ModelRequest(str(model), **{"batch_size": 4, **request}))
    return evaluate_suite(loaded, build(loaded.tokenizer, limit=limit, tasks=tasks), Path(folder), RunFacts(["test"]))
