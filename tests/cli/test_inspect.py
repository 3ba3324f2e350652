import json
import sys

import pytest

from hub_moe.cli.inspect import parse_size
from hub_moe.cli.main import main

GPT_OSS = {"model_type": "gpt_oss", "num_hidden_layers": 4, "num_local_experts": 8, "vocab_size": 1000}


@pytest.fixture
def inspect(capsys, monkeypatch):
    """Run `hub-moe inspect` in this process: `(exit code, stdout, stderr)`."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hub-moe", "inspect", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


def write_config(folder, fields):
    (folder / "config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return folder


def test_a_preset_is_told_in_exact_numbers(inspect):
    code, out, err = inspect("deepseek-v2-lite", "--json", "--context", 1000)
    facts = json.loads(out)

    assert (code, err) == (0, "")
    assert (facts["model"], facts["model_type"], facts["layers"]) == ("deepseek-v2-lite", "hub_moe", 27)
    assert facts["experts"]["parameters_each"] == 3 * 2048 * 1408
    assert facts["parameters"]["total"] == sum(k["total"] for k in facts["parameters"]["by_kind"].values())
    assert facts["kv_cache"]["bytes"] == 1000 * 27 * 2 * (512 + 64)
    assert facts["flops_per_token"]["training"] == 3 * facts["flops_per_token"]["forward"]
    assert "memory" not in facts


def test_memory_tells_what_fits(inspect):
    _, out, _ = inspect("deepseek-v2-lite", "--json", "--memory", "10GB")
    memory = json.loads(out)["memory"]

    assert memory["bytes"] == 10**10
    assert memory["tokens_that_fit"]["bf16"] is None
    assert 1000 < memory["tokens_that_fit"]["int4"] < 163840


def test_the_default_context_is_the_models_where_that_is_shorter(inspect):
    assert json.loads(inspect("nano", "--json")[1])["flops_per_token"]["context"] == 2048
    assert json.loads(inspect("deepseek-v2-lite", "--json")[1])["flops_per_token"]["context"] == 4096


@pytest.mark.parametrize("columns", [80, 120])
def test_the_tables_fit_the_terminal_and_tell_the_same(inspect, monkeypatch, tmp_path, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    folder = write_config(tmp_path, GPT_OSS)
    code, out, err = inspect(folder, "--memory", "8GiB")
    lines = out.splitlines()

    assert (code, err) == (0, "")
    assert lines[0] == f"{folder}: GptOssForCausalLM, 4 layers, 4 with experts."
    assert lines[1] == "A token passes through 4 of 8 experts."
    assert max(map(len, lines[1:])) <= columns
    cells = [" ".join(line.split()) for line in lines]
    assert "2 layers, last 127 tokens 2.05 kB 4.10 kB" in cells
    assert "2 layers, each token 2.05 kB 4.10 kB" in cells
    assert "Weights size fits in 8.59 GB" in cells


def test_a_file_and_its_folder_are_the_same_model(inspect, tmp_path):
    folder = write_config(tmp_path, GPT_OSS)
    of_folder, of_file = (json.loads(inspect(path, "--json")[1]) for path in (folder, folder / "config.json"))

    assert of_folder.pop("model") != of_file.pop("model")
    assert of_folder == of_file


def test_a_native_config_with_remote_code_uses_the_stock_class(inspect, tmp_path):
    fields = {"model_type": "deepseek_v3", "auto_map": {"AutoConfig": "evil.Config"}, "num_hidden_layers": 4}
    facts = json.loads(inspect(write_config(tmp_path, fields), "--json")[1])

    assert facts["class"] == "DeepseekV3ForCausalLM"


def test_a_type_that_only_hub_moe_knows_is_read_by_it(inspect, tmp_path):
    folder = write_config(tmp_path, {"model_type": "kimi_k2", "num_hidden_layers": 4, "n_routed_experts": 384})
    facts = json.loads(inspect(folder, "--json")[1])

    assert (facts["class"], facts["experts"]["routed"]) == ("HubMoeForCausalLM", 384)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("{", "config.json is not valid JSON: "),
        ("[]", "config.json has no model_type, so it is not the config of a model."),
        ({"hidden_size": 8}, "config.json has no model_type, so it is not the config of a model."),
        ({"model_type": "deepseek_v9"}, "has model_type 'deepseek_v9', which neither transformers"),
        ({"model_type": "llama"}, "Model type 'llama' has no routed experts"),
        ({"model_type": "nllb-moe"}, "no causal language model of type 'nllb-moe'"),
        ({"model_type": "qwen3_moe", "hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"model_type": "qwen3_moe", "hidden_size": -8}, "describes no model that can be built"),
        ({"model_type": "qwen3_moe", "rope_scaling": {"type": "yarn"}}, "describes no model that can be built"),
        ({"model_type": "hub_moe", "n_group": 3}, "n_group=3 must divide n_routed_experts="),
        ({"model_type": "hub_moe", "n_routed_expert": 8}, "'n_routed_expert'"),
    ],
)
def test_a_bad_config_is_one_sentence(inspect, tmp_path, fields, sentence):
    code, out, err = inspect(write_config(tmp_path, fields))

    assert (code, out) == (1, "")
    assert sentence in err
    assert err.startswith("Error: ")
    assert len(err.splitlines()) == 1


def test_a_folder_without_config_is_one_sentence(inspect, tmp_path):
    assert inspect(tmp_path) == (1, "", f"Error: The folder {tmp_path} has no config.json.\n")


def test_a_misspelt_preset_is_corrected(inspect):
    code, out, err = inspect("deepsek-v3")

    assert (code, out) == (1, "")
    assert err.endswith("nor a Hub id (OWNER/NAME); did you mean deepseek-v3?\n")


def test_a_path_that_is_nowhere_is_not_looked_up_on_the_hub(inspect):
    code, out, err = inspect("./models/mine")

    assert (code, out) == (1, "")
    assert "'./models/mine' is neither a preset, nor a folder, nor a Hub id" in err


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("80gib", 80 * 2**30)])
def test_sizes_are_read(text, size):
    assert parse_size(text) == size
