"""Two processes on the CPU (gloo) against one: losses, gradients, balancing bias, checkpoints.

The strategies: DDP, FSDP2 as transformers shards a model at load time, and that with experts on different ranks.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from hub_moe.anatomy import find_moe_layers
from hub_moe.data import BlockDataset
from hub_moe.training import AuxLossOnce, BalancingCallback, RunMetrics, measure_imbalance, read_metrics
from hub_moe.training.balancing import gather_bias

from ..anatomy.families import tiny_config
from .distributed import run_ranks

pytestmark = pytest.mark.slow

FAMILIES = ["hub_moe", "deepseek_v3"]
STRATEGIES = {"ddp": None, "fsdp2": {"fsdp_size": 2}, "experts": {"fsdp_size": 2, "ep_size": 2}}
STEPS, GLOBAL_BATCH, LENGTH = 4, 4, 12


def _train(base, output, *, per_device, strategy=None, callbacks=(), rows=None, **arguments):
    """Trains the model saved in `base`; the global batch is always the same. The trainer and its BalancingCallback."""
    kwargs = {"distributed_config": DistributedConfig(**strategy)} if strategy else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **kwargs)
    if rows is None:
        tokens = torch.randint(2, 128, (STEPS * GLOBAL_BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
        rows = BlockDataset(tokens)
    balancing = BalancingCallback(speed=0.01, is_centred=True, window_steps=STEPS)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=per_device,
            train_sampling_strategy="sequential",
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_only_model=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            **{"max_steps": STEPS, "save_steps": STEPS, **arguments},
        ),
        train_dataset=rows,
        callbacks=[balancing, *callbacks],
    )
    RunMetrics(f"{output}/metrics.jsonl").add_to(trainer)
    trainer.train()
    return trainer, balancing


def _describe(base, output, **kwargs):
    trainer, balancing = _train(base, output, **kwargs)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "biases": [gather_bias(layer.balancing_bias).clone() for layer in find_moe_layers(trainer.model)],
        "history": balancing.history,
        "tokens": balancing.tokens,
        "wrapper": type(trainer.model_wrapped).__name__,
        "placements": {name: str(getattr(p, "placements", None)) for name, p in trainer.model.named_parameters()},
    }


def _train_all(folder):
    """Every strategy and family in one start of the processes, and the gradients of one step."""
    results = {
        (strategy, family): _describe(
            f"{folder}/{family}", f"{folder}/{strategy}-{family}", per_device=2, strategy=STRATEGIES[strategy]
        )
        for strategy in STRATEGIES
        for family in FAMILIES
    }
    statics = _describe(f"{folder}/ernie4_5_moe", f"{folder}/statics", per_device=2, strategy=STRATEGIES["fsdp2"])
    return {
        **results,
        "statics": statics,
        "gradients": [_gradients(folder, num_ignored=count) for count in (0, 9)],
        "aux": _aux_gradient(folder),
    }


class _KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _gradients(folder, *, num_ignored, per_device=1, accumulation=1):
    """Gradients of one step of two rows, one with fewer labels, in a model with every loss that the class has."""
    tokens = torch.randint(2, 128, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[1, :num_ignored] = -100
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    keeper = _KeepGradients()
    _train(
        f"{folder}/every_loss",
        f"{folder}/gradients-{accumulation}",
        per_device=per_device,
        callbacks=[keeper],
        rows=rows,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0,
        max_steps=1,
        save_strategy="no",
    )
    return keeper.gradients


def _aux_gradient(folder, *, trainer_class=AuxLossOnce, accumulation=1):
    """A router's gradient of one step of qwen3_moe over equal rows, which have one auxiliary loss however divided."""
    torch.manual_seed(0)
    config = tiny_config("qwen3_moe", output_router_logits=True, router_aux_loss_coef=1.0)
    keeper = _KeepGradients()
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_config(config),
        args=TrainingArguments(
            output_dir=f"{folder}/aux",
            max_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
        ),
        train_dataset=BlockDataset(torch.arange(2, 2 + LENGTH).repeat(4, 1)),
        callbacks=[keeper],
    )
    trainer.train()
    return keeper.gradients["model.layers.1.mlp.gate.weight"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models that training starts from, by family."""
    path = tmp_path_factory.mktemp("distributed")
    configs = {family: tiny_config(family) for family in FAMILIES}
    configs["ernie4_5_moe"] = _ernie_config()
    weights = {"aux_loss_alpha": 0.1, "device_aux_loss_alpha": 0.1, "router_z_loss_coef": 0.1, "mtp_loss_coef": 0.3}
    configs["every_loss"] = tiny_config("hub_moe", num_mtp_layers=1, seq_aux=True, **weights)
    for name, config in configs.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path / name)
    return path


def _ernie_config():
    """Its balancing bias is a parameter, which FSDP shards, rather than a buffer."""
    from transformers import Ernie4_5_MoeConfig

    return Ernie4_5_MoeConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=16,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        pad_token_id=1,
    )


@pytest.fixture(scope="module")
def one_process(folder):
    return {family: _describe(folder / family, str(folder / f"one-{family}"), per_device=4) for family in FAMILIES}


@pytest.fixture(scope="module")
def two_processes(folder):
    return run_ranks(_train_all, str(folder))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_give_the_losses_loads_and_biases_of_one(one_process, two_processes, strategy, family):
    expected = one_process[family]
    for rank in two_processes:
        got = rank[strategy, family]
        assert got["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert got["history"] == expected["history"]
        assert got["tokens"] == STEPS * GLOBAL_BATCH * LENGTH
        for bias_E, expected_E in zip(got["biases"], expected["biases"], strict=True):
            assert torch.equal(bias_E, expected_E)
            assert bias_E.abs().max() > 0


def test_the_strategies_are_what_they_say(two_processes):
    experts = "model.layers.1.mlp.experts.down_proj"
    found = {strategy: two_processes[0][strategy, "hub_moe"] for strategy in STRATEGIES}
    assert found["ddp"]["wrapper"] == "DistributedDataParallel"
    assert found["ddp"]["placements"][experts] == "None"
    assert found["fsdp2"]["placements"][experts] == "(Shard(dim=0),)"
    assert found["experts"]["placements"][experts].count("Shard(dim=0") == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_of_two_processes_is_the_model_of_one(folder, one_process, two_processes, strategy, family):
    checkpoint = f"checkpoint-{STEPS}"
    model = AutoModelForCausalLM.from_pretrained(folder / f"{strategy}-{family}" / checkpoint)
    expected = AutoModelForCausalLM.from_pretrained(folder / f"one-{family}" / checkpoint)
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[name], tensor, atol=1e-4), name
    for layer, bias_E in zip(find_moe_layers(model), two_processes[1][strategy, family]["biases"], strict=True):
        assert torch.equal(layer.balancing_bias, bias_E)


def test_a_sharded_parameter_as_bias_is_balanced_on_every_rank(folder, two_processes):
    alone = _describe(folder / "ernie4_5_moe", str(folder / "one-statics"), per_device=4)
    for rank in two_processes:
        assert "Shard" in rank["statics"]["placements"]["model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"]
        assert torch.equal(rank["statics"]["biases"][0], alone["biases"][0])
    assert alone["biases"][0].abs().max() > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_process_writes_the_metrics_of_all(folder, one_process, two_processes, strategy):
    rows = read_metrics(folder / f"{strategy}-hub_moe" / "metrics.jsonl")
    expected = read_metrics(folder / "one-hub_moe" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for name in ("tokens", "imbalance", "dead_experts", "max_balancing_bias"):
        assert [row[name] for row in rows] == [row[name] for row in expected]
    last_load_E = torch.tensor(two_processes[0][strategy, "hub_moe"]["history"][0][0])
    assert measure_imbalance(last_load_E) >= 1
    assert all(0 < row["utilisation"] < 1 for row in rows)


@pytest.mark.parametrize(("place", "num_ignored"), [(0, 0), (1, 9)])
def test_every_loss_has_one_gradient_over_ranks_or_micro_batches(folder, two_processes, place, num_ignored):
    micro_batches = _gradients(folder, num_ignored=num_ignored, accumulation=2)
    assert any("layers.3." in name for name in micro_batches)  # the MTP layer
    for rank in two_processes:
        _assert_close(rank["gradients"][place], micro_batches)


def test_every_loss_has_the_gradient_of_the_undivided_batch(folder, two_processes):
    undivided = _gradients(folder, num_ignored=0, per_device=2)
    _assert_close(two_processes[0]["gradients"][0], undivided)


def test_the_auxiliary_loss_of_stock_families_counts_once(folder, two_processes):
    once = _aux_gradient(folder)
    assert torch.allclose(_aux_gradient(folder, accumulation=4), once, rtol=1e-4, atol=1e-6)
    for rank in two_processes:
        assert torch.allclose(rank["aux"], once, rtol=1e-4, atol=1e-6)
    # what it is for: transformers' own Trainer counts it once a micro-batch
    assert _aux_gradient(folder, trainer_class=Trainer, accumulation=4).norm() > 3 * once.norm()


def _assert_close(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name
