"""`hub-moe review` on a real Hub: honest, dishonest and hostile pull requests."""

import json
from dataclasses import replace

import pytest

from hub_moe.evals.records import read_record, write_record
from hub_moe.hub.marks import ReviewMark, read_mark
from hub_moe.hub.pull_requests import fetch_pull_request
from tests.anatomy.families import tiny_config
from tests.evals.checkpoints import save_model

from .proposals import copy

pytestmark = [
    pytest.mark.slow,  # models are loaded and asked
    pytest.mark.filterwarnings("ignore:It seems that you are about to commit a data file"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]
FAST = ("--documents", "2", "--yes", "--batch-size", "4")


@pytest.fixture(scope="module")
def base(world, tiny_tokenizer):
    return world.publish_base("review-base", tiny_config("hub_moe"), tiny_tokenizer)


@pytest.fixture(scope="module")
def honest(world, base):
    return world.make_patch(*base, "law", {1: [0, 3], 2: [1]}, size=0.01)


def test_an_honest_contribution_is_accepted_in_one_comment_that_is_replaced_on_repeat(world, base, honest, run):
    repo, _ = base
    number = world.propose(repo, honest, "law")
    code, out, err = run("review", f"{repo}#{number}", *FAST, "--nonce", "n1")
    assert code == 0, out + err
    assert "ACCEPT" in out
    first = fetch_pull_request(world.alice, repo, number)
    assert len(first.comments) == 2
    mark = read_mark(ReviewMark, first.comments[-1].text)
    assert (mark.verdict, mark.commit, mark.nonce, list(mark.regressions)) == ("accept", first.head, "n1", [])
    assert set(mark.records.values()) <= {"bit-equal", "within tolerance"}
    assert len(mark.records) == 2
    code, out, err = run("review", f"{repo}#{number}", *FAST, "--json")
    assert code == 0, err
    assert json.loads(out)["verdict"] == "accept"
    assert "Replaced" in err
    assert len(fetch_pull_request(world.alice, repo, number).comments) == 2
    assert run("review", f"{repo}#{number}", *FAST, "--again")[0] == 0
    assert len(fetch_pull_request(world.alice, repo, number).comments) == 3


def test_an_inflated_score_is_rejected(world, base, honest, tmp_path, run):
    folder = copy(honest, tmp_path / "patch")
    path = next(p for p in folder.glob("evals/*.json") if "expert_patch" in p.read_text("utf-8"))
    stored = read_record(path)
    entry = stored.record.entries[0]
    better = tuple(replace(metric, value=0.99) for metric in entry.metrics)
    record = replace(stored.record, entries=(replace(entry, metrics=better), *stored.record.entries[1:]))
    samples = stored.read_samples()
    path.unlink()
    write_record(folder / "evals", record, samples)
    repo, _ = base
    number = world.propose(repo, folder, "inflated")
    code, out, err = run("review", f"{repo}#{number}", *FAST)
    assert code == 1, out + err
    assert "REJECT" in out
    assert "numbers: " in out
    mark = read_mark(ReviewMark, fetch_pull_request(world.alice, repo, number).comments[-1].text)
    assert mark.verdict == "reject"
    assert "failed" in mark.records.values()


def test_a_patch_that_spoils_the_model_elsewhere_is_rejected_by_the_bases_suite(world, base, run):
    repo, commit = base
    folder = world.make_patch(repo, commit, "spoiler", {1: list(range(8)), 2: list(range(8))}, size=5.0, seed=5)
    number = world.propose(repo, folder, "spoiler")
    code, out, err = run("review", f"{repo}#{number}", *FAST, "--suite", "offline", "--limit", "12")
    assert code == 1, out + err
    assert "it is worse than the base on " in out
    assert read_mark(ReviewMark, fetch_pull_request(world.alice, repo, number).comments[-1].text).regressions


def test_without_records_or_a_suite_of_the_base_a_review_is_incomplete(world, tiny_tokenizer, run):
    folder = save_model(world.root / "bare", tiny_config("hub_moe"), tiny_tokenizer)
    world.alice.create_repo("alice/review-bare")
    commit = world.alice.upload_folder(repo_id="alice/review-bare", folder_path=folder).oid
    patch = world.make_patch("alice/review-bare", commit, "law", {1: [0]}, with_records=False)
    number = world.propose("alice/review-bare", patch, "law")
    code, out, err = run("review", f"alice/review-bare#{number}", "--no-post", "--json")
    assert code == 3, err
    gaps = json.loads(out)["gaps"]
    assert "claims nothing" in gaps[0]
    assert "choose a suite (--suite)" in gaps[1]


def test_every_open_contribution_without_a_review_is_reviewed_by_one_command(world, tiny_tokenizer, run):
    repo, commit = world.publish_base("review-all", tiny_config("hub_moe"), tiny_tokenizer)
    for name in ("one", "two"):
        patch = world.make_patch(repo, commit, name, {1: [0]}, with_records=False)
        world.propose(repo, patch, name, extra={f"patches/{name}/evil.pkl": b"x"})
    world.bob.create_pull_request(repo, "No contribution")
    code, out, err = run("review", repo, "--all-open", "--yes", "--json")
    assert code == 1, err
    assert [each["verdict"] for each in json.loads(out)] == ["reject", "reject"]
    code, out, err = run("review", repo, "--all-open", "--yes")
    assert (code, out) == (0, "")
    assert "no open contribution that you have not reviewed" in err


def test_what_cannot_be_reviewed_is_told_in_one_sentence(world, base, honest, run):
    repo, _ = base
    talk = world.bob.create_discussion(repo, "A question").num
    closed = world.propose(repo, honest, "closed")
    world.bob.change_discussion_status(repo, closed, "closed")
    for reference, reason in [
        (f"{repo}#999", "it is not there"),
        (f"{repo}#{talk}", "is a discussion and no pull request"),
        (f"{repo}#{closed}", "is closed already"),
        ("alice/deleted#1", "it was deleted or renamed"),
        ("nonsense#1", "expected OWNER/NAME#NUMBER"),
    ]:
        code, out, err = run("review", reference, "--no-post")
        assert (code, out) == (1, "")
        assert reason in err
    code, _, err = run("review", f"{repo}#1")
    assert code == 2
    assert "needs --yes or --no-post" in err
