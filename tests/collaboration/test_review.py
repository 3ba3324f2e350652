"""`hub-moe review` on a real Hub: honest, dishonest and hostile pull requests."""

import json
import math
from dataclasses import replace

import pytest

from hub_moe.collaboration.costs import percent, share_lost
from hub_moe.evals.records import read_record, write_record
from hub_moe.hub.marks import ReviewMark, read_mark
from hub_moe.hub.pull_requests import fetch_pull_request
from tests.anatomy.families import tiny_config
from tests.evals.checkpoints import save_model

from .proposals import SPOILING, copy, fill_spoilable

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


def test_what_it_costs_elsewhere_is_a_note_within_the_tolerance_and_a_reason_beyond_it(world, tiny_tokenizer, run):
    repo, commit = world.publish_base(
        "review-costs",
        tiny_config("hub_moe"),
        tiny_tokenizer,
        prepare=lambda folder: fill_spoilable(folder, tiny_tokenizer),
    )
    number = world.propose(repo, world.make_patch(repo, commit, "law", SPOILING, size=3.0), "law")
    options = (f"{repo}#{number}", *FAST, "--data-dir", world.root / "data", "--json")
    code, out, err = run("review", *options)
    assert code == 1, err
    report = json.loads(out)
    assert report["tolerance"] == 0
    assert report["rejections"][0].startswith("it is worse than the base on text: bits_per_byte ")
    mark = read_mark(ReviewMark, fetch_pull_request(world.alice, repo, number).comments[-1].text)
    assert (list(mark.regressions), mark.tolerance) == (["text"], 0)
    code, out, err = run("review", *options, "--tolerance", "0.02")
    assert code == 0, out + err
    report = json.loads(out)
    task = report["regressions"][0]["comparison"]["tasks"][0]
    cost = percent(task["candidate"]["value"] / task["base"]["value"] - 1)
    note = f"it costs {cost} on text, within the tolerance of 2 %: bits_per_byte "
    assert (report["verdict"], report["tolerance"]) == ("accept", 0.02)
    assert any(each.startswith(note) for each in report["notes"])
    text = fetch_pull_request(world.alice, repo, number).comments[-1].text
    assert f"it costs {cost} on text, within the tolerance of 2 %" in text
    assert ", tolerance 2 %." in text
    mark = read_mark(ReviewMark, text)
    assert (mark.verdict, list(mark.regressions), mark.tolerance) == ("accept", [], 0.02)


@pytest.mark.parametrize("tolerance", ["-0.1", "1", "2", "nan", "inf"])
def test_a_tolerance_that_is_no_share_is_refused_in_a_sentence(run, tolerance):
    for command in ("review", "merge"):
        code, out, err = run(command, "alice/base#1", "--yes", f"--tolerance={tolerance}")
        assert (code, out) == (1, "")
        assert "--tolerance is a share from 0 to below 1, such as 0.02 for 2 %, not" in err
        assert err.count("\n") == 1


def test_shares_are_of_the_bases_value_and_of_perplexities_themselves():
    assert share_lost("acc", 0.5, 0.49, lower_is_better=False) == pytest.approx(0.02)
    assert share_lost("bits_per_byte", 2.0, 2.05, lower_is_better=True) == pytest.approx(0.025)
    assert share_lost("bits_per_byte", 2.0, 1.9, lower_is_better=True) < 0
    assert share_lost("word_perplexity", math.log(20), math.log(21), lower_is_better=True) == pytest.approx(0.05)
    assert share_lost("acc", 0.0, 0.0, lower_is_better=False) == 0
    assert share_lost("cost", 0.0, 0.1, lower_is_better=True) == math.inf
    assert [percent(share) for share in (0.02, 0.0134, 0.5, 0.0005, 1.0, 0.0)] == [
        "2 %",
        "1.3 %",
        "50 %",
        "0.05 %",
        "100 %",
        "0 %",
    ]


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
    for options, reason in [
        ((), "needs --yes or --no-post"),
        (("--yes", "--limit", 3), "--limit is for the tasks of --suite"),
    ]:
        code, _, err = run("review", f"{repo}#1", *options)
        assert code == 2
        assert reason in " ".join(err.replace("│", " ").split())
    code, out, err = run("review", f"{repo}#1", "--yes", "--device", "quatsch")
    assert (code, out) == (1, "")
    assert "Looking at" not in err
    assert "The device 'quatsch' cannot be used here" in err
