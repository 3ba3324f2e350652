"""`hub-moe patch conflicts`, `combine` and `rebase` as a person types them."""

import json
import sys

import pytest

from hub_moe.cli.main import main
from hub_moe.patches import Base, ExpertPatch, apply_patch
from tests.patches.patching import build_model, patch_experts, train_patch


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `hub-moe patch` in this process: `(exit code, stdout, stderr)`."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hub-moe", "patch", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, three patches for it, of which two overlap, and two newer bases."""
    folder = tmp_path_factory.mktemp("patches")
    model = build_model()
    model.save_pretrained(folder / "base")
    base = Base(str(folder / "base"), None, "hub_moe")
    patch_experts(model, {1: [0, 7], 2: [3]}, base=base).save(folder / "law")
    patch_experts(model, {2: [3, 4]}, base=base, seed=2).save(folder / "intent")
    router = "model.layers.1.mlp.gate.weight"
    train_patch(model, [router], base=base, seed=3).save(folder / "router")
    apply_patch(model, ExpertPatch.load(folder / "router"))
    model.save_pretrained(folder / "newer")
    apply_patch(model, ExpertPatch.load(folder / "intent"))
    model.save_pretrained(folder / "newest")
    return folder


def test_conflicts_lists_the_experts_that_both_change(run, folders):
    code, out, err = run("conflicts", folders / "law", folders / "intent", "--method", "ties")
    assert (code, err) == (0, "")
    (line,) = out.splitlines()[2:]
    assert line.split()[:6] == ["layer", "2", "expert", "3", "law,", "intent"]
    assert line.endswith("ties")


def test_conflicts_as_json_has_every_tensor(run, folders):
    code, out, _ = run("conflicts", folders / "law", folders / "intent", "--json")
    table = json.loads(out)
    assert code == 0
    assert table["patches"] == ["law", "intent"]
    assert [(row["layer"], row["expert"], row["outcomes"]) for row in table["units"]] == [(2, 3, ["refuse"])]
    assert [row["tensor"].rpartition("experts.3.")[2] for row in table["tensors"]] == [
        "down_proj.weight",
        "gate_proj.weight",
        "up_proj.weight",
    ]


def test_patches_that_share_nothing_are_combined_and_a_changed_router_is_noted(run, folders, tmp_path):
    code, out, err = run("combine", folders / "law", folders / "router", "--out", tmp_path / "both")
    assert (code, out) == (0, "")
    assert "No two patches hold the same tensor." in err
    assert "Note: router changes the router of layer 1, where law changes experts" in err
    assert "The patch of 2 contributors, 3 routed experts in 2 layers, is in" in err
    assert run("verify", tmp_path / "both", "--base", folders / "base")[0] == 0
    shown = run("show", tmp_path / "both")[1]
    assert "law, router" in shown


def test_a_conflict_without_a_method_is_one_sentence_and_writes_nothing(run, folders, tmp_path):
    code, out, err = run("combine", folders / "law", folders / "intent", "--out", tmp_path / "both")
    assert (code, out) == (1, "")
    assert err == (
        "Error: The patches change the same tensors: law and intent change expert 3 of layer 2; choose how to resolve "
        "it (mean, ties, dare, dare_ties or slerp).\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_combine_by_ties_writes_a_patch_that_merges_into_the_base(run, folders, tmp_path):
    arguments = ("--base", folders / "base", "--method", "ties", "--density", "0.3", "--weight", "2", "--weight", "1")
    code, out, err = run(
        "combine", folders / "law", folders / "intent", "--out", tmp_path / "both", *arguments, "--json"
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["patch"] == json.loads((tmp_path / "both" / "expert_patch.json").read_text())
    combination = report["patch"]["combination"]
    assert (combination["method"], combination["density"], combination["seed"]) == ("ties", 0.3, None)
    assert [(each["name"], each["weight"]) for each in combination["contributors"]] == [("law", 2.0), ("intent", 1.0)]
    assert report["conflicts"]["units"][0]["outcomes"] == ["ties"]
    assert run("apply", tmp_path / "both", "--out", tmp_path / "merged")[0] == 0
    assert "## Contributors" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "average"], "There is no method 'average'"),
        (["--method", "ties", "--density", "0"], "The density must be above 0 and at most 1, not 0.0."),
        (["--method", "mean", "--seed", "1"], "The method mean has no seed"),
        (["--method", "mean", "--weight", "1"], "1 weights were given for 2 patches"),
        (["--method", "mean", "--base", "nope"], "The base 'nope' is neither a folder nor a repo id"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(run, folders, tmp_path, arguments, message):
    code, out, err = run("combine", folders / "law", folders / "intent", "--out", tmp_path / "both", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"Error: {message}")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_one_patch_is_not_enough(run, folders, tmp_path):
    code, _, err = run("combine", folders / "law", "--out", tmp_path / "both")
    assert (code, err) == (1, "Error: Combining takes two patches or more, and 1 was given.\n")


def test_rebase_moves_a_patch_to_a_base_that_changed_elsewhere(run, folders, tmp_path):
    code, out, err = run("rebase", folders / "law", "--onto", folders / "newer", "--out", tmp_path / "law")
    assert (code, out) == (0, "")
    assert str(folders / "newer") in err
    assert run("verify", tmp_path / "law", "--base", folders / "newer")[0] == 0
    assert "rebased from" in run("show", tmp_path / "law")[1]


def test_rebase_onto_a_base_that_changed_the_same_lists_what_did(run, folders, tmp_path):
    code, out, err = run("rebase", folders / "law", "--onto", folders / "newest", "--out", tmp_path / "law")
    assert (code, out) == (1, "")
    assert "which changed what it changes: expert 3 of layer 2 (3 of 9 tensors;" in err
    assert list(tmp_path.iterdir()) == []
