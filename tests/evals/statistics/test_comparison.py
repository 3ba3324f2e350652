import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from hub_moe.errors import ConfigError, EvaluationError
from hub_moe.evals.statistics import (
    DocumentScores,
    compare_tasks,
    exact_mcnemar,
    minimum_detectable_effect,
    pair_scores,
    permutation_test,
    plan_detectable_difference,
)


def scores_of(scores, **columns):
    documents = [f"d{index:04d}" for index in range(len(scores))]
    return DocumentScores(documents, columns.pop("prompts", [f"p{d}" for d in documents]), scores, **columns)


def pair(base, candidate, **columns):
    return pair_scores(scores_of(base, **columns), scores_of(candidate, **columns))


def test_scores_are_joined_by_document_whatever_the_order():
    base = DocumentScores(["a", "b", "c"], ["1", "2", "3"], [1, 2, 3], groups=["x", "y", "y"])
    candidate = DocumentScores(["c", "a", "b"], ["3", "1", "2"], [30, 10, 20], groups=["y", "x", "y"])
    pairs = pair_scores(base, candidate)
    assert pairs.documents == ("a", "b", "c")
    assert pairs.groups == ("x", "y", "y")
    assert pairs.differences.tolist() == [9, 18, 27]


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (DocumentScores(["a"], ["1"], [1]), "1 documents were scored for the base only: 'b'"),
        (DocumentScores(["a", "b", "c"], ["1", "2", "3"], [1, 1, 1]), "for the candidate only: 'c'"),
        (DocumentScores(["a", "b"], ["1", "9"], [1, 1]), "prompts differ for 1 of 2 documents, 'b'; run both models"),
        (DocumentScores(["a", "b"], ["1", "2"], [1, 1], groups=["x", "x"]), "groups differ for all documents"),
        (DocumentScores(["a", "b"], ["1", "2"], [1, 1], sizes=[1, 2]), "sizes differ for all documents"),
    ],
)
def test_scores_on_other_documents_or_prompts_are_refused(candidate, message):
    with pytest.raises(EvaluationError, match=message):
        pair_scores(DocumentScores(["a", "b"], ["1", "2"], [0, 1]), candidate)


def test_perplexities_of_different_tokenizers_are_refused():
    with pytest.raises(EvaluationError, match="sizes differ for 2 of 2 documents.*bits per byte"):
        pair_scores(scores_of([3, 4], sizes=[10, 20]), scores_of([3, 4], sizes=[11, 19]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DocumentScores(["a", "a"], ["1", "1"], [1, 0]), "scored once, but 'a'"),
        (lambda: DocumentScores(["a", "b"], ["1"], [1, 0]), "2 documents have 1 prompts"),
        (lambda: DocumentScores(["a", "b"], ["1", "2"], [1, None]), "Score number 1 is nan"),
        (lambda: DocumentScores([], [], []), "at least one number"),
    ],
)
def test_scores_that_are_incomplete_are_refused(make, message):
    with pytest.raises(EvaluationError, match=message):
        make()


def test_a_clear_gain_is_better_and_turned_round_it_is_worse():
    base, candidate = [0] * 60 + [1] * 40, [1] * 20 + [0] * 40 + [1] * 38 + [0] * 2
    (task,) = compare_tasks({"gsm8k": pair(base, candidate)}).tasks
    assert (task.verdict, task.test) == ("better", "exact McNemar")
    assert (task.num_only_base, task.num_only_candidate) == (2, 20)
    assert task.p_value == task.adjusted_p_value == exact_mcnemar(2, 20)
    assert task.difference.value == pytest.approx(0.18)
    paired = scipy.stats.ttest_rel(candidate, base).confidence_interval(0.95)
    assert (task.difference.low, task.difference.high) == pytest.approx((paired.low, paired.high))
    wilson = scipy.stats.binomtest(40, 100).proportion_ci(method="wilson")
    assert (task.base.low, task.base.high) == pytest.approx((wilson.low, wilson.high))
    assert compare_tasks({"gsm8k": pair(candidate, base)}).tasks[0].verdict == "worse"


def test_a_gain_without_losses_still_has_the_interval_of_a_difference():
    # all differences are 0 or 1, as if they were answers
    (task,) = compare_tasks({"t": pair([0, 0, 0, 0], [1, 0, 1, 0])}).tasks
    paired = scipy.stats.ttest_rel([1, 0, 1, 0], [0, 0, 0, 0]).confidence_interval(0.95)
    assert (task.difference.low, task.difference.high) == pytest.approx((paired.low, paired.high))


def test_fewer_bits_per_byte_are_better_and_weigh_documents_by_their_bytes():
    generator = np.random.default_rng(1)
    sizes = generator.integers(100, 3000, size=80)
    base = sizes * generator.normal(1.0, 0.2, size=80)
    candidate = base - sizes * generator.normal(0.02, 0.01, size=80)
    pairs = pair(base, candidate, sizes=sizes)
    (task,) = compare_tasks({"bits per byte": pairs}, lower_is_better={"bits per byte"}).tasks
    assert (task.verdict, task.test, task.lower_is_better) == ("better", "permutation", True)
    assert task.difference.value == pytest.approx(candidate.sum() / sizes.sum() - base.sum() / sizes.sum())
    assert task.difference.standard_error < task.base.standard_error / 5  # pairing takes out what documents share
    assert task.p_value == permutation_test(candidate - base).p_value
    assert task.num_only_base is None
    assert compare_tasks({"bits per byte": pairs}).tasks[0].verdict == "worse"


def test_answers_about_few_passages_are_tested_by_passage():
    base, candidate = [0] * 40, [1] * 30 + [0] * 10
    (alone,) = compare_tasks({"t": pair(base, candidate)}).tasks
    (together,) = compare_tasks({"t": pair(base, candidate, groups=list("aaaaabbbbb" * 4))}).tasks
    assert alone.verdict == "better"
    assert (together.verdict, together.test, together.p_value) == ("tied", "exact permutation", 0.5)
    assert together.difference.num_clusters == 2


def test_groups_of_one_document_change_nothing():
    base, candidate = [0, 1, 0, 0, 1, 0, 1], [1, 1, 0, 1, 1, 1, 1]
    without, grouped = pair(base, candidate), pair(base, candidate, groups=list("abcdefg"))
    assert compare_tasks({"t": without}) == compare_tasks({"t": grouped})


def test_a_gain_that_one_task_would_show_is_tied_among_many():
    gain = pair([0] * 20, [1] * 7 + [0] * 13)  # p = 2 / 2**7
    nothing = pair([0, 1] * 10, [0, 1] * 10)
    assert compare_tasks({"gain": gain}).tasks[0].verdict == "better"
    many = compare_tasks({"gain": gain, **{f"other {index}": nothing for index in range(3)}})
    assert [task.verdict for task in many.tasks] == ["tied"] * 4
    assert many.tasks[0].adjusted_p_value == pytest.approx(4 * 2 / 2**7)
    alone = compare_tasks({"gain": gain}).tasks[0].minimum_detectable_effect
    assert many.tasks[0].minimum_detectable_effect > alone
    assert many.tasks[1].minimum_detectable_effect is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_swapping_the_models_swaps_the_verdict_and_nothing_else(rows):
    base, candidate = zip(*rows, strict=True)
    (task,) = compare_tasks({"t": pair(base, candidate)}, alpha=0.3).tasks
    (swapped,) = compare_tasks({"t": pair(candidate, base)}, alpha=0.3).tasks
    assert swapped.verdict == {"better": "worse", "worse": "better", "tied": "tied"}[task.verdict]
    assert swapped.p_value == task.p_value
    assert swapped.difference.value == pytest.approx(-task.difference.value)
    (minded,) = compare_tasks({"t": pair(base, candidate)}, alpha=0.3, lower_is_better={"t"}).tasks
    assert minded.verdict == swapped.verdict


def test_models_that_are_equally_good_are_called_so_nineteen_times_of_twenty():
    generator = np.random.default_rng(5)
    wrong = 0
    for _ in range(400):
        tasks = {name: pair(*generator.integers(0, 2, size=(2, 50))) for name in ("a", "b")}
        wrong += any(task.verdict != "tied" for task in compare_tasks(tasks).tasks)
    assert wrong <= 400 * 0.05 + 9  # two standard deviations of that count


def test_a_difference_of_the_minimum_detectable_effect_is_found_four_times_of_five():
    generator = np.random.default_rng(6)
    effect = minimum_detectable_effect(1 / math.sqrt(100), df=99)
    found = sum(
        compare_tasks({"t": pair(np.zeros(100), generator.normal(effect, 1, size=100))}).tasks[0].verdict == "better"
        for _ in range(100)
    )
    assert 68 <= found <= 92  # three standard deviations around 80


def test_the_minimum_detectable_effect_is_the_textbooks_multiple_of_the_standard_error():
    # Bloom 1995 gives 2.80 for a two-sided test at 0.05 with 80 % power and many documents
    assert minimum_detectable_effect(1.0) == pytest.approx(2.80, abs=0.005)
    expected = scipy.stats.t.ppf(0.975, 9) + scipy.stats.t.ppf(0.8, 9)
    assert minimum_detectable_effect(0.5, df=9) == pytest.approx(0.5 * expected)
    assert minimum_detectable_effect(0.0) is None


@pytest.mark.parametrize(
    ("num_documents", "unpaired", "paired"), [(198, 0.138, 0.062), (1172, 0.057, 0.025), (1319, 0.053, 0.024)]
)
def test_a_suite_says_before_the_run_what_it_can_detect(num_documents, unpaired, paired):
    # 2.80 * sqrt(2 * 0.6 * 0.4 * (1 - correlation) / n), for GPQA-diamond, ARC-challenge and GSM8K
    assert plan_detectable_difference(num_documents, correlation=0.0) == pytest.approx(unpaired, abs=0.001)
    assert plan_detectable_difference(num_documents) == pytest.approx(paired, abs=0.001)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compare_tasks({}), EvaluationError, "No task"),
        (lambda: compare_tasks({"t": pair([1, 0], [0, 1])}, alpha=5), ConfigError, "alpha=5"),
        (lambda: compare_tasks({"t": pair([1, 0], [0, 1])}, lower_is_better={"s"}), ConfigError, "names s, but .* t"),
        (lambda: compare_tasks({"t": pair([1], [0])}), EvaluationError, "at least two"),
        (lambda: plan_detectable_difference(1), ConfigError, "num_documents=1"),
        (lambda: plan_detectable_difference(100, correlation=1.0), ConfigError, "correlation=1.0"),
        (lambda: plan_detectable_difference(100, accuracy=60), ConfigError, "accuracy=60"),
        (lambda: minimum_detectable_effect(1.0, power=1.0), ConfigError, "power=1.0"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_comparison_goes_to_json_with_its_rule():
    tasks = {"answers": pair([0, 1, 1], [1, 1, 0]), "bits": pair([3.0, 4, 5], [2.5, 4, 6], sizes=[10, 10, 20])}
    written = json.loads(json.dumps(compare_tasks(tasks).to_dict(), allow_nan=False))
    assert [task["task"] for task in written["tasks"]] == ["answers", "bits"]
    assert written["tasks"][0]["difference"]["num_documents"] == 3
    assert "tied" in written["rule"]
