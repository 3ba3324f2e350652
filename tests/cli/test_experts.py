import copy
import json
import sys

import pytest
from safetensors.torch import load_file, save_file

from hub_moe.anatomy import ExpertProfile
from hub_moe.cli.main import main
from hub_moe.data import set_chat_template
from hub_moe.training.selection import ExpertChoice
from tests.training.esft_traces import released_choice, released_scores, write_traces


@pytest.fixture
def experts(capsys, monkeypatch, tmp_path):
    """Run `hub-moe experts` in this process, in an empty folder: `(exit code, stdout, stderr)`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["hub-moe", "experts", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def model(tmp_path, tiny_model, tiny_tokenizer):
    """The folder of a tiny model with its tokenizer; beside it rows.jsonl."""
    tiny_model.save_pretrained(tmp_path / "moe")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    set_chat_template(tokenizer, "plain")
    tokenizer.save_pretrained(tmp_path / "moe")
    rows = [{"prompt": f"Expert {n}?", "completion": "A router picks a few of them. " * (1 + n % 3)} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return tmp_path / "moe"


def read_traces(experts, folder, *arguments):
    return experts(
        "score", "--traces", write_traces(folder, 0), "--num-experts", 16, "--top-k", 3, "--out", "p.json", *arguments
    )


def test_a_model_is_scored_on_rows_and_its_experts_are_chosen(experts, model):
    code, out, err = experts("score", model, "--data", "rows.jsonl", "--rows", 8, "--max-length", 120, "--norms")
    profile = ExpertProfile.load("profile.json")
    domain = profile.domain("rows")

    assert (code, err.splitlines()[-1]) == (0, "Wrote profile.json.")
    assert out.splitlines()[0] == f"moe on rows: {domain.num_tokens} tokens of 8 sequences."
    assert (profile.model, profile.top_k, list(domain.layers)) == ("moe", 2, [1, 2])
    assert all(sum(layer.tokens) == 2 * domain.num_tokens for layer in domain.layers.values())
    assert all(layer.output_norm is not None for layer in domain.layers.values())
    assert len(domain.dataset["files"][0]["sha256"]) == 64

    code, out, err = experts("select", "profile.json", "--top-p", 0.3, "--plot", "heat.png", "--json")
    facts, choice = json.loads(out), ExpertChoice.load("expert_config.json")

    assert (code, err) == (0, "Wrote expert_config.json and heat.png.\n")
    assert facts["chosen"] == choice.num_experts
    assert facts["share_of_parameters"] == pytest.approx(
        choice.num_experts * profile.num_per_expert / profile.num_parameters
    )
    with open("heat.png", "rb") as picture:
        assert picture.read(4) == b"\x89PNG"


def test_the_same_seed_gives_the_same_profile(experts, model):
    arguments = ("score", model, "--data", "rows.jsonl", "--rows", 5, "--max-length", 120, "--json")
    first, again, other = (json.loads(experts(*arguments, *more)[1]) for more in ((), (), ("--seed", 1)))

    assert first == again
    assert first["domains"] != other["domains"]


def test_traces_are_scored_and_chosen_as_in_esft(experts, tmp_path):
    code, out, _ = read_traces(experts, tmp_path / "law" / "routing", "--domain", "law")
    scores = released_scores(tmp_path / "law" / "routing")

    assert code == 0
    assert out.splitlines()[0] == "unknown on law: 64 tokens of 3 sequences."
    assert len(out.splitlines()) == 2 + 2 + 3
    for score in ("token", "gate"):
        arguments = ("--score", score, "--top-p", 0.2, "--shared-experts", "--out", "choice.json")
        code, out, err = experts("select", "p.json", *arguments)
        assert (code, err) == (0, "Wrote choice.json.\n")
        assert ExpertChoice.load("choice.json") == ExpertChoice(released_choice(scores[score], 0.2), True, False)
        assert "Trained beside them, and not counted here: the shared experts." in out


def test_the_choice_is_a_table_by_layer(experts, tmp_path):
    read_traces(experts, tmp_path / "routing", "--domain", "law")
    _, out, _ = experts("select", "p.json")
    choice = ExpertChoice.load("expert_config.json")
    cells = [line.split() for line in out.splitlines() if line.strip()]

    for index, chosen in choice.experts.items():
        [row] = [row for row in cells if row[0] == str(index)]
        assert row[1:4] == [str(len(chosen)), "of", "16"]
        assert row[-len(chosen) :] == [str(expert) for expert in chosen]
    assert cells[-1][:4] == ["all", str(choice.num_experts), "of", "48"]


def test_a_share_of_all_experts_is_chosen(experts, tmp_path):
    read_traces(experts, tmp_path / "routing", "--domain", "law")
    code, out, _ = experts("select", "p.json", "--share", "0.25", "--json")
    assert (code, json.loads(out)["chosen"]) == (0, 12)
    assert ExpertChoice.load("expert_config.json").num_experts == 12


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["score"], "Give either MODEL and --data, or --traces."),
        (["score", "moe", "--data", "rows.jsonl", "--traces", "."], "Give either MODEL and --data, or --traces."),
        (["score", "--data", "rows.jsonl"], "Give the MODEL to run on --data."),
        (["score", "--traces", "."], "holds no routing traces"),
        (["score", "--traces", "nowhere"], "nowhere"),
        (["score", "moe", "--data", "none.jsonl"], "no file or folder none.jsonl"),
        (["score", "moe", "--data", "rows.jsonl", "--max-length", "4"], "rows do not fit"),
        (["score", "moe", "--data", "rows.jsonl", "--out", "no/p.json"], "no/p.json cannot be written: there is no fo"),
        (["select", "none.json"], "none.json"),
        (["select", "rows.jsonl"], "rows.jsonl is not an expert profile"),
        (["select", "moe/config.json"], "is not an expert profile: its format is None"),
        (["select", "rows.jsonl", "--plot", "no/heat.png"], "no/heat.png cannot be written: there is no folder no"),
    ],
)
def test_a_mistake_is_one_sentence(experts, model, arguments, sentence):
    code, out, err = experts(*arguments)

    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("Error: ")  # above it may be the progress of reading rows
    assert sentence in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--top-p", "0"], "top_p=0.0 is not a share"),
        (["--score", "gate", "--top-p", "0.99"], "would choose every expert"),
        (["--top-p", "0.2", "--share", "0.1"], "either by top_p or by share"),
        (["--share", "1.5"], "share=1.5 is not a share"),
        (["--domain", "code"], "has no domain 'code'; it has 'law'"),
        (["--plot", "heat.nope"], "heat.nope cannot be drawn"),
    ],
)
def test_a_choice_that_cannot_be_made_is_one_sentence(experts, tmp_path, arguments, sentence):
    read_traces(experts, tmp_path / "routing", "--domain", "law")
    code, out, err = experts("select", "p.json", *arguments)

    assert (code, out) == (1, "")
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_a_model_with_weights_that_are_not_a_number_writes_no_profile(experts, model, tmp_path):
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.gate.weight"].fill_(float("nan"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    code, _, err = experts("score", model, "--data", "rows.jsonl", "--max-length", 120)

    assert code == 1
    assert "holds numbers that are not finite" in err
    assert not (tmp_path / "profile.json").exists()
