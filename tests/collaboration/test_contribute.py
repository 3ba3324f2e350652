"""`hub-moe contribute` on a real Hub: one pull request, whatever happens on the way."""

import json
import os
from dataclasses import replace

import pytest

from hub_moe.collaboration.safety import open_contribution
from hub_moe.evals.records import find_records, write_record
from hub_moe.hub.marks import ContributionMark, read_mark
from hub_moe.hub.pull_requests import fetch_pull_request, list_open, read_proposal
from hub_moe.patches.metadata import PatchMetadata

from .proposals import copy

pytestmark = pytest.mark.filterwarnings("ignore:It seems that you are about to commit a data file")


@pytest.fixture
def as_bob(world, monkeypatch, hub):
    """The client of this process is bob, who owns nothing of alice's."""
    monkeypatch.setitem(os.environ, "HF_TOKEN", hub.tokens["bob"])


@pytest.fixture
def made(world, tiny_config, tiny_tokenizer, request):
    """A base of alice's and a patch for it, each test's own: `(repo, commit, folder)`."""
    name = request.node.name.replace("_", "-")[5:60]
    repo, commit = world.publish_base(name, tiny_config, tiny_tokenizer)
    return repo, commit, world.make_patch(repo, commit, "law", {1: [0, 3], 2: [1]})


def test_it_opens_one_pull_request_that_a_reviewer_finds_whole_and_the_same_command_changes_nothing(
    world, made, run, as_bob
):
    repo, commit, folder = made
    code, out, err = run("contribute", folder, repo, "--as", "law", "--general", "offline", "--yes")
    assert code == 0, err
    assert out.strip().endswith(f"/{repo}/discussions/1")
    found = fetch_pull_request(world.alice, repo, 1)
    assert (found.status, found.author, found.title) == ("open", "bob", "Expert patch law")
    mark = read_mark(ContributionMark, found.description)
    metadata = PatchMetadata.read(folder)
    assert (mark.name, mark.weights_sha256, mark.base_commit) == ("law", metadata.weights_sha256, commit)
    assert len(mark.records) == 1
    for part in ("### What it changes", "changes.png", "### What it costs elsewhere", "brackets", "Not measured"):
        assert part in found.description
    contribution, faults = open_contribution(world.alice, found, read_proposal(world.alice, found))
    assert faults == ()
    assert {"README.md", "changes.png", "model_card.json"} <= {path.name for path in contribution.folder.iterdir()}
    code, out, err = run("contribute", folder, repo, "--as", "law", "--general", "offline", "--yes")
    assert (code, list_open(world.alice, repo)) == (0, [1])
    assert "unchanged" in err
    assert fetch_pull_request(world.alice, repo, 1) == found


def test_a_changed_patch_updates_the_open_pull_request_and_leaves_nothing_old_behind(world, made, run, as_bob):
    repo, commit, folder = made
    assert run("contribute", folder, repo, "--as", "law", "--yes")[0] == 0
    other = world.make_patch(repo, commit, "law-2", {1: [4]}, with_records=False)
    code, out, err = run("contribute", other, repo, "--as", "law", "--yes", "--json")
    assert code == 0, err
    assert json.loads(out)["pull_request"] == 1
    assert json.loads(out)["state"] == "updated"
    found = fetch_pull_request(world.alice, repo, 1)
    assert list_open(world.alice, repo) == [1]
    contribution, faults = open_contribution(world.alice, found, read_proposal(world.alice, found))
    assert faults == ()
    assert contribution.records == ()
    assert read_mark(ContributionMark, found.description).weights_sha256 == PatchMetadata.read(other).weights_sha256


def test_a_patch_that_was_evaluated_twice_is_described_by_the_newer_record(world, made, run, as_bob):
    repo, commit, _ = made
    folder = world.make_patch(repo, commit, "twice", {1: [2]}, seed=7)
    of_patch = [each for each in find_records(folder / "evals") if each.record.model.kind == "expert_patch"]
    later = replace(of_patch[0].record, created="2999-01-01T00:00:00Z")
    newer = write_record(folder / "evals", later, of_patch[0].read_samples())
    code, out, err = run("contribute", folder, repo, "--as", "twice", "--dry-run", "--json")
    assert code == 0, err
    (comparison,) = json.loads(out)["comparisons"]
    assert comparison["candidate"] == newer.record.id


def test_a_draft_without_files_is_resumed_and_opened(world, made, run, as_bob):
    from hub_moe.hub.marks import write_mark

    repo, commit, folder = made
    mark = ContributionMark("law", PatchMetadata.read(folder).weights_sha256, commit)
    world.bob.create_pull_request(repo, "Expert patch law", description=f"Begun.\n\n{write_mark(mark)}")
    code, _, err = run("contribute", folder, repo, "--as", "law", "--yes")
    assert code == 0, err
    assert "resumed" in err
    assert fetch_pull_request(world.alice, repo, 1).status == "open"
    assert list_open(world.alice, repo) == [1]


def test_a_second_author_of_the_same_name_gets_an_own_pull_request_and_is_told(world, made, run, monkeypatch, hub):
    repo, _, folder = made
    assert run("contribute", folder, repo, "--as", "law", "--yes")[0] == 0
    monkeypatch.setitem(os.environ, "HF_TOKEN", hub.tokens["bob"])
    code, _, err = run("contribute", folder, repo, "--as", "law", "--yes")
    assert code == 0, err
    assert f"{repo}#1 of alice brings a patch of this name too" in err
    assert list_open(world.alice, repo) == [1, 2]


def test_wrong_stale_and_deleted_bases_bad_names_and_read_tokens_are_refused_before_anything_is_sent(
    world, made, run, monkeypatch, hub
):
    repo, commit, folder = made

    def refused(*arguments):
        code, _, err = run("contribute", *arguments, "--yes")
        assert code == 1
        return err

    assert "is for alice/" in refused(folder, "alice/other")
    for name in ("../up", "a/b", ".hidden", "x" * 97):
        assert "is no name for a patch" in refused(folder, repo, f"--as={name}")
    spoilt = copy(folder, world.root / f"{repo.split('/')[1]}-spoilt")
    text = (spoilt / "expert_patch.json").read_text()
    (spoilt / "expert_patch.json").write_text(text.replace(commit, "0" * 40))
    assert "not in the history" in refused(spoilt, repo)
    (spoilt / "expert_patch.safetensors").write_bytes(b"")
    assert "Error:" in refused(spoilt, repo)
    monkeypatch.setitem(os.environ, "HF_TOKEN", hub.tokens["reader"])
    assert "may only read" in refused(folder, repo)
    monkeypatch.setitem(os.environ, "HF_TOKEN", hub.tokens["alice"])
    world.alice.update_repo_settings(repo, private=True)
    monkeypatch.setitem(os.environ, "HF_TOKEN", hub.tokens["bob"])
    assert "it is private" in refused(folder, repo)
    world.alice.delete_repo(repo)
    assert "deleted or renamed" in refused(folder, repo)


def test_a_base_that_changed_what_the_patch_changes_is_stale_and_one_that_did_not_is_only_noted(
    world, made, run, as_bob, tiny_config, tiny_tokenizer
):
    from tests.evals.checkpoints import save_model

    repo, _, folder = made
    world.alice.upload_file(path_or_fileobj=b"words", path_in_repo="notes.txt", repo_id=repo)
    code, _, err = run("contribute", folder, repo, "--as", "law", "--dry-run")
    assert code == 0, err
    assert "1 commit further" in err
    newer = save_model(world.root / f"{repo.split('/')[1]}-newer", tiny_config, tiny_tokenizer, seed=9)
    world.alice.upload_folder(repo_id=repo, folder_path=newer)
    code, _, err = run("contribute", folder, repo, "--as", "law", "--yes")
    assert code == 1
    assert "cannot be rebased" in err
    assert list_open(world.alice, repo) == []


def test_what_is_no_safetensors_patch_is_listed_with_all_its_problems(world, made, run, as_bob):
    repo, _, folder = made
    spoilt = copy(folder, world.root / f"{repo.split('/')[1]}-pickles")
    (spoilt / "optimizer.pt").write_bytes(b"x")
    (spoilt / "notes.txt").write_text("export HF_TOKEN=hf_" + "a" * 34)
    code, out, err = run("contribute", spoilt, repo, "--as", "law", "--dry-run", "--json")
    assert code == 1
    problems = json.loads(out)["problems"]
    whats = " ".join(each["what"] for each in problems)
    assert "may hold code" in whats
    assert "a token of a Hub" in whats
    assert "hf_aaa" not in err + out
    assert list_open(world.alice, repo) == []
