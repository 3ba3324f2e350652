"""`hub-moe train`, all methods, on tiny models: what comes out, and that it is proved."""

import json
import socket

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hub_moe.anatomy import ExpertProfile
from hub_moe.errors import ConfigError, DatasetError, DivergenceError, TrainingProofError
from hub_moe.patches import ExpertPatch
from hub_moe.training import run as run_module
from hub_moe.training.preview import preview_run
from hub_moe.training.run_config import parse_run_config, read_run_config

from .runs import CHOICE, make_tables, read_losses, read_weights, run, save_base, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer):
    return save_base(tmp_path_factory.mktemp("bases") / "deepseek_v3", "deepseek_v3", tiny_tokenizer)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def choice(tmp_path_factory):
    path = tmp_path_factory.mktemp("choice") / "expert_config.json"
    path.write_text(json.dumps(CHOICE), "utf-8")
    return path


@pytest.fixture(scope="module")
def experts_run(tmp_path_factory, base, rows, choice):
    """The result of a run that trains chosen experts."""
    folder = tmp_path_factory.mktemp("experts") / "run"
    return run(make_tables(folder, base=base, rows=rows, method={"name": "experts", "choice": str(choice)}))


def _state(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_chosen_experts_become_a_patch_and_everything_else_stays(experts_run, base):
    changes = experts_run.changes
    changed = {(row["kind"], row["layer"]): row["changed_tensors"] for row in changes["rows"] if row["changed_tensors"]}
    assert changed == {("routed_experts", 1): 6, ("routed_experts", 2): 3}
    assert changes["violations"] == []
    experts = {"model.layers.1.mlp.experts.1", "model.layers.1.mlp.experts.5", "model.layers.2.mlp.experts.0"}
    assert {name.rpartition(".")[0].rpartition(".")[0] for name in read_weights(experts_run.result)} == experts
    patched, original = _state(experts_run.result), _state(base)
    different = {name for name, tensor in patched.items() if not torch.equal(tensor, original[name])}
    assert different == {
        f"model.layers.{i}.mlp.experts.{name}" for i in (1, 2) for name in ("gate_up_proj", "down_proj")
    }


def test_a_run_folder_says_all_about_the_run(experts_run):
    names = {path.name for path in experts_run.folder.iterdir()}
    assert names == {
        *(
            "run.toml",
            "report.json",
            "what_changed.json",
            "data_report.json",
            "metrics.jsonl",
            "num_threads.txt",
            "inputs.json",
        ),
        *("patch", "checkpoints", "loss_curve.png", "expert_config.json"),
    }
    report = experts_run.report
    assert report["held_out_loss"]["after"] < report["held_out_loss"]["before"]
    assert report["numbers"]["trained"] == 3 * 3 * 32 * 16
    assert report["tokens"] > 0
    losses = read_losses(experts_run.folder)
    assert [step for step, *_ in losses] == list(range(9))
    assert losses[0][2] == report["held_out_loss"]["before"]
    assert losses[-1][2] == report["held_out_loss"]["after"]


def test_the_checkpoint_of_chosen_experts_leaves_the_base_out(experts_run):
    (checkpoint,) = (experts_run.folder / "checkpoints").iterdir()
    assert sum(tensor.numel() for tensor in read_weights(checkpoint).values()) == 3 * 3 * 32 * 16


def test_a_finished_run_is_only_read_and_its_settings_can_be_run_again(experts_run):
    before = {path: path.stat().st_mtime_ns for path in experts_run.folder.rglob("*")}
    config = read_run_config(experts_run.folder / "run.toml")
    said = []
    again = run_module.run_training(config, say=said.append)
    assert again.report == experts_run.report
    assert "finished; --fresh starts it anew" in said[0]
    assert {path: path.stat().st_mtime_ns for path in experts_run.folder.rglob("*")} == before


def test_other_settings_in_the_folder_of_a_run_are_refused_by_name(experts_run):
    with pytest.raises(ConfigError, match="training.steps is 8 there and 9 now"):
        run_module.run_training(read_run_config(experts_run.folder / "run.toml", ["training.steps=9"]))


def test_experts_are_chosen_from_the_rows_where_no_file_says_them(tmp_path, base, rows):
    method = {"name": "experts", "score": "gate", "top_p": 0.3, "sample_rows": 8}
    result = run(make_tables(tmp_path / "run", base=base, rows=rows, method=method, steps=1))
    chosen = json.loads((result.folder / "expert_config.json").read_text("utf-8"))
    assert set(chosen["experts"]) == {"1", "2"}
    assert (result.folder / "expert_profile.json").exists()
    preview = preview_run(parse_run_config(make_tables(tmp_path / "other", base=base, rows=rows, method=method)))
    assert preview["experts"] == chosen["experts"]
    assert not (tmp_path / "other").exists()


def test_a_share_of_all_experts_is_trained_and_the_patch_says_so(tmp_path, base, rows):
    method = {"name": "experts", "share": 0.25, "sample_rows": 8}
    result = run(make_tables(tmp_path / "run", base=base, rows=rows, method=method, steps=1))
    chosen = json.loads((result.folder / "expert_config.json").read_text("utf-8"))["experts"]
    profile = ExpertProfile.load(result.folder / "expert_profile.json")
    layers = profile.domain(None).layers
    assert sum(map(len, chosen.values())) == round(0.25 * sum(len(layer.tokens) for layer in layers.values()))
    selection = ExpertPatch.load(result.result).metadata.selection
    assert (selection.top_p, selection.share) == (None, 0.25)


def test_full_tuning_gives_a_model_that_anybody_loads(tmp_path, base, rows):
    result = run(make_tables(tmp_path / "run", base=base, rows=rows, method="full", steps=2))
    assert result.changes["totals"]["trained_tensors"] == result.changes["totals"]["tensors"] - 2  # balancing biases
    trained, original = _state(result.result), _state(base)
    assert not torch.equal(trained["lm_head.weight"], original["lm_head.weight"])
    assert AutoTokenizer.from_pretrained(result.result).chat_template


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by a deprecated name
def test_adapters_leave_the_base_as_it_is_and_name_it(tmp_path, base, rows):
    peft = pytest.importorskip("peft")
    method = {"name": "lora", "r": 2, "target_modules": ["o_proj"], "routed_experts": True}
    result = run(make_tables(tmp_path / "run", base=base, rows=rows, method=method))
    assert result.changes["totals"]["changed_tensors"] == 0
    assert result.changes["adapter"]["still_zero"] == []
    assert result.report["held_out_loss"]["after"] < result.report["held_out_loss"]["before"]
    config = peft.PeftConfig.from_pretrained(result.result)
    assert config.base_model_name_or_path == str(base)
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.result).eval()
    ids = torch.arange(12)[None]
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert not torch.equal(adapted(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_pretraining_starts_from_a_preset_and_balances(tmp_path, rows):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 400, "utf-8")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "n_routed_experts": 8}
    tables = make_tables(tmp_path / "run", base="", rows=tmp_path / "text.txt", method="pretrain", steps=4)
    tables["model"] = {"preset": "nano", "learn_vocab_size": 300, "overrides": sizes}
    tables["data"] |= {"max_length": 32}
    del tables["data"]["chat_template"]
    result = run(tables)
    model = AutoModelForCausalLM.from_pretrained(result.result)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(result.result)) <= 300
    assert result.report["balancing_speed"] == 0.001
    changed = {row["kind"]: row["changed_tensors"] for row in result.changes["rows"]}
    assert changed["router"]
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.abs().max() > 0


def test_a_base_in_bfloat16_is_trained_in_float32_and_stored_as_it_was(tmp_path, base, rows, tiny_tokenizer):
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    tables = make_tables(tmp_path / "run", base=tmp_path / "base", rows=rows, method="full", steps=2)
    result = run(tables)
    (checkpoint,) = (result.folder / "checkpoints").iterdir()
    assert read_weights(checkpoint)["lm_head.weight"].dtype == torch.float32
    assert read_weights(result.result)["lm_head.weight"].dtype == torch.bfloat16


def test_a_tensor_that_changes_unasked_stops_the_run_before_its_result(tmp_path, base, rows, choice, monkeypatch):
    train = run_module.train

    def train_and_touch(prepared, *arguments):
        session = train(prepared, *arguments)
        with torch.no_grad():
            prepared.model.model.layers[1].mlp.experts.down_proj[7] += 1
        return session

    monkeypatch.setattr(run_module, "train", train_and_touch)
    tables = make_tables(
        tmp_path / "run", base=base, rows=rows, method={"name": "experts", "choice": str(choice)}, steps=1
    )
    with pytest.raises(TrainingProofError, match=r"stay frozen: model.layers.1.mlp.experts.7.down_proj"):
        run(tables)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "what_changed.json" in names
    assert not names & {"patch", "report.json"}


def test_numbers_that_are_not_finite_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path, base, rows):
    tables = make_tables(
        tmp_path / "run", base=base, rows=rows, method="full", learning_rate=1e30, warmup=0.0, checkpoints=8
    )
    with pytest.raises(DivergenceError, match=r"The loss of step 2 is not finite: .* model\.layers\.0\."):
        run(tables)
    assert not (tmp_path / "run" / "report.json").exists()
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
        assert all(torch.isfinite(tensor).all() for tensor in read_weights(checkpoint).values())


def test_a_broken_weight_of_the_base_is_named(tmp_path, base, rows, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[3, 0, 0] = float("nan")
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    tables = make_tables(tmp_path / "run", base=tmp_path / "base", rows=rows, method="full")
    with pytest.raises(DivergenceError, match=r"weight model\.layers\.2\.mlp\.experts\.down_proj is not finite"):
        run(tables)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, base, rows, tiny_tokenizer):
    save_base(tmp_path / "base", "deepseek_v3", tiny_tokenizer, vocab_size=100)
    with pytest.raises(DatasetError, match="tokenizer"):
        run(make_tables(tmp_path / "run", base=tmp_path / "base", rows=rows, method="full"))


def test_rows_without_answers_are_refused_and_the_folder_can_be_used_afterwards(tmp_path, base, rows):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1 + 1?", "completion": ""}\n' * 3, "utf-8")
    tables = make_tables(tmp_path / "run", base=base, rows=tmp_path / "bad.jsonl", method="full", steps=1)
    with pytest.raises(DatasetError, match="row 0"):
        run(tables)
    tables["data"]["source"] = str(rows)
    assert run(tables).report["steps"] == 1


def test_a_patch_or_adapter_is_no_base(tmp_path, experts_run, rows):
    with pytest.raises(ConfigError, match="is an expert patch and not a model"):
        run(make_tables(tmp_path / "run", base=experts_run.result, rows=rows, method="full"))


@pytest.mark.parametrize("name", ["nope", "./runs/nope", "a/b/c"])
def test_a_base_that_is_no_folder_and_no_repo_id_is_refused_without_asking_a_hub(tmp_path, rows, monkeypatch, name):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: pytest.fail(f"asked for {arguments[0]}"))
    with pytest.raises(ConfigError, match=f"name '{name}' is neither a folder nor a repo id"):
        run(make_tables(tmp_path / "run", base=name, rows=rows, method="full"))


def test_a_choice_for_another_model_is_refused(tmp_path, base, rows):
    (tmp_path / "choice.json").write_text(json.dumps({**CHOICE, "experts": {"7": [1]}}), "utf-8")
    method = {"name": "experts", "choice": str(tmp_path / "choice.json")}
    with pytest.raises(ConfigError, match="layer 7"):
        run(make_tables(tmp_path / "run", base=base, rows=rows, method=method))
