"""`hub-moe review` on a real Hub: honest, dishonest and hostile pull requests."""

import json

import pytest

from hub_moe.hub.marks import ReviewMark, read_mark
from hub_moe.hub.pull_requests import fetch_pull_request

from .proposals import copy

pytestmark = [
    pytest.mark.slow,  # models are loaded and asked
    pytest.mark.filterwarnings("ignore:It seems that you are about to commit a data file"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]
FAST = ("--documents", "2", "--yes", "--batch-size", "4")


@pytest.fixture(scope="module")
def base(world, tiny_tokenizer):
    from tests.anatomy.families import tiny_config

    config = tiny_config("hub_moe")
    return world.publish_base("review-base", config, tiny_tokenizer)


@pytest.fixture(scope="module")
def honest(world, base):
    return world.make_patch(*base, "law", {1: [0, 3], 2: [1]}, size=0.01)


def test_an_honest_contribution_is_accepted_in_one_comment_that_is_replaced_on_repeat(world, base, honest, run):
    repo, _ = base
    number = world.propose(repo, honest, "law")
    code, out, err = run("review", f"{repo}#{number}", *FAST, "--nonce", "n1")
    assert code == 0, out + err
    assert "ACCEPT" in out
    assert "bit-equal" in out
    first = fetch_pull_request(world.alice, repo, number)
    assert len(first.comments) == 2
    mark = read_mark(ReviewMark, first.comments[-1].text)
    assert (mark.verdict, mark.commit, mark.nonce, list(mark.regressions)) == ("accept", first.head, "n1", [])
    assert set(mark.records.values()) == {"bit-equal"}
    assert len(mark.records) == 2
    code, out, err = run("review", f"{repo}#{number}", *FAST, "--json")
    assert code == 0, err
    assert json.loads(out)["verdict"] == "accept"
    assert "Replaced" in err
    assert len(fetch_pull_request(world.alice, repo, number).comments) == 2
    assert run("review", f"{repo}#{number}", *FAST, "--again")[0] == 0
    assert len(fetch_pull_request(world.alice, repo, number).comments) == 3
