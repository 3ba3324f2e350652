import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hub_moe.data import BlockDataset
from hub_moe.errors import CheckpointError, UnsupportedModelError
from hub_moe.training import BalancingCallback, RunMetrics, measure_imbalance, read_metrics
from hub_moe.training.metrics_file import MetricsFile

from ..anatomy.families import tiny_config as family_config


class _KeepLogs(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        return control


def _trainer(model, folder, *callbacks, steps=4, **arguments):
    rows = torch.randint(2, 128, (32, 8), generator=torch.Generator().manual_seed(0))
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            **{"save_strategy": "no", "logging_steps": 1, **arguments},
        ),
        train_dataset=BlockDataset(rows),
        eval_dataset=BlockDataset(rows[:4]),
        callbacks=list(callbacks),
    )


def _train(model, folder, *callbacks, resume=False, with_energy=False, **arguments):
    trainer = _trainer(model, folder, *callbacks, **arguments)
    metrics = RunMetrics(folder / "metrics.jsonl", with_energy=with_energy)
    metrics.add_to(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return metrics, trainer


def test_a_row_of_each_step_says_what_happened(tiny_model, tmp_path):
    balancing = BalancingCallback(speed=0.01, window_steps=1)
    _, trainer = _train(tiny_model, tmp_path, balancing)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["tokens"] for row in rows] == [16, 32, 48, 64]
    for row, entry, loads in zip(rows, logged, balancing.history, strict=True):
        assert {name: row[name] for name in ("loss", "learning_rate", "grad_norm")} == {
            name: entry[name] for name in ("loss", "learning_rate", "grad_norm")
        }
        loads_NE = torch.tensor(loads)
        assert list(row["imbalance"]) == ["1", "2"]
        assert list(row["imbalance"].values()) == pytest.approx(measure_imbalance(loads_NE).tolist(), abs=1e-4)
        assert row["imbalance_worst"] == max(row["imbalance"].values())
        assert list(row["dead_experts"].values()) == (loads_NE == 0).sum(dim=-1).tolist()
        assert row["tokens_per_s"] > 0
        assert 0 < row["utilisation"] < 1
        assert row["peak_source"].startswith("measured: ")
        assert "energy_kwh" not in row
    assert rows[0]["max_balancing_bias"] == pytest.approx(0.01)


def test_a_window_of_several_steps_and_micro_batches_is_one_row(tiny_model, tmp_path):
    balancing = BalancingCallback(window_steps=2)
    _train(tiny_model, tmp_path, balancing, logging_steps=2, gradient_accumulation_steps=2)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["tokens"]) for row in rows] == [(2, 64), (4, 128)]
    for row, loads in zip(rows, balancing.history, strict=True):
        imbalances = measure_imbalance(torch.tensor(loads)).tolist()
        assert list(row["imbalance"].values()) == pytest.approx(imbalances, abs=1e-4)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v2", "mixtral", "olmoe"])
def test_a_family_without_a_bias_is_measured_too(model_type, tmp_path):
    _train(AutoModelForCausalLM.from_config(family_config(model_type)), tmp_path, steps=1)
    [row] = read_metrics(tmp_path / "metrics.jsonl")
    assert row["max_balancing_bias"] is None
    assert row["imbalance_worst"] >= 1
    assert row["tokens"] == 16


def test_an_expert_without_a_token_is_dead(tiny_model, tmp_path):
    for layer in tiny_model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias[:3] = -5.0
    _train(tiny_model, tmp_path, steps=1)
    [row] = read_metrics(tmp_path / "metrics.jsonl")
    assert all(count >= 3 for count in row["dead_experts"].values())


def test_loggers_get_the_figures_as_numbers(tiny_model, tmp_path):
    logs = _KeepLogs()
    _train(tiny_model, tmp_path, logs, steps=1)
    first = logs.logs[0]
    assert {"loss", "tokens_per_s", "utilisation", "imbalance_worst", "imbalance/layer_1"} <= set(first)
    assert all(isinstance(value, int | float) for value in first.values())


def test_a_held_out_loss_joins_the_row_of_its_step(tiny_model, tmp_path):
    _train(tiny_model, tmp_path, eval_strategy="steps", eval_steps=3, logging_steps=2)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], "loss" in row, "eval_loss" in row) for row in rows] == [
        (2, True, False),
        (3, False, True),
        (4, True, True),  # Trainer evaluates at the end, too
    ]


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_a_resumed_run_has_each_step_once_as_one_that_went_through(tiny_config, tmp_path, logging_steps):
    from hub_moe.modeling import HubMoeForCausalLM

    def train(name, stop, **arguments):
        torch.manual_seed(0)
        model = HubMoeForCausalLM(tiny_config)
        options = {"steps": 8, "save_strategy": "steps", "save_steps": 3, "logging_steps": logging_steps}
        return _train(model, tmp_path / name, _StopAt(stop), **options, **arguments)

    train("through", 8)
    train("stopped", 5)
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    train("stopped", 8, resume=str(tmp_path / "stopped" / "checkpoint-3"))
    through, stopped = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("through", "stopped"))
    assert [row["step"] for row in stopped] == [row["step"] for row in through]
    names = ["tokens", "imbalance", "dead_experts", "learning_rate", "max_balancing_bias"]
    if logging_steps == 1:
        names.append("loss")  # over several steps Trainer itself forgets, on resume, those before the checkpoint
    for name in names:
        assert [row[name] for row in stopped] == [row[name] for row in through], name


def test_a_dense_model_is_an_error_that_names_it(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match="'llama' has no routed experts"):
        _train(LlamaForCausalLM(config), tmp_path)


def test_training_leaves_no_hooks(tiny_model, tmp_path):
    _train(tiny_model, tmp_path, steps=1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_model.modules())


def test_a_number_that_json_lacks_is_null(tmp_path):
    file = MetricsFile(tmp_path / "deep" / "metrics.jsonl")
    file.open_after(0)
    file.write({"step": 1, "loss": float("nan")})
    assert json.loads(file.path.read_text()) == {"step": 1, "loss": None}


def test_a_row_that_is_none_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(CheckpointError, match="line 2 is not a JSON object with a step"):
        read_metrics(path)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="Cannot read the metrics"):
        read_metrics(tmp_path / "metrics.jsonl")
