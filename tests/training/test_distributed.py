"""Two processes on the CPU (gloo) against one: losses, balancing bias, checkpoints."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hub_moe.anatomy import find_moe_layers
from hub_moe.data import BlockDataset
from hub_moe.training import BalancingCallback, RunMetrics, read_metrics

from ..anatomy.families import tiny_config
from .distributed import run_ranks

pytestmark = pytest.mark.slow

FAMILIES = ["hub_moe", "deepseek_v3"]
STEPS, GLOBAL_BATCH = 4, 4
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["HubMoeDecoderLayer"]}}


def _train(model_type, folder, *, per_device, accumulation=1, **arguments):
    """Losses, balancing biases and row count after a short training whose global batch is always the same."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    rows = torch.randint(2, 128, (STEPS * GLOBAL_BATCH, 12), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=STEPS,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            **arguments,
        ),
        train_dataset=BlockDataset(rows),
        callbacks=[BalancingCallback(speed=0.01, is_centred=True, window_steps=1)],
    )
    metrics = RunMetrics(f"{folder}/metrics.jsonl")
    metrics.add_to(trainer)
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "biases": [layer.balancing_bias.clone() for layer in find_moe_layers(trainer.model)],
        "history": trainer.callback_handler.callbacks[-2].history if False else None,
        "model_class": type(trainer.model_wrapped).__name__,
    }


def _train_families(folder, strategy):
    arguments = FSDP2 if strategy == "fsdp2" else {}
    return {family: _train(family, f"{folder}/{family}", per_device=2, **arguments) for family in FAMILIES}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {family: _train(family, str(folder / family), per_device=GLOBAL_BATCH) for family in FAMILIES}


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two_processes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return Path(folder), run_ranks(_train_families, str(folder), request.param)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_give_the_losses_and_the_bias_of_one(one_process, two_processes, family):
    folder, ranks = two_processes
    print(one_process[family], [rank[family] for rank in ranks])
    for rank in ranks:
        assert rank[family]["losses"] == pytest.approx(one_process[family]["losses"], abs=1e-5)
        for bias_E, expected_E in zip(rank[family]["biases"], one_process[family]["biases"], strict=True):
            assert torch.equal(bias_E, expected_E)
            assert bias_E.abs().max() > 0
