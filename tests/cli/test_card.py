"""`hub-moe card`: render, lint and show, on real folders."""

import json
import sys

import pytest

pytest.importorskip("matplotlib")

from hub_moe.cli.main import main

from ..cards.examples import FRONT_MATTER, make_model, write_evidence


@pytest.fixture
def card(capsys, monkeypatch):
    """Run `hub-moe card` in this process: `(exit code, stdout, stderr)`."""

    def run(*arguments):
        capsys.readouterr()  # what saving a model wrote
        monkeypatch.setattr(sys, "argv", ["hub-moe", "card", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def model(tmp_path, tiny_model):
    """A real tiny model, its front matter with a licence."""
    folder = tmp_path / "law"
    tiny_model.save_pretrained(folder)
    (folder / "README.md").write_text(FRONT_MATTER, "utf-8")
    return folder


def test_a_model_gets_a_card_with_records_comparison_sizes_and_pictures(card, model, tmp_path):
    weights = (model / "model.safetensors").read_bytes()
    write_evidence(tmp_path / "own", weights)
    base = write_evidence(tmp_path / "base", b"other", scores=(0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0))
    code, out, err = card(model, "--records", tmp_path / "own", "--base-record", base.path, "--gpai")
    assert (code, err) == (0, "")
    names = {"README.md", "model_card.json", "model_documentation_form.md", "card/comparison.png"}
    assert set(out.split()) == {str(model / name) for name in {*names, ".eval_results/cloze.yaml"}}
    text = (model / "README.md").read_text("utf-8")
    assert "| `cloze` | 0.4000 | 0.8000 | +0.4000 ± " in text
    assert "parameters | " in text
    assert (model / "card" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((model / "evals").iterdir())) == 4
    assert card("lint", model) == (0, "", "Every number has its record.\n")
    code, out, _ = card("show", model, "--json")
    facts = json.loads(out)
    assert facts["architecture"]["experts_per_token"] == 2
    assert facts["comparison"]["tasks"][0]["verdict"] == "tied"
    assert "## Compared with the base" in card("show", model)[1]

    before = (model / "README.md").read_bytes()
    assert card("render", model)[0] == 0
    assert (model / "README.md").read_bytes() == before

    facts["comparison"]["tasks"][0]["low"] = 0.2
    (model / "model_card.json").write_text(json.dumps(facts), "utf-8")
    code, out, err = card("lint", model, "--json")
    problems = [finding["problem"] for finding in json.loads(out)]
    assert code == 1
    assert "says another comparison with the base than the two records give" in problems
    assert err == f"{len(problems)} findings.\n"


def test_a_profile_becomes_a_table_and_a_picture(card, model, tmp_path):
    from hub_moe.anatomy import ExpertProfile
    from hub_moe.anatomy.profile import DomainProfile, LayerProfile

    layers = {index: LayerProfile((5, 3, 0, 0, 0, 0, 0, 0), (1.0,) * 8) for index in (1, 2)}
    domains = {"l$w$": DomainProfile({"source": "alice/laws"}, 4, 1, layers)}
    ExpertProfile("law", None, 2, domains).save(tmp_path / "profile.json")
    code, _, err = card(model, "--profile", tmp_path / "profile.json")
    assert (code, err) == (0, "")
    text = (model / "README.md").read_text("utf-8")
    assert "| 1 | 5.00 | 6 of 8 | 0.32 |" in text
    assert "(card/experts.png)" in text
    assert card("lint", model)[0] == 0


def test_a_card_can_be_written_elsewhere_and_leaves_the_model_alone(card, tmp_path):
    folder = make_model(tmp_path / "law")
    before = sorted(folder.rglob("*"))
    code, out, err = card(folder, "--out", tmp_path / "out" / "CARD.md", "--json")
    assert code == 0
    assert json.loads(out)["written"] == ["CARD.md", "model_card.json"]
    assert "Sizes are left out: The folder" in err
    assert sorted(folder.rglob("*")) == before
    assert "license: mit" in (tmp_path / "out" / "CARD.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-thing"], "'no-such-thing' is neither a folder nor the id of a repo"),
        (["lint", "no-such-thing"], "is neither a folder"),
        (["show", "."], ". has no model_card.json"),
    ],
)
def test_a_known_error_is_one_sentence(card, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = card(*arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_base_of_another_suite_is_refused(card, tmp_path):
    from hub_moe.evals.records import SuiteSource

    folder = make_model(tmp_path / "law")
    write_evidence(folder / "evals")
    base = write_evidence(tmp_path / "base", b"other", suite=SuiteSource("quick", "9" * 64))
    code, _, err = card(folder, "--base-record", base.path)
    assert code == 1
    assert "is of the suite quick, of which there is no record of law with the same settings" in err
    assert not (folder / "model_card.json").exists()


def test_a_card_of_a_patch_takes_the_place_of_the_one_it_was_saved_with(card, tmp_path, tiny_model):
    from ..patches.patching import patch_experts

    base = tmp_path / "base"
    tiny_model.save_pretrained(base)
    from hub_moe.patches import Base

    patch = patch_experts(tiny_model, {1: [0, 3]}, base=Base(str(base), None, "hub_moe"))
    patch.save(tmp_path / "patch")
    assert "# Expert patch" in (tmp_path / "patch" / "README.md").read_text("utf-8")
    code, _, err = card(tmp_path / "patch")
    assert (code, err) == (0, "")
    text = (tmp_path / "patch" / "README.md").read_text("utf-8")
    assert "# Expert patch" not in text
    assert "it replaces 2 routed experts in 1 layers" in text
    assert "expert-patch" in text
    assert "A Mixture-of-Experts language model of" in text
    assert str(tmp_path) not in text


def test_without_arguments_there_is_help(card):
    code, out, err = card()
    assert "card MODEL` is `card" in (out + err).replace("\n ", "")
    assert code in (0, 2)
