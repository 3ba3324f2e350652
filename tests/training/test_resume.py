"""A run killed by SIGKILL and started again ends bit for bit as one that nobody killed, whatever it trains."""

import json

import pytest
import torch

from hub_moe.errors import CheckpointError
from hub_moe.training import find_checkpoint

from .runs import CHOICE, make_tables, read_losses, read_weights, run, run_killed, save_base, write_rows

pytestmark = pytest.mark.slow

LORA = {"name": "lora", "r": 2, "target_modules": ["o_proj"], "routed_experts": True}
RUNS = {
    "full, stacks, micro-batches": ("deepseek_v3", "full", {"micro_batch_size": 2}, {}),
    "full, padded rows": ("qwen3_moe", "full", {"gradient_checkpointing": True}, {"packing": False}),
    "experts, micro-batches of one row": ("qwen3_moe", "experts", {"micro_batch_size": 1}, {"packing": False}),
    "experts, packed, balanced": ("deepseek_v3", "experts", {"schedule": "cosine"}, {}),
    "lora": ("deepseek_v3", LORA, {"micro_batch_size": 2}, {}),
    "pretrain, balanced": ("hub_moe", "pretrain", {"micro_batch_size": 2, "weight_decay": 0.1}, {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_as_if_it_had_never_been_killed(name, tmp_path, tiny_tokenizer):
    model_type, method, training, data = RUNS[name]
    (tmp_path / "choice.json").write_text(json.dumps(CHOICE), "utf-8")
    method = {"name": "experts", "choice": str(tmp_path / "choice.json")} if method == "experts" else method
    base = save_base(tmp_path / "base", model_type, tiny_tokenizer)
    rows = write_rows(tmp_path / "rows.jsonl")
    tables = make_tables(tmp_path / "killed", base=base, rows=rows, method=method, **training)
    tables["data"] |= data
    if name.endswith("balanced"):
        tables["balancing"] = {"speed": 0.01, "stop_at": 0.9}
    run_killed(tables, step=5)
    assert find_checkpoint(tmp_path / "killed" / "checkpoints").name == "checkpoint-4"
    resumed = run(tables)
    whole = run({**tables, "output": {"folder": str(tmp_path / "whole")}})
    assert resumed.report["resumed_at_step"] == 4
    assert whole.report["resumed_at_step"] is None
    assert read_losses(resumed.folder) == read_losses(whole.folder)
    assert resumed.report["tokens"] == whole.report["tokens"]
    assert resumed.changes == whole.changes
    weights, expected = read_weights(resumed.result), read_weights(whole.result)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_a_run_killed_after_its_last_step_is_only_finished(tmp_path, tiny_tokenizer):
    base = save_base(tmp_path / "base", "deepseek_v3", tiny_tokenizer)
    tables = make_tables(tmp_path / "run", base=base, rows=write_rows(tmp_path / "rows.jsonl"), method="full", steps=2)
    first = run(tables)
    weights = read_weights(first.result)
    (tmp_path / "run" / "report.json").unlink()
    again = run(tables)
    assert again.report["resumed_at_step"] == 2
    assert again.report["held_out_loss"] == first.report["held_out_loss"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_weights(again.result).items())


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path, tiny_tokenizer):
    from safetensors.torch import load_file, save_file

    base = save_base(tmp_path / "base", "qwen3_moe", tiny_tokenizer)
    tables = make_tables(tmp_path / "run", base=base, rows=write_rows(tmp_path / "rows.jsonl"), method="full", steps=2)
    run(tables)
    (tmp_path / "run" / "report.json").unlink()
    (file,) = (tmp_path / "run" / "checkpoints").glob("*/model.safetensors")
    tensors = load_file(file)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.experts" not in name}, file, {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\..* is missing from the checkpoint"):
        run(tables)
