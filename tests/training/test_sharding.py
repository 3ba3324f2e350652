"""`hub-moe train` with `fsdp_size` and `ep_size` in two processes on the CPU, against one process.

Two starts of two processes: the command, which Ctrl-C ends; and all other runs, the resumed one first.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from hub_moe.anatomy import find_moe_layers
from hub_moe.errors import ConfigError, DivergenceError
from hub_moe.training import read_metrics
from hub_moe.training import run as run_module
from hub_moe.training.balancing import gather_bias
from hub_moe.training.preview import preview_run
from hub_moe.training.run_config import parse_run_config

from .distributed import ROOT, run_ranks
from .runs import make_tables, read_losses, read_weights, run, save_base, write_rows

SHARDED = {
    "interrupted": ("hub_moe", "full", {"fsdp_size": 2, "ep_size": 2, "steps": 16, "checkpoints": 1}),
    "full": ("bfloat16", "full", {"fsdp_size": 2, "micro_batch_size": 1, "checkpoints": 1}),
    "pretrain": ("deepseek_v3", "pretrain", {"fsdp_size": 2, "ep_size": 2, "checkpoints": 0}),
}
FAULTY = {
    "too many": ("deepseek_v3", "full", {"fsdp_size": 3}),
    "uneven": ("nine_experts", "full", {"fsdp_size": 2, "ep_size": 2}),
    "not finite": ("not_finite", "full", {"fsdp_size": 2, "ep_size": 2}),
}


def _tables(folder, name, runs, **training):
    model_type, method, sharding = runs[name]
    base, rows = folder / model_type, folder / "rows.jsonl"
    tables = make_tables(
        folder / name, base=base, rows=rows, method=method, **{"steps": 4, "evaluations": 1, **sharding, **training}
    )
    return {**tables, "balancing": {"speed": 0.01}}


def _run_all(asked):
    """What comes of each run in this process: the balancing biases after training, or the error."""
    outcomes, train = {}, run_module.train

    def train_and_look(prepared, *arguments):
        session = train(prepared, *arguments)
        biases = [layer.balancing_bias for layer in find_moe_layers(prepared.model)]
        outcomes[name] = [gather_bias(bias_E).clone() for bias_E in biases]
        return session

    run_module.train = train_and_look
    for name, tables in asked.items():
        try:
            run(tables)
        except (ConfigError, DivergenceError) as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """Bases and rows."""
    path = tmp_path_factory.mktemp("sharding")
    write_rows(path / "rows.jsonl")
    for model_type in ("hub_moe", "deepseek_v3"):
        save_base(path / model_type, model_type, tiny_tokenizer)
    save_base(path / "nine_experts", "deepseek_v3", tiny_tokenizer, n_routed_experts=9, n_group=1, topk_group=1)
    model = AutoModelForCausalLM.from_pretrained(path / "deepseek_v3")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[3, 0, 0] = float("nan")
    model.save_pretrained(path / "not_finite")
    AutoModelForCausalLM.from_pretrained(path / "deepseek_v3", dtype=torch.bfloat16).save_pretrained(path / "bfloat16")
    for name in ("not_finite", "bfloat16"):
        tiny_tokenizer.save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def interrupted(folder):
    """The command in two processes, stopped by Ctrl-C after a step or more: what it wrote to stderr."""
    (folder / "run.toml").write_text(parse_run_config(_tables(folder, "interrupted", SHARDED)).to_toml(), "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "hub_moe", "train", str(folder / "run.toml")]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    errors = []
    with subprocess.Popen(command, cwd=ROOT, env=surroundings, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            errors.append(line)
            if line.startswith("step 1/16"):
                process.send_signal(signal.SIGINT)
    assert process.returncode != 0
    assert not (folder / "interrupted" / "report.json").exists()
    return "".join(errors)


@pytest.fixture(scope="module")
def two_processes(folder, interrupted):
    """What came of every run, in each process."""
    assert "Interrupted. A checkpoint is in" in interrupted, interrupted[-4000:]
    asked = {name: _tables(folder, name, SHARDED) for name in SHARDED}
    return run_ranks(_run_all, asked | {name: _tables(folder, name, FAULTY) for name in FAULTY})


@pytest.fixture(scope="module")
def one_process(folder, two_processes):
    """The same runs in this process, by name."""
    return {
        name: run(
            {
                **_tables(folder, name, SHARDED, fsdp_size=1, ep_size=1),
                "output": {"folder": str(folder / f"one-{name}")},
            }
        )
        for name in SHARDED
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_run_is_that_of_one_process(folder, one_process, name):
    alone, sharded = one_process[name], folder / name
    for (step, *losses), (step_alone, *losses_alone) in zip(
        read_losses(sharded), read_losses(alone.folder), strict=True
    ):
        assert step == step_alone
        assert losses == pytest.approx(losses_alone, abs=1e-5)
    for row, row_alone in zip(
        read_metrics(sharded / "metrics.jsonl"), read_metrics(alone.folder / "metrics.jsonl"), strict=True
    ):
        for figure in ("tokens", "imbalance", "dead_experts", "max_balancing_bias"):
            assert row.get(figure) == row_alone.get(figure)
    report = json.loads((sharded / "report.json").read_text("utf-8"))
    assert (report["numbers"], report["tokens"]) == (alone.report["numbers"], alone.report["tokens"])
    assert report["processes"] == 2
    assert (0 < report["resumed_at_step"] < 16) if name == "interrupted" else report["resumed_at_step"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_its_proof_and_its_model_are_those_of_one_process(folder, one_process, two_processes, name):
    alone = one_process[name]
    changes = json.loads((folder / name / "what_changed.json").read_text("utf-8"))
    assert changes["totals"] == alone.changes["totals"]
    assert changes["violations"] == alone.changes["violations"]
    before = [(row["kind"], row["layer"], row["sha256_before"]) for row in changes["rows"]]
    assert before == [(row["kind"], row["layer"], row["sha256_before"]) for row in alone.changes["rows"]]
    model = AutoModelForCausalLM.from_pretrained(folder / name / "model")
    expected = AutoModelForCausalLM.from_pretrained(alone.result)
    tolerance = 1e-2 if name == "full" else 1e-4  # rounding to bfloat16 may fall to either side
    for key, tensor in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[key], tensor, atol=tolerance), key
    written, written_alone = read_weights(folder / name / "model"), read_weights(alone.result)
    assert {key: t.dtype for key, t in written.items()} == {key: t.dtype for key, t in written_alone.items()}
    assert (folder / name / "model" / "config.json").read_text() == (alone.result / "config.json").read_text()
    for rank in two_processes:
        for layer, bias_E in zip(find_moe_layers(expected), rank[name], strict=True):
            assert torch.equal(layer.balancing_bias, bias_E)
            assert bias_E.abs().max() > 0


@pytest.mark.slow
def test_a_checkpoint_of_sharded_processes_loads_in_one(folder, two_processes):
    (checkpoint,) = (folder / "full" / "checkpoints").iterdir()
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.dtype == torch.float32
    result = AutoModelForCausalLM.from_pretrained(folder / "full" / "model").state_dict()
    assert all(torch.equal(tensor.to(result[key].dtype), result[key]) for key, tensor in model.state_dict().items())


@pytest.mark.slow
def test_what_does_not_fit_is_one_sentence_in_every_process(two_processes):
    for rank in two_processes:
        assert rank["too many"].startswith("ConfigError: [training] fsdp_size is 3, and the number of processes is 2")
        assert "ep_size = 2 do not fit" in rank["uneven"]
        assert "Cannot evenly shard 9 experts across 2" in rank["uneven"]
        assert "DivergenceError: The held-out loss before training is not finite" in rank["not finite"]
        assert "the weight model.layers.2.mlp.experts.down_proj is not finite" in rank["not finite"]


def test_sharding_in_a_single_process_says_how_to_start_it(folder):
    with pytest.raises(ConfigError, match="start the run by torchrun --nproc-per-node 2"):
        run(_tables(folder, "full", SHARDED))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fsdp_size": 3, "ep_size": 2}, "ep_size is 2 and fsdp_size 3; the second must be a multiple"),
        ({"ep_size": 2}, "ep_size is 2 and fsdp_size 1"),
        ({"fsdp_size": 0}, "fsdp_size is 0; expected a number above 0"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(folder, change, message):
    with pytest.raises(ConfigError, match=message):
        parse_run_config(
            make_tables(folder / "x", base=folder / "hub_moe", rows=folder / "rows.jsonl", method="full", **change)
        )


@pytest.mark.parametrize("method", ["experts", {"name": "lora", "target_modules": ["o_proj"]}])
def test_methods_that_train_a_part_of_the_base_are_not_sharded(folder, method):
    tables = make_tables(folder / "x", base=folder / "hub_moe", rows=folder / "rows.jsonl", method=method, fsdp_size=2)
    with pytest.raises(ConfigError, match="only the methods full and pretrain can use"):
        parse_run_config(tables)


def test_a_dry_run_in_one_process_divides_the_memory(folder):
    whole, half = (
        preview_run(parse_run_config(_tables(folder, "full", SHARDED, fsdp_size=size)))["memory_bytes"]
        for size in (1, 2)
    )
    assert half == {what: size_bytes // 2 for what, size_bytes in whole.items()}
