"""Whose word is a result? Judged from reviews alone, in every order in which people may give them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_moe.hub.contributions import FoundReview
from hub_moe.hub.marks import ReviewMark
from hub_moe.hub.ranking import SELF_REPORTED, Result, Standing, choose_results, judge_contribution, judge_records

RECORD, OTHER = "1" * 64, "2" * 64


def review(by, verdict, *, records=None, reasons=(), counts=True, is_current=True):
    mark = ReviewMark("c" * 40, verdict, list(reasons), records or {})
    return FoundReview(by, mark, is_maintainer=counts, is_author=False, is_current=is_current)


def make_result(
    standing, *, value=0.5, base_value=None, num_documents=8, created="2026-01-01T00:00:00Z", record=RECORD
):
    return Result("cloze", "acc", value, True, num_documents, record, created, standing, base_value)


def test_a_review_that_could_not_be_finished_takes_no_rejection_back_and_an_acceptance_does():
    rejection = review("alice", "reject", reasons=["forged\x1b[2J\nscore"])
    judged = judge_contribution([rejection, review("carol", "incomplete")])
    assert (judged.word, judged.by) == ("rejected", "alice")
    assert judged.reason.isprintable()
    assert judge_contribution([rejection, review("carol", "accept")]) is None
    assert judge_contribution([review("carol", "accept"), rejection]).by == "alice"


@pytest.mark.parametrize("verdicts", list(itertools.product(("accept", "reject", "incomplete"), repeat=2)))
def test_who_does_not_count_and_what_is_past_decides_nothing(verdicts):
    outcomes = {RECORD: "bit-equal", OTHER: "failed"}
    reviews = [
        review("mallory", verdicts[0], records=outcomes, counts=False),
        review("alice", verdicts[1], records=outcomes, is_current=False),
    ]
    assert judge_contribution(reviews) is None
    assert judge_records(reviews) == {}


def test_of_two_findings_about_a_record_the_later_one_stands_and_other_outcomes_say_nothing():
    good = review("carol", "accept", records={RECORD: "within tolerance"})
    bad = review("alice", "reject", records={RECORD: "failed"})
    assert judge_records([bad, good]) == {RECORD: Standing("reproduced", "carol")}
    assert judge_records([good, bad])[RECORD].word == "rejected"
    for outcome in ("not replayable", "", "BIT-EQUAL", "reproduced"):
        assert judge_records([review("alice", "accept", records={RECORD: outcome})]) == {}


def test_of_several_records_the_trusted_one_counts_then_the_longer_then_the_newer_and_never_the_higher():
    reproduced = make_result(Standing("reproduced", "alice"), value=0.4)
    claimed = make_result(SELF_REPORTED, value=0.99, num_documents=900)
    failed = make_result(Standing("rejected", "alice"), value=1.0, num_documents=9000)
    for order in itertools.permutations([reproduced, claimed, failed]):
        assert choose_results(order) == (reproduced,)
    few, many = make_result(SELF_REPORTED, value=1.0, num_documents=4), make_result(SELF_REPORTED, num_documents=400)
    assert choose_results([many, few]) == (many,)
    newer = make_result(SELF_REPORTED, value=0.1, created="2026-02-01T00:00:00Z")
    older = make_result(SELF_REPORTED, value=1.0)
    assert choose_results([newer, older]) == (newer,)


results = st.builds(
    Result,
    task=st.just("cloze"),
    metric=st.sampled_from(["acc", "bits_per_byte"]),
    value=st.floats(-10, 10),
    higher_is_better=st.booleans(),
    num_documents=st.integers(1, 9),
    record=st.just("1"),
    created=st.just("2026"),
    standing=st.sampled_from([Standing(word) for word in ("reproduced", "self-reported", "none", "rejected")]),
    base_value=st.none() | st.floats(-10, 10),
)


@given(st.lists(results, max_size=8))
def test_trust_goes_before_every_gain_and_a_gain_before_none(found):
    ordered = sorted(found, key=lambda each: each.order("acc"))
    ranks = [each.standing.rank for each in ordered]
    assert ranks == sorted(ranks)
    for one, other in zip(ordered, ordered[1:], strict=False):
        if (one.standing, one.metric) == (other.standing, other.metric) and other.gain is not None:
            assert one.gain is not None
            assert one.gain >= other.gain
