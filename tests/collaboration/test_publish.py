"""`hub-moe publish` on a real Hub: checked first, one commit, one tag."""

import json

import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from hub_moe.patches.metadata import PatchMetadata
from tests.evals.checkpoints import evaluate, save_model, save_patch


@pytest.fixture
def model(tmp_path, tiny_config, tiny_tokenizer):
    return save_model(tmp_path / "model", tiny_config, tiny_tokenizer)


def has_repo(world, repo):
    try:
        world.alice.model_info(repo)
    except RepositoryNotFoundError:
        return False
    return True


def test_a_model_is_published_by_one_commit_with_card_and_tag_and_the_same_command_changes_nothing(world, run, model):
    evaluate(model, model / "evals", tasks=("cloze",))
    arguments = ("publish", model, "alice/published", "--license", "apache-2.0", "--yes", "--json")
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "alice/published" in json.dumps(json.loads(out))
    info = world.alice.model_info("alice/published")
    names = {file.rfilename for file in info.siblings}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "model_card.json"} <= names
    assert any(name.startswith("evals/offline-") for name in names)
    assert info.card_data.license == "apache-2.0"
    commits = world.alice.list_repo_commits("alice/published")
    assert [tag.name for tag in world.alice.list_repo_refs("alice/published").tags] == ["v1"]
    assert run(*arguments)[0] == 0
    assert world.alice.list_repo_commits("alice/published") == commits
    assert [tag.name for tag in world.alice.list_repo_refs("alice/published").tags] == ["v1"]


def test_a_dry_run_says_what_it_would_do_and_makes_nothing(world, run, model):
    code, out, err = run("publish", model, "alice/not-yet", "--license", "apache-2.0", "--dry-run")
    assert code == 0, err
    assert "model.safetensors" in out + err
    assert "no licence that hub_moe knows" not in out + err
    assert not has_repo(world, "alice/not-yet")
    code, out, err = run("publish", model, "alice/not-yet", "--license", "no-such", "--dry-run")
    assert code == 0, err
    assert "no-such is no licence that hub_moe knows" in out + err


def test_off_a_terminal_it_wants_yes(world, run, model):
    code, _, err = run("publish", model, "alice/not-yet", "--license", "apache-2.0")
    assert (code, "--yes" in err) == (2, True)
    assert not has_repo(world, "alice/not-yet")


def test_pickles_secrets_links_and_paths_are_listed_at_once_and_nothing_is_sent(world, run, model):
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    (model / "notes.txt").write_text(f"token hf_{'a' * 34}\n")
    (model / "settings.json").write_text(json.dumps({"cache": "/ho" + "me/alice/models"}))
    (model / "link.json").symlink_to(model / "config.json")
    code, out, err = run("publish", model, "alice/refused", "--license", "apache-2.0", "--yes")
    assert code == 1
    for name in ("pytorch_model.bin", "notes.txt", "settings.json", "link.json"):
        assert name in out + err, name
    assert not has_repo(world, "alice/refused")


def test_a_damaged_model_is_refused(world, run, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, out, err = run("publish", model, "alice/damaged", "--license", "apache-2.0", "--yes")
    assert (code, "Traceback" in err) == (1, False)
    assert "model.safetensors" in out + err
    assert not has_repo(world, "alice/damaged")


def test_a_patch_on_a_folder_is_refused_until_its_base_is_named(world, run, model, tmp_path, tiny_tokenizer):
    assert run("publish", model, "alice/the-base", "--license", "apache-2.0", "--yes")[0] == 0
    commit = world.alice.model_info("alice/the-base").sha
    patch = save_patch(tmp_path / "patch", model, tiny_tokenizer)
    arguments = ("publish", patch, "alice/the-patch", "--license", "apache-2.0", "--yes")
    code, out, err = run(*arguments)
    assert code == 1
    assert "--base" in out + err
    assert not has_repo(world, "alice/the-patch")
    code, out, err = run(*arguments, "--base", f"alice/the-base@{commit}")
    assert code == 0, out + err
    path = world.alice.hf_hub_download("alice/the-patch", "expert_patch.json", local_dir=tmp_path / "back")
    metadata = PatchMetadata.read(tmp_path / "back")
    assert (metadata.base.repo, metadata.base.commit) == ("alice/the-base", commit)
    assert str(tmp_path) not in (tmp_path / "back" / "expert_patch.json").read_text("utf-8"), path
    assert world.alice.model_info("alice/the-patch").card_data.base_model == "alice/the-base"
    assert PatchMetadata.read(patch).base.commit is None  # the folder itself is as it was


def test_a_repo_of_somebody_else_is_refused(world, run, model):
    code, _, err = run("publish", model, "bob/theirs", "--license", "apache-2.0", "--yes")
    assert (code, "Traceback" in err) == (1, False)
