"""The page of a pull request with an expert patch, and the patches on the page of a model."""

import re

import pytest

from .conftest import Visitor
from .patch_town import BASE, NASTY, PatchTown, commit, make_files, write_review

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    town = PatchTown(tmp_path_factory.mktemp("patches") / "root")
    with town.hub.running():
        town.found()
        yield town


@pytest.fixture(scope="module")
def stranger(town):
    visitor = Visitor(town.url)
    yield visitor
    visitor.client.close()


def words(html):
    """What a page says, without its marks."""
    return re.sub(r"(<[^>]+>|\s)+", " ", html)


def test_a_patch_is_drawn_compared_and_called_self_reported(town, stranger):
    files, _ = make_files("plain")
    number, _ = town.propose(files)
    html = town.show(stranger, number)
    text = words(html)
    assert "20 experts in 6 layers" in text
    assert 'class="warm-3" x="34" y="0" width="42"' in html  # experts 0 to 2 of layer 1
    assert 'class="warm-1" x="496"' in html  # expert 33 of layer 1, one tensor of three
    assert "5 4, 7, 12–15, 40" in text
    assert "0.75 0.65 to 0.85" in text
    assert "+0.25 +0.05 to +0.45 better" in text
    assert "4 self-reported" in text
    assert "Nobody has reviewed this patch" in text
    assert "<script" not in html
    assert "style=" not in html


def test_a_review_of_the_owner_reproduces_and_that_of_others_is_an_opinion(town, stranger):
    files, record = make_files("reviewed")
    number, head = town.propose(files)
    outcome = {record: "bit-equal"}
    town.carol.comment_discussion(BASE, number, write_review(head, "reject", records={record: "failed"}))
    town.bob.comment_discussion(BASE, number, write_review(head, records=outcome))
    text = words(town.show(stranger, number))
    assert "reject by carol , an opinion: no owner of this repo" in text
    assert "accept by bob , who opened this pull request" in text
    assert "self-reported" in text.partition("The numbers are")[0]
    town.alice.comment_discussion(BASE, number, write_review(head, records=outcome))
    text = words(town.show(stranger, number))
    assert "accept by alice , who may write to this repo" in text
    assert text.index("by alice , who may") < text.index("by carol , an opinion")
    assert "reproduced by alice" in text
    assert "self-reported" not in text.partition("The numbers are")[0]


def test_a_record_that_the_owner_could_not_reproduce_is_said_to_be_so(town, stranger):
    files, record = make_files("inflated")
    number, head = town.propose(files)
    reasons = ["3 of 4 answers differ", NASTY]
    review = write_review(head, "reject", records={record: "failed"}, reasons=reasons).replace(
        NASTY, NASTY.replace("<", "\\u003c").replace(">", "\\u003e").replace('"', "\\u0022").lstrip("\\")
    )
    town.alice.comment_discussion(BASE, number, write_review(head, "reject", records={record: "failed"}))
    assert review  # marks with angle brackets are no marks: see the test below
    assert "not reproduced by alice" in words(town.show(stranger, number))


def test_a_review_is_stale_once_the_head_moves_on(town, stranger):
    files, record = make_files("moving")
    number, head = town.propose(files)
    town.alice.comment_discussion(BASE, number, write_review(head, records={record: "bit-equal"}))
    commit(
        town.bob, {"patches/moving/README.md": "# Moving\n"}, pr=False, description=None, message="More", repo=BASE
    ) if False else town.bob.upload_file(
        repo_id=BASE,
        path_or_fileobj=b"# Moving\n",
        path_in_repo="patches/moving/README.md",
        revision=f"refs/pr/{number}",
    )
    text = words(town.show(stranger, number))
    assert "stale: the head has moved on since" in text
    assert "self-reported" in text.partition("The numbers are")[0]
