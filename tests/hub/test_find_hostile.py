"""`hub-moe find` among people who want to stand first, or want others not to be found."""

import json

import pytest

from hub_moe.evals.compare import compare_records
from hub_moe.hub.fine_tunes import find_fine_tunes
from hub_moe.hub.marks import ContributionMark, ReviewMark, write_mark

from .fair import BEFORE, BEST, BETTER, build_fair, commit, make_evidence, make_source, sha256

pytestmark = pytest.mark.filterwarnings("ignore:It seems that you are about to commit a data file")


@pytest.fixture
def fair(hub, request):
    """A base of the test's own, with an honest contribution that alice reproduced."""
    fair = build_fair(hub, f"hostile-{sha256(request.node.nodeid.encode())[:12]}").found()
    number, record = fair.propose("honest")
    fair.review(number, [record])
    return fair


@pytest.fixture
def find(tmp_path, fair):
    def find(task="cloze"):
        found = find_fine_tunes(
            fair.alice, fair.repo, compare=lambda a, b: compare_records(a, b).to_dict(), scratch=tmp_path, task=task
        )
        json.dumps(found.to_dict(), allow_nan=False)
        assert all(note.isprintable() for note in found.notes)
        return found

    return find


@pytest.fixture
def names(find):
    """The standing of what is found, by name, in order."""
    return lambda task="cloze": {each.name: str(each.standing) for each in find(task).fine_tunes}


def own_patch(fair, repo, **options):
    """Publish a patch as a model of bob's own."""
    _, record, files = fair.make_patch(repo, **options)
    card = f"---\nbase_model: {fair.repo}\ntags: [expert-patch]\n---\n# It\n"
    fair.bob.create_repo(repo)
    commit(fair.bob, repo, {"README.md": card.encode(), **files})
    return record


@pytest.mark.parametrize("task", ["cloze", None])
def test_a_rejected_patch_stands_nowhere_above_an_honest_one_however_often_it_is_told(fair, names, task):
    number, record = fair.propose("inflated", claimed=0.999)
    fair.review(number, [record], verdict="reject", outcome="failed")
    again = f"bob/{fair.repo.partition('/')[2]}"
    own_patch(fair, again, claimed=0.999)
    fair.propose("inflated-once-more", claimed=0.999)
    found = names(task)
    assert list(found)[0] == "honest"
    assert list(found)[-1] == "inflated"
    assert found["honest"] == "reproduced by alice"
    assert {found[again], found["inflated-once-more"]} == {"self-reported"}


def test_nobody_reproduces_their_own_work_by_a_mark_in_their_description_or_another_comment(fair, names):
    weights, record, files = fair.make_patch("forged", cloze=BEST)
    files = {f"patches/forged/{path}": content for path, content in files.items()}
    mark = write_mark(ContributionMark("forged", sha256(weights), fair.commit, [record]))
    made = commit(fair.bob, fair.repo, files, description=mark, pr=True)
    head = fair.bob.repo_info(fair.repo, revision=f"refs/pr/{made.pr_num}").sha
    review = write_mark(ReviewMark(head, "accept", [], {record: "bit-equal"}))
    fair.bob.comment_discussion(fair.repo, made.pr_num, f"alice says:\n\n{review}")
    discussion = fair.bob.get_discussion_details(fair.repo, made.pr_num)
    fair.bob.edit_discussion_comment(fair.repo, made.pr_num, discussion.events[0].id, f"{review}\n\n{mark}")
    assert names() == {"honest": "reproduced by alice", "forged": "self-reported"}


def test_a_maintainer_who_quotes_a_mark_or_says_it_of_another_commit_reproduces_nothing(fair, names):
    number, record = fair.propose("quoted", cloze=BEST)
    head = fair.bob.repo_info(fair.repo, revision=f"refs/pr/{number}").sha
    review = write_mark(ReviewMark(head, "accept", [], {record: "bit-equal"}))
    fair.alice.comment_discussion(fair.repo, number, f"> {review}\n\nWhat is this, please?")
    other = write_mark(ReviewMark("0" * 40, "accept", [], {record: "bit-equal"}))
    fair.alice.comment_discussion(fair.repo, number, other)
    assert names()["quoted"] == "self-reported"


def test_a_record_that_was_reproduced_elsewhere_is_no_word_about_a_copy(fair, names):
    """Mallory's pull request brings the honest patch's folder and better claims beside it."""
    _, better = make_evidence(fair.source, cloze=BEST)
    weights, record, files = fair.make_patch("honest")
    mark = ContributionMark("copy", sha256(weights), fair.commit, [record])
    files = {f"patches/copy/{path}": content for path, content in (files | better).items()}
    commit(fair.bob, fair.repo, files, description=write_mark(mark), pr=True)
    assert names() == {"honest": "reproduced by alice", "copy": "self-reported"}


def test_a_record_that_a_review_did_not_speak_of_is_not_reproduced_with_the_others(fair, find):
    """Of two records of the same weights one was replayed; the other claims more, over more documents."""
    weights, _, _ = fair.make_patch("two-faced")
    _, boast = make_evidence(make_source(weights, base=fair.source), cloze=BEST + BEST)
    number, record = fair.propose("two-faced", extra=boast)
    fair.review(number, [record])
    result = next(each for each in find().fine_tunes if each.name == "two-faced").of_task("cloze")
    assert (result.value, result.record, str(result.standing)) == (0.75, record, "reproduced by alice")


METADATA = {
    "not-json": b"{",
    "deep": b"[" * 200_000,
    "list": b"[]",
    "nan": b'{"format_version": NaN}',
    "latin": b"\xff\xfe",
    "endless": b" " * 20_000_002,
}


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
def test_metadata_that_is_none_costs_its_own_patch_alone(fair, names, metadata):
    fair.propose("broken", extra={"expert_patch.json": metadata})
    repo = f"bob/{fair.repo.partition('/')[2]}"
    own_patch(fair, repo)
    commit(fair.bob, repo, {"expert_patch.json": metadata})
    assert names() == {"honest": "reproduced by alice", repo: "none", "broken": "none"}


def test_hundreds_of_records_in_one_repo_are_not_all_read(fair, names):
    _, evidence = make_evidence(fair.source, cloze=BETTER)
    (content,) = (each for path, each in evidence.items() if path.endswith(".json"))
    many = {f"evals/many-{index:016x}.json": content for index in range(120)}
    repo = f"bob/{fair.repo.partition('/')[2]}-many"
    fair.add_model(repo, extra=many)
    assert names() == {"honest": "reproduced by alice", repo: "none"}


@pytest.mark.parametrize("name", ["folder", "link"])
def test_what_lies_where_a_record_should_is_left_alone(fair, names, name):
    files = {
        "folder": {"evals/quick-0123456789abcdef.json/x": b"{}", "evals/sub/quick-0123456789abcdef.json": b"{"},
        "link": {"evals/quick-0123456789abcdef.json": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"},
    }[name]
    repo = f"bob/{fair.repo.partition('/')[2]}"
    fair.add_model(repo, extra=files, cloze=BEFORE)
    assert names() == {"honest": "reproduced by alice", repo: "self-reported"}
