"""A run is one run: its rows, its choice, its base and its folder are those that it began with."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hub_moe.errors import ConfigError, DatasetError, DivergenceError
from hub_moe.training.run_config import parse_run_config
from hub_moe.training.run_inputs import FolderLock

from .runs import CHOICE, make_tables, run, save_base, write_rows


@pytest.fixture
def tables(tmp_path, tiny_tokenizer):
    """Of a short run of chosen experts, whose base, rows and choice are its own."""
    base = save_base(tmp_path / "base", "deepseek_v3", tiny_tokenizer)
    choice = tmp_path / "choice.json"
    choice.write_text(json.dumps(CHOICE), "utf-8")
    method = {"name": "experts", "choice": str(choice)}
    return make_tables(
        tmp_path / "run", base=base, rows=write_rows(tmp_path / "rows.jsonl"), method=method, steps=1, batch_size=2
    )


def _forget_the_end(folder):
    """As a run that was killed after its last checkpoint."""
    (folder / "report.json").unlink()
    shutil.rmtree(folder / "patch")


def test_a_base_whose_weights_changed_is_refused_when_the_run_goes_on(tables, tmp_path):
    finished = run(tables)
    _forget_the_end(finished.folder)
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    original = weights.read_bytes()
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] * 2}, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="began with other weights of its base"):
        run(tables)
    assert not (finished.folder / "patch").exists()
    weights.write_bytes(original)
    assert run(tables).report["held_out_loss"] == finished.report["held_out_loss"]


@pytest.mark.parametrize("is_finished", [True, False])
def test_rows_that_changed_are_refused_by_name(tables, tmp_path, is_finished):
    finished = run(tables)
    if not is_finished:
        _forget_the_end(finished.folder)
    before = (finished.folder / "data_report.json").read_bytes()
    write_rows(tmp_path / "rows.jsonl", number=30)
    with pytest.raises(ConfigError, match="began with other rows"):
        run(tables)
    assert (finished.folder / "data_report.json").read_bytes() == before


def test_a_choice_that_was_edited_is_refused(tables, tmp_path):
    run(tables)
    (tmp_path / "choice.json").write_text(json.dumps({**CHOICE, "experts": {"1": [2]}}), "utf-8")
    with pytest.raises(ConfigError, match="began with other experts in its choice file"):
        run(tables)


def test_one_process_at_a_time_trains_in_a_folder(tables):
    folder = run(tables).folder
    other = FolderLock()
    other.take(folder / "run.toml")
    with pytest.raises(ConfigError, match="Another process trains in"):
        run(tables)
    other.release()
    assert run(tables).folder == folder


def test_an_adapter_that_is_not_finite_is_not_written(tables):
    tables["method"] = {"name": "lora", "r": 2, "alpha": 4, "routed_experts": True}
    tables["training"] |= {"learning_rate": 1e38, "warmup": 0.0, "checkpoints": 0, "evaluations": 0}
    with pytest.raises(DivergenceError, match="not finite"):
        run(tables)
    folder = parse_run_config(tables).output.folder
    assert not (Path(folder) / "adapter").exists()
    assert not (Path(folder) / "report.json").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 2**32), ("num_threads", 10**6), ("learning_rate", float("inf")), ("max_grad_norm", float("nan"))],
)
def test_numbers_that_no_run_can_have_are_refused(tables, key, value):
    tables["training"] |= {key: value}
    with pytest.raises(ConfigError, match=rf"\[training\] {key} is"):
        parse_run_config(tables)


def test_rows_longer_than_the_model_knows_positions_are_refused(tables):
    tables["data"]["max_length"] = 100_000
    with pytest.raises(DatasetError, match="max_length is 100,000, and the model knows positions up to 256"):
        run(tables)


def test_a_folder_has_no_revision(tables):
    tables["model"]["revision"] = "main"
    with pytest.raises(ConfigError, match="is a folder, which has none"):
        run(tables)
