"""A run file: what it says, what it may not say, and that it is written as it was read."""

import pytest

from hub_moe.errors import ConfigError
from hub_moe.training.method_config import ExpertsMethod
from hub_moe.training.run_config import parse_run_config, read_run_config

TABLES = {
    "model": {"name": "alice/base"},
    "data": {"source": "rows.jsonl"},
    "method": {"name": "experts", "score": "gate"},
    "training": {"steps": 10, "learning_rate": 1},
    "output": {"folder": "runs/a"},
}


def _with(table, **changes):
    values = {key: value for key, value in {**TABLES.get(table, {}), **changes}.items() if value is not None}
    return {**TABLES, table: values}


def test_a_file_becomes_a_config_with_every_default(tmp_path):
    (tmp_path / "run.toml").write_text(
        '[model]\nname = "alice/base"\n[data]\nsource = ["a.jsonl", "b.jsonl"]\ncolumns = {prompt = "q"}\n'
        '[data.evaluation]\nsource = "c.jsonl"\n[method]\nname = "experts"\n'
        '[training]\nepochs = 2\nlearning_rate = 1e-4\n[output]\nfolder = "runs/a"\n'
    )
    config = read_run_config(tmp_path / "run.toml", ["training.batch_size=16", "data.split=train[:10]"])
    assert config.data.rows.source == ("a.jsonl", "b.jsonl")
    assert config.data.rows.split == "train[:10]"
    assert config.data.evaluation.source == "c.jsonl"
    assert config.training.batch_size == 16
    assert config.training.epochs == 2.0
    assert config.method == ExpertsMethod(
        score="token", top_p=0.2, sample_rows=512, shared_experts=False, non_expert_modules=False
    )
    (tmp_path / "written.toml").write_text(config.to_toml(), "utf-8")
    assert read_run_config(tmp_path / "written.toml") == config


@pytest.mark.parametrize("text", ["plain", 'quote " and \\', "ä – 中文", "line\nbreak\ttab\x7f"])
def test_any_text_survives_writing_and_reading(tmp_path, text):
    config = parse_run_config(_with("data", columns={text: text}))
    (tmp_path / "run.toml").write_text(config.to_toml(), "utf-8")
    assert read_run_config(tmp_path / "run.toml") == config


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (_with("training", learning_rat=1), r"^\[training\] has no key 'learning_rat'; did you mean learning_rate\?$"),
        (_with("data", sorce="x"), r"^\[data\] has no key 'sorce'; did you mean source\?$"),
        ({**TABLES, "trainig": {}}, r"^The file has no key 'trainig'; did you mean training\?$"),
        ({key: TABLES[key] for key in TABLES if key != "output"}, r"^The file lacks the table \[output\]\.$"),
        (_with("training", learning_rate=None), "lacks the key learning_rate"),
        (_with("training", epochs=1), "has both steps and epochs"),
        (_with("training", steps=None), "has neither steps nor epochs"),
        (_with("training", steps="ten"), "steps must be a whole number, not 'ten'"),
        (_with("training", steps=True), "steps must be a whole number, not True"),
        (_with("training", steps=0), "steps is 0; expected a number above 0"),
        (_with("training", schedule="cosin"), "schedule is 'cosin'; expected one of 'linear', 'cosine', 'constant'"),
        (_with("training", batch_size=6, micro_batch_size=4), "must be a multiple"),
        (_with("training", warmup=1.0), "warmup is 1.0; expected a share below 1"),
        (_with("training", report_to="wandb"), "report_to must be an array, not 'wandb'"),
        (_with("data", held_out=0.0), "held_out is 0.0; expected a share between 0 and 1"),
        (_with("data", packing="yes"), "packing must be true or false, not 'yes'"),
        (_with("method", name="expert"), "name is 'expert'; did you mean experts"),
        (_with("method", name=None), "needs the key name"),
        (_with("method", r=8), r"has the key r, which is for lora and not for experts"),
        (_with("method", choice="a.json"), "has both choice and score"),
        (_with("method", top_p=20), "top_p is 20.0; expected a share above 0 and at most 1"),
        (_with("method", top_p=0.2, share=0.1), "has both top_p and share; keep one"),
        (_with("method", share=0.0), "share is 0.0; expected a share above 0 and at most 1"),
        ({**TABLES, "method": {"name": "lora"}}, "names nothing to adapt"),
        ({**TABLES, "method": {"name": "lora", "r": 0, "routed_experts": True}}, "r is 0; expected at least 1"),
        ({**TABLES, "method": {"name": "full", "top_p": 0.1}}, "has the key top_p, which is for experts"),
        (_with("model", preset="nano"), r"\[model\] needs either name"),
        (_with("model", learn_vocab_size=500), "learn_vocab_size, which is for the method pretrain only"),
        ({**_with("model", name=None, preset="nano"), "method": {"name": "pretrain"}}, "needs tokenizer, or learn"),
        ({**TABLES, "balancing": {"speed": -1}}, "speed is -1.0; expected 0 or more"),
        ({**TABLES, "output": {"folder": " "}}, "folder is empty"),
        ({**TABLES, "model": "alice/base"}, r"\[model\] must be a table, not 'alice/base'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tables, message):
    with pytest.raises(ConfigError, match=message):
        parse_run_config(tables)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=10", "not of the form TABLE.KEY=VALUE"),
        ("training.steps", "not of the form TABLE.KEY=VALUE"),
        ("training.steps.more=1", "steps is a value and not a table"),
        ("training.stpes=1", "did you mean steps"),
    ],
)
def test_an_override_that_does_not_fit_is_one_sentence(tmp_path, override, message):
    (tmp_path / "run.toml").write_text(parse_run_config(TABLES).to_toml())
    with pytest.raises(ConfigError, match=message):
        read_run_config(tmp_path / "run.toml", [override])


def test_a_file_that_is_not_there_or_no_toml_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="Cannot read .*: No such file"):
        read_run_config(tmp_path / "absent.toml")
    (tmp_path / "run.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_run_config(tmp_path / "run.toml")
