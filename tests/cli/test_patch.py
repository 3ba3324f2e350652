"""`hub-moe patch` as a person types it."""

import json
import shutil
import socket
import sys

import pytest

from hub_moe.cli.main import main
from hub_moe.cli.patch import split_name
from hub_moe.patches import Base
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
    """A base, two patches for it and another model."""
    folder = tmp_path_factory.mktemp("patches")
    model = build_model()
    model.save_pretrained(folder / "base")
    base = Base(str(folder / "base"), None, "hub_moe")
    patch_experts(model, {1: [0, 7], 2: [3]}, base=base, training={"method": "experts"}).save(folder / "law")
    patch_experts(model, {2: [3, 4]}, base=base, seed=2).save(folder / "intent")
    build_model(seed=5).save_pretrained(folder / "other")
    return folder


def test_show_says_what_is_changed_in_which_base(run, folders):
    code, out, err = run("show", folders / "law")
    assert (code, err) == (0, "")
    assert "3 in 2 layers" in out
    assert "experts" in out
    assert "0, 7" in out
    assert "18.4 kB" in out


def test_show_as_json_is_the_metadata(run, folders):
    code, out, _ = run("show", folders / "law", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((folders / "law" / "expert_patch.json").read_text())


def test_show_measures_changes_against_the_base(run, folders):
    _, out, _ = run("show", folders / "law", "--base", folders / "base", "--json")
    changes = json.loads(out)["changes"]
    assert [(row["layer"], row["expert"]) for row in changes] == [(1, 0), (1, 7), (2, 3)]
    assert all(0.4 < row["change"] < 0.6 for row in changes)
    assert "%" in run("show", folders / "law", "--base", folders / "base")[1]


@pytest.mark.parametrize("with_base", [False, True])
def test_show_draws_a_heat_map(run, folders, tmp_path, with_base):
    pytest.importorskip("matplotlib")
    more = ["--base", folders / "base"] if with_base else []
    assert run("show", folders / "law", "--plot", tmp_path / "heat.png", *more)[0] == 0
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_an_unknown_format_is_one_sentence(run, folders, tmp_path):
    code, _, err = run("show", folders / "law", "--plot", tmp_path / "heat.docx")
    assert code == 1
    assert err.startswith("Error: ")
    assert "docx" in err
    assert len(err.splitlines()) == 1


def test_a_patch_without_routed_experts_has_no_heat_map(run, tmp_path):
    train_patch(build_model(), ["lm_head.weight"]).save(tmp_path / "head")
    code, _, err = run("show", tmp_path / "head", "--plot", tmp_path / "heat.png")
    assert (code, err) == (1, f"Error: The patch {tmp_path / 'head'} changes no routed experts that could be drawn.\n")


def test_diff_lists_experts_and_says_that_sizes_need_the_base(run, folders):
    code, out, err = run("diff", folders / "law", folders / "intent")
    assert code == 0
    assert "Sizes and directions of the changes need the base: --base." in err
    lines = [line.split() for line in out.splitlines()[2:]]
    assert [line[:3] for line in lines] == [["1", "0", "A"], ["1", "7", "A"], ["2", "3", "both"], ["2", "4", "B"]]


def test_diff_with_the_base_has_sizes_and_cosine(run, folders):
    code, out, err = run("diff", folders / "law", folders / "intent", "--base", folders / "base", "--json")
    assert (code, err) == (0, "")
    row = json.loads(out)["rows"][2]
    assert -0.3 < row["cosine"] < 0.3
    assert 1.2 < row["distance"] < 1.6
    assert "cosine" in run("diff", folders / "law", folders / "intent", "--base", folders / "base")[1]


def test_diff_of_one_patch_is_against_its_base(run, folders):
    code, out, _ = run("diff", folders / "law", "--json")
    assert code == 0
    assert [row["layer"] for row in json.loads(out)] == [1, 1, 2]


@pytest.mark.parametrize("command", ["apply", "merge-into-base"])
def test_apply_and_merge_write_the_same_checkpoint(run, folders, tmp_path, command):
    code, out, err = run(command, folders / "law", "--base", folders / "base", "--out", tmp_path / "merged")
    assert code == 0
    rows = [line.split()[-6:-2] for line in out.splitlines() if line.startswith("routed experts")]
    assert rows == [["1", "24", "6", "6"], ["2", "24", "3", "3"]]
    assert str(tmp_path / "merged") in err
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_apply_to_another_model_is_one_sentence_that_names_the_tensor(run, folders, tmp_path):
    code, out, err = run("apply", folders / "law", "--base", folders / "other", "--out", tmp_path / "merged")
    assert (code, out) == (1, "")
    assert "tensor 'model.layers.1.mlp.experts.0.down_proj.weight' has other values" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "merged").exists()


def test_verify_says_what_is_right(run, folders):
    code, out, _ = run("verify", folders / "law", "--base", folders / "base")
    assert code == 0
    counts = {line.rsplit(maxsplit=2)[0]: line.split()[-2:] for line in out.splitlines()[2:]}
    assert counts["sha256 of the tensor"] == counts["sha256 of the base's tensor"] == ["9", "0"]
    assert counts["expert_patch.json"] == ["1", "0"]


def test_verify_says_what_is_wrong_and_fails(run, folders, tmp_path):
    shutil.copytree(folders / "law", tmp_path / "law")
    data = bytearray((tmp_path / "law" / "expert_patch.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "law" / "expert_patch.safetensors").write_bytes(data)
    code, out, _ = run("verify", tmp_path / "law", "--base", folders / "other")
    wrong = [line for line in out.splitlines() if line.startswith("WRONG")]
    assert code == 1
    assert len(wrong) == 11  # the file, one tensor, nine of another base
    assert run("verify", tmp_path / "law", "--json")[0] == 1


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: (folder / "expert_patch.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "expert_patch.safetensors").unlink(), "lacks expert_patch.safetensors"),
        (lambda folder: (folder / "expert_patch.safetensors").write_bytes(b"12"), "is truncated"),
    ],
)
def test_verify_of_a_damaged_patch_reports_instead_of_stopping(run, folders, tmp_path, damage, fault):
    shutil.copytree(folders / "law", tmp_path / "law")
    damage(tmp_path / "law")
    code, out, _ = run("verify", tmp_path / "law")
    assert code == 1
    assert fault in out


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.unlink(), "config.json is missing, without which from_pretrained does not know the patch"),
        (lambda path: path.write_text("{"), "config.json is not valid JSON"),
        (lambda path: path.write_text("[]"), "config.json is not a config: expected a JSON object, found a list"),
        (
            lambda path: path.write_text('{"model_type": "mixtral"}'),
            "config.json is of something else: model_type is 'mixtral', and 'hub_moe_expert_patch' was expected",
        ),
        (
            lambda path: path.write_text(path.read_text().replace('"base_model_type": "hub_moe"', '"x": 1')),
            "config.json is of something else: base_model_type is None, and 'hub_moe' was expected",
        ),
    ],
)
def test_verify_reports_a_config_by_which_the_patch_cannot_be_loaded(run, folders, tmp_path, damage, fault):
    shutil.copytree(folders / "law", tmp_path / "law")
    damage(tmp_path / "law" / "config.json")
    code, out, _ = run("verify", tmp_path / "law")
    wrong = [line for line in out.splitlines() if line.startswith("WRONG")]
    assert code == 1
    assert len(wrong) == 1
    assert wrong[0].startswith(f"WRONG  {fault}")


def test_verify_compares_the_model_type_of_the_base(run, folders, tmp_path):
    shutil.copytree(folders / "base", tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "hub_moe"', '"model_type": "deepseek_v3"'))
    code, out, _ = run("verify", folders / "law", "--base", tmp_path / "base")
    assert code == 1
    fault = "the base's model type is 'deepseek_v3', and the patch is for 'hub_moe'"
    assert [line for line in out.splitlines() if line.startswith("WRONG")] == [f"WRONG  {fault}"]


@pytest.mark.parametrize("base", ["nope", "./no/base", "no@main", "a/b/c"])
def test_a_base_that_is_nothing_is_one_sentence_and_asks_no_hub(run, folders, tmp_path, monkeypatch, base):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: pytest.fail(f"asked for {arguments[0]}"))
    code, out, err = run("apply", folders / "law", "--base", base, "--out", tmp_path / "merged")
    assert (code, out) == (1, "")
    assert err == f"Error: The base {base!r} is neither a folder nor a repo id (OWNER/NAME[@REVISION]).\n"


def test_a_name_that_is_nothing_is_one_sentence(run, tmp_path):
    for command in (["show"], ["verify"], ["diff"], ["apply", "--out", tmp_path / "out"]):
        code, out, err = run(*command, "no such patch")
        assert (code, out) == (1, "")
        assert err == "Error: 'no such patch' is neither a folder with an expert patch nor a repo id (OWNER/NAME).\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alice/law", ("alice/law", None, None)),
        ("alice/law@v1.0", ("alice/law", None, "v1.0")),
        ("alice/base/patches/law", ("alice/base", "patches/law", None)),
        ("alice/base/patches/law@refs/pr/3", ("alice/base", "patches/law", "refs/pr/3")),
    ],
)
def test_a_name_may_hold_a_subfolder_and_a_revision(name, expected):
    parts = split_name(name)
    assert (parts["name_or_path"], parts["subfolder"], parts["revision"]) == expected


def test_patches_on_a_hub_are_named_with_subfolder_and_revision(hub, folders):
    import os
    import subprocess

    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=hub.tokens["alice"])
    api.create_repo("alice/patches-by-name")
    sha = api.upload_folder(
        repo_id="alice/patches-by-name", folder_path=folders / "law", path_in_repo="patches/law"
    ).oid
    command = [sys.executable, "-m", "hub_moe", "patch", "show", f"alice/patches-by-name/patches/law@{sha}", "--json"]
    environment = hub.environment() | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout)["experts"] == {"1": [0, 7], "2": [3]}
    command[-2] = "alice/patches-by-name/patches/tax"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "holds no expert patch" in done.stderr
    command[-2] = "alice/never-there"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stderr.startswith("Error: alice/never-there is not on")
