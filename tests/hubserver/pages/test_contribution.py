"""The page of a pull request with an expert patch, and the patches on the page of a model."""

import re

import pytest

from hub_moe.hub.lineage import read_lineage
from hub_moe.hub.marks import ReviewMark, write_mark
from hub_moe.hub.merge_commits import MergedPatch

from .conftest import Visitor
from .patch_town import BASE, NASTY, PatchTown, commit, make_files, make_metadata, write_review
from .test_browser import CONTRAST, UNNAMED, overflow

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
    mark = ReviewMark(head, "reject", ["3 of 4 answers differ", NASTY], {record: "failed"})
    town.alice.comment_discussion(BASE, number, f"I looked.\n\n{write_mark(mark)}")
    html = town.show(stranger, number)
    text = words(html)
    assert "not reproduced by alice" in text
    assert "claimed better" in text
    assert 'class="verdict better"' not in html  # what did not hold is not shown as a gain
    assert "<details open><summary>2 reasons" in html
    assert "alice rejects this head" in text
    assert "<script" not in html


def test_a_review_is_stale_once_the_head_moves_on(town, stranger):
    files, record = make_files("moving")
    number, head = town.propose(files)
    town.alice.comment_discussion(BASE, number, write_review(head, records={record: "bit-equal"}))
    town.bob.upload_file(
        repo_id=BASE,
        path_or_fileobj=b"# Moving\n",
        path_in_repo="patches/moving/README.md",
        revision=f"refs/pr/{number}",
    )
    text = words(town.show(stranger, number))
    assert "stale: the head has moved on since" in text
    assert "self-reported" in text.partition("The numbers are")[0]


def test_records_are_closed_among_the_changes_and_the_rest_is_open(town, stranger):
    files, _ = make_files("folded")
    number, _ = town.propose(files)
    html = town.show(stranger, number)
    opened = re.findall(r'<details class="diff" open>\s*<summary><span class="path">([^<]+)', html)
    closed = re.findall(r'<details class="diff">\s*<summary><span class="path">([^<]+)', html)
    assert "patches/folded/expert_patch.json" in opened
    assert sorted(closed) == sorted(path for path in files if "/evals/" in path and path.endswith(".json"))


def test_merged_patches_are_shown_as_hub_moe_merge_records_them(town, stranger):
    merged = [MergedPatch(name, "ab" * 32, n, "bob", "c" * 40, "ties") for n, name in ((1, "law"), (2, "tax"))]
    files = {f"patches/{each.name}/expert_patch.json": make_metadata() for each in merged}
    files["patches/beside/expert_patch.json"] = make_metadata()
    trailers = "\n".join(line for each in merged for line in each.to_trailers())
    commit(town.alice, files, pr=False, message="Merge expert patches law, tax", description=trailers)
    text = words(stranger.get(f"/{BASE}").text)
    shown = text.partition("Merged into it")[2]
    assert "law by bob , #1 , 20 experts" in shown.partition("Patches beside it")[0]
    assert "tax by bob , #2 , 20 experts" in shown.partition("Patches beside it")[0]
    assert "beside 20 experts in 6 layers" in shown.partition("Patches beside it")[2]
    (merge,) = read_lineage(town.alice, BASE).merges
    assert (merge.method, merge.base_commit) == ("ties", "c" * 40)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 360), ("dark", 360)])
def test_an_accepted_and_a_rejected_patch_read_well(town, open_page, scheme, width):
    numbers = []
    for verdict, outcome in (("accept", "bit-equal"), ("reject", "failed")):
        files, record = make_files(f"{verdict}-{scheme}-{width}")
        number, head = town.propose(files)
        mark = ReviewMark(head, verdict, ["a reason"], {record: outcome})
        town.alice.comment_discussion(BASE, number, f"I looked.\n\n{write_mark(mark)}")
        numbers.append(number)
    with open_page(town.url, width=width, color_scheme=scheme) as page:
        for number in numbers:
            page.goto(f"{town.url}/{BASE}/discussions/{number}")
            assert overflow(page) == 0
            assert page.evaluate(CONTRAST) == []
            assert page.evaluate(UNNAMED) == []
            word = page.locator(".compared .word").bounding_box()
            assert 0 <= word["x"] < word["x"] + word["width"] <= width  # whose word it is needs no scrolling
