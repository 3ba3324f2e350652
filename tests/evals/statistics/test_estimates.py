import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from hub_moe.errors import EvaluationError
from hub_moe.evals.statistics import (
    estimate_accuracy,
    estimate_bits_per_byte,
    estimate_mean,
    estimate_perplexity,
    estimate_ratio,
)
from hub_moe.evals.statistics.estimates import student_t_quantile

SCORES = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=30)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 10, 29, 30, 999, 1000, 1319, 50_000, math.inf])
@pytest.mark.parametrize("probability", [0.025, 0.5, 0.8, 0.975, 0.9996])
def test_quantiles_of_students_t_are_scipys(df, probability):
    expected = scipy.stats.t.ppf(probability, df)
    assert student_t_quantile(probability, df) == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_a_mean_has_scipys_standard_error_and_interval():
    scores = np.random.default_rng(1).normal(size=23)
    estimate = estimate_mean(scores)
    assert estimate.standard_error == pytest.approx(scipy.stats.sem(scores))
    interval = scipy.stats.ttest_1samp(scores, 0).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))


def test_clusters_of_one_size_have_the_standard_error_of_their_means():
    score_GN = np.random.default_rng(2).normal(size=(6, 4)) + np.arange(6)[:, None]
    estimate = estimate_mean(score_GN.ravel(), groups=np.repeat(list("abcdef"), 4))
    assert estimate.standard_error == pytest.approx(scipy.stats.sem(score_GN.mean(axis=1)))
    assert (estimate.num_documents, estimate.num_clusters, estimate.df) == (24, 6, 5)
    interval = scipy.stats.ttest_1samp(score_GN.mean(axis=1), 0).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))


def test_clusters_of_several_sizes_have_millers_standard_error_with_the_correction_for_few():
    # Miller 2024 sums the products of deviations over all pairs of documents of a cluster, then divides by n^2
    scores, groups = [1, 0, 0, 1, 1, 0.5, 0.25], [0, 0, 1, 2, 2, 2, 3]
    deviations = np.array(scores) - np.mean(scores)
    products = sum(
        deviations[i] * deviations[j] for i in range(7) for j in range(7) if groups[i] == groups[j]
    )  # the diagonal is the variance of independent documents
    expected = math.sqrt(products * 4 / 3) / 7
    assert estimate_mean(scores, groups=groups).standard_error == pytest.approx(expected)


def test_a_clustered_standard_error_equals_one_computed_by_hand():
    # mean 1/2; the sums of deviations are +1 for a, -1 for b, 0 for c: sqrt(3/2 * (1 + 1 + 0)) / 6
    estimate = estimate_mean([1, 1, 0, 0, 1, 0], groups=["a", "a", "b", "b", "c", "c"])
    assert estimate.standard_error == pytest.approx(math.sqrt(3) / 6)


def test_documents_that_copy_each_other_count_once():
    once, copied = estimate_mean([1, 0, 1, 1]), estimate_mean([1, 0, 1, 1] * 5, groups=[0, 1, 2, 3] * 5)
    assert copied.standard_error == pytest.approx(once.standard_error)
    assert estimate_mean([1, 0, 1, 1] * 5).standard_error < once.standard_error / 2


@given(SCORES)
def test_clusters_of_one_document_give_the_plain_standard_error(scores):
    plain, clustered = estimate_mean(scores), estimate_mean(scores, groups=range(len(scores)))
    assert plain == clustered


@given(SCORES, st.randoms(use_true_random=False))
def test_an_estimate_does_not_depend_on_the_order_of_documents(scores, random):
    groups = [index // 2 for index in range(len(scores) + 1)][: len(scores)]
    groups[-1] = -1  # so that there are at least two
    rows = list(zip(scores, groups, strict=True))
    before = estimate_mean(scores, groups=groups)
    random.shuffle(rows)
    after = estimate_mean([score for score, _ in rows], groups=[group for _, group in rows])
    assert after.value == pytest.approx(before.value, abs=1e-9)
    assert after.standard_error == pytest.approx(before.standard_error, abs=1e-9)


@given(SCORES)
def test_turned_signs_turn_the_interval(scores):
    estimate, turned = estimate_mean(scores), estimate_mean([-score for score in scores])
    assert (turned.low, turned.high) == pytest.approx((-estimate.high, -estimate.low))
    assert turned.standard_error == pytest.approx(estimate.standard_error)


def test_a_ratio_equals_one_computed_by_hand():
    # R = 12 / 6 = 2; errors 3 - 2, 1 - 2, 8 - 8 = 1, -1, 0: sqrt(3/2 * 2) / 6
    estimate = estimate_ratio([3, 1, 8], [1, 1, 4])
    assert estimate.value == 2
    assert estimate.standard_error == pytest.approx(math.sqrt(3) / 6)


def _texts():
    generator = np.random.default_rng(3)
    sizes_bytes = generator.integers(200, 2000, size=400)
    return -sizes_bytes * generator.normal(0.7, 0.1, size=400), sizes_bytes


def test_the_standard_errors_of_bits_per_byte_and_perplexity_are_those_of_the_bootstrap():
    log_likelihoods, sizes = _texts()
    rows_BN = np.random.default_rng(4).integers(0, 400, size=(4000, 400))
    nats_B = -log_likelihoods[rows_BN].sum(axis=1) / sizes[rows_BN].sum(axis=1)
    bits = estimate_bits_per_byte(log_likelihoods, sizes)
    assert bits.value == pytest.approx(-log_likelihoods.sum() / sizes.sum() / math.log(2))
    assert bits.standard_error == pytest.approx((nats_B / math.log(2)).std(), rel=0.05)
    perplexity = estimate_perplexity(log_likelihoods, sizes)
    assert perplexity.value == pytest.approx(2**bits.value)
    assert perplexity.standard_error == pytest.approx(np.exp(nats_B).std(), rel=0.05)
    assert (perplexity.low, perplexity.high) == pytest.approx(np.exp2([bits.low, bits.high]))


@pytest.mark.parametrize(("right", "total"), [(0, 26), (26, 26), (1, 20), (7, 10), (600, 1319)])
def test_the_interval_of_an_accuracy_is_scipys_wilson_interval(right, total):
    estimate = estimate_accuracy([1] * right + [0] * (total - right))
    interval = scipy.stats.binomtest(right, total).proportion_ci(method="wilson")
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert estimate.value == right / total


def test_the_interval_of_a_clustered_accuracy_widens_to_that_of_its_clusters():
    correct = np.repeat([1, 1, 1, 0, 1, 0, 1, 1, 1, 0], 20)
    alone = estimate_accuracy(correct)
    together = estimate_accuracy(correct, groups=np.repeat(range(10), 20))
    assert together.high - together.low > 3 * (alone.high - alone.low)
    assert 0 < together.low < 0.7 < together.high < 1
    all_right = estimate_accuracy([1] * 200, groups=np.repeat(range(10), 20))
    assert all_right.low < scipy.stats.binomtest(10, 10).proportion_ci(method="wilson").low
    assert estimate_accuracy(correct, groups=range(200)) == alone


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimate_mean([]), "at least one number"),
        (lambda: estimate_mean([[1.0, 2.0]]), "shape"),
        (lambda: estimate_mean([1.0]), "at least two"),
        (lambda: estimate_mean([1.0, 2.0, 3.0], groups=["a"] * 3), "1 cluster of 3 documents"),
        (lambda: estimate_mean([1.0, 2.0, 3.0], groups=["a"]), "3 scores and 1 groups"),
        (lambda: estimate_mean([1.0, math.nan, math.inf]), "Score number 1 is nan, and 2 of 3"),
        (lambda: estimate_mean([1.0, None]), "number 1 is nan"),
        (lambda: estimate_bits_per_byte([-1.0, -math.inf], [4, 4]), "not finite"),
        (lambda: estimate_bits_per_byte([-1.0, -2.0], [4, 0]), "number 1 has no positive size"),
        (lambda: estimate_bits_per_byte([-1.0, -2.0], [4]), "2 totals and 1 sizes"),
        (lambda: estimate_perplexity([-9000.0, -8000.0], [1, 1]), "beyond any perplexity"),
        (lambda: estimate_accuracy([0, 1, 0.5]), "0 or 1"),
    ],
)
def test_scores_that_cannot_be_estimated_are_refused(call, message):
    with pytest.raises(EvaluationError, match=message):
        call()


def test_an_estimate_goes_to_json():
    text = json.dumps(estimate_accuracy(np.array([1, 0, 1], dtype=np.int8)).to_dict(), allow_nan=False)
    assert json.loads(text)["num_documents"] == 3
