"""The recipes in `evals/recipes` are run files that fit, one for each method."""

from pathlib import Path

import pytest

from hub_moe.training import read_run_config, run_training

from .runs import save_base, write_rows

RECIPES = sorted((Path(__file__).parents[2] / "evals" / "recipes").glob("*.toml"))


def test_there_is_a_recipe_for_each_method():
    assert [path.stem for path in RECIPES] == ["experts", "full", "lora", "pretrain"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_on_other_rows_and_another_model(path, tmp_path, tiny_tokenizer):
    overrides = [
        "training.steps=2",
        "data.config=",
        "data.split=",
        "data.max_length=64",
        f"output.folder={tmp_path}/run",
    ]
    if path.stem == "pretrain":
        (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 2000, "utf-8")
        overrides += [f"data.source={tmp_path}/text.txt", "model.learn_vocab_size=300"]
    else:
        base = save_base(tmp_path / "base", "hub_moe", tiny_tokenizer)
        overrides += [f"data.source={write_rows(tmp_path / 'rows.jsonl')}", f"model.name={base}"]
        overrides += ["data.columns.prompt=prompt", "data.columns.completion=completion"]
        overrides += ["data.chat_template=plain"]
    result = run_training(read_run_config(path, overrides), say=lambda text: None)
    assert result.report["method"] == path.stem
    assert result.report["steps"] == 2
    assert result.result.is_dir()
