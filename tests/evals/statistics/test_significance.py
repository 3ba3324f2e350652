import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_moe.errors import EvaluationError
from hub_moe.evals.statistics import adjust_by_holm, exact_mcnemar, permutation_test

# Darwin's maize, crossed minus self-fertilised, in eighths of an inch: Fisher 1935, The Design of Experiments, ch. III
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
FEW = st.lists(st.integers(-20, 20), min_size=1, max_size=9)
MANY = st.lists(st.integers(1, 9), min_size=17, max_size=40)


@pytest.mark.parametrize(
    ("only_base", "only_candidate", "p_value"),
    [(121, 59, 0.000004), (70, 59, 0.378688), (80, 59, 0.089452), (30, 60, 0.00206), (10, 30, 0.002221), (10, 10, 1.0)],
)
def test_the_exact_mcnemar_test_gives_the_values_of_vassarstats(only_base, only_candidate, p_value):
    # VassarStats' online calculator, as quoted in statsmodels' test of contingency_tables.mcnemar
    assert exact_mcnemar(only_base, only_candidate) == pytest.approx(p_value, abs=5e-7)


@given(st.integers(0, 400), st.integers(0, 400))
def test_the_exact_mcnemar_test_is_scipys_binomial_test(only_base, only_candidate):
    expected = scipy.stats.binomtest(only_base, only_base + only_candidate).pvalue if only_base + only_candidate else 1
    assert exact_mcnemar(only_base, only_candidate) == pytest.approx(expected, rel=1e-9)
    assert exact_mcnemar(only_base, only_candidate) == exact_mcnemar(only_candidate, only_base)


def test_the_exact_mcnemar_test_takes_any_number_of_documents():
    assert exact_mcnemar(5_000, 5_000) == 1
    assert exact_mcnemar(4_900, 5_100) == pytest.approx(scipy.stats.binomtest(4_900, 10_000).pvalue)
    assert exact_mcnemar(0, 3_000) == 0  # 2**-2999 is below the smallest float


def test_the_permutation_test_of_darwins_maize_gives_fishers_value():
    # Fisher counts 863 of 32,768 signings on either side: 5.267 %
    result = permutation_test(MAIZE)
    assert (result.is_exact, result.num_signings, result.seed) == (True, 32_768, None)
    assert result.p_value == 2 * 863 / 32_768


def test_the_permutation_test_is_scipys():
    differences = np.random.default_rng(1).normal(0.4, 1, size=11)
    expected = scipy.stats.permutation_test(
        (differences, np.zeros(11)), lambda a, b: np.sum(a - b), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert permutation_test(differences).p_value == pytest.approx(expected, rel=1e-12)


def test_random_signings_come_close_to_all_of_them():
    differences = np.random.default_rng(2).normal(0.25, 1, size=60)
    result = permutation_test(differences)
    assert (result.is_exact, result.num_signings, result.seed) == (False, 9_999, 0)
    assert result.p_value == pytest.approx(scipy.stats.ttest_1samp(differences, 0).pvalue, rel=0.25)
    assert 0.01 < result.p_value < 0.5
    assert permutation_test(differences) == result
    assert permutation_test(differences, seed=1) != result


def test_random_signings_are_drawn_in_pieces_where_they_are_many():
    differences = np.random.default_rng(3).normal(0.05, 1, size=2_500)
    p_value = permutation_test(differences, num_resamples=1_000).p_value
    assert p_value == pytest.approx(scipy.stats.ttest_1samp(differences, 0).pvalue, abs=0.02)


def test_a_random_permutation_test_never_says_zero():
    assert permutation_test(np.ones(200)).p_value == 1 / 10_000


@given(FEW)
def test_right_or_wrong_answers_have_the_p_value_of_mcnemar(differences):
    signs = np.sign(differences)
    expected = exact_mcnemar(int((signs < 0).sum()), int((signs > 0).sum()))
    assert permutation_test(signs).p_value == pytest.approx(expected, rel=1e-12)


@given(FEW, st.randoms(use_true_random=False))
def test_a_p_value_depends_neither_on_the_order_nor_on_which_model_is_the_base(differences, random):
    p_value = permutation_test(differences).p_value
    assert permutation_test([-difference for difference in differences]).p_value == p_value
    random.shuffle(differences)
    assert permutation_test(differences).p_value == p_value
    assert permutation_test(differences, groups=range(len(differences))).p_value == p_value
    assert permutation_test([*differences, 0, 0]).p_value == p_value


@settings(max_examples=10, deadline=None)
@given(MANY, st.randoms(use_true_random=False))
def test_neither_does_one_of_random_signings(differences, random):
    result = permutation_test(differences)
    random.shuffle(differences)
    assert permutation_test([-difference for difference in differences]) == result


def test_the_documents_of_a_group_flip_together():
    # 3 groups that all gain: 2 of 8 signings are as extreme, whatever the number of documents in each
    assert permutation_test([1.0] * 30, groups=["a", "b", "c"] * 10).p_value == 2 / 8


def test_sums_equal_but_for_rounding_count_as_equal():
    assert permutation_test([0.1, 0.2, -0.3]).p_value == 1
    assert permutation_test([0.1] * 3 + [0.3]).p_value == 2 / 16


def test_models_that_never_differ_are_not_told_apart():
    assert permutation_test([0.0] * 100).p_value == 1
    assert exact_mcnemar(0, 0) == 1


def test_holms_correction_gives_the_values_of_r():
    # statsmodels' test of multipletests: from R's multtest
    p_values = [0.838541367553, 0.642193923795, 0.680845947633, 0.967833824309, 0.71626938238, 0.177096952723]
    p_values += [5.23656777208e-005, 0.0202732688798, 0.00028140506198, 0.0149877310796]
    expected = [1, 1, 1, 1, 1, 1, 5.23656777208e-004, 0.14191288215860001, 2.5326455578199999e-03, 0.11990184863680001]
    assert adjust_by_holm(p_values) == pytest.approx(expected)
    assert adjust_by_holm([0.01, 0.02, 0.02, 0.5]) == pytest.approx([0.04, 0.06, 0.06, 0.5])
    assert adjust_by_holm([0.03]) == pytest.approx([0.03])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.5))
def test_holms_correction_rejects_what_his_procedure_rejects(p_values, alpha):
    ascending = sorted(p_values)
    rejected = 0  # step down: stop at the first that is not below alpha / (tests left)
    while rejected < len(ascending) and ascending[rejected] * (len(ascending) - rejected) < alpha:
        rejected += 1
    adjusted = adjust_by_holm(p_values)
    assert np.count_nonzero(adjusted < alpha) == rejected
    assert (adjusted >= p_values).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_mcnemar(-1, 3), "negative"),
        (lambda: permutation_test([1.0, float("nan")]), "not finite"),
        (lambda: permutation_test([1.0, 2.0], groups=["a"]), "2 scores and 1 groups"),
        (lambda: adjust_by_holm([0.1, 1.5]), "between 0 and 1"),
        (lambda: adjust_by_holm([0.1, float("nan")]), "P-value number 1 is nan"),
        (lambda: adjust_by_holm([]), "P-values of shape"),
    ],
)
def test_numbers_that_cannot_be_tested_are_refused(call, message):
    with pytest.raises(EvaluationError, match=message):
        call()
