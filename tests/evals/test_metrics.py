import math
import subprocess
import sys

import evaluate
import pytest
import scipy.stats

from hub_moe.errors import ConfigError, EvaluationError
from hub_moe.evals.metrics import BitsPerByte, ExactMcnemar, PairedAccuracyDifference, Perplexity
from hub_moe.evals.statistics import estimate_bits_per_byte, estimate_mean, estimate_perplexity

TEXTS = ["one two", "drei  vier fünf", "12", "quatre cinq six sept"]
LOG_LIKELIHOODS = [-8.0, -14.5, -3.0, -21.0]


@pytest.fixture(autouse=True)
def _metrics_write_below_the_tests_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)


def test_bits_per_byte_and_perplexity_are_combined_on_the_same_texts():
    combined = evaluate.combine([BitsPerByte(), Perplexity("word"), Perplexity("byte")])
    results = combined.compute(predictions=LOG_LIKELIHOODS, references=TEXTS)
    bits = estimate_bits_per_byte(LOG_LIKELIHOODS, [7, 16, 2, 20])
    words = estimate_perplexity(LOG_LIKELIHOODS, [2, 3, 1, 4])
    assert results["bits_per_byte"] == pytest.approx(bits.value)
    assert results["bits_per_byte_stderr"] == pytest.approx(bits.standard_error)
    assert (results["word_perplexity_low"], results["word_perplexity_high"]) == pytest.approx((words.low, words.high))
    assert results["byte_perplexity"] == pytest.approx(2**bits.value)


def test_texts_and_sizes_in_bytes_mean_the_same():
    texts = BitsPerByte().compute(predictions=LOG_LIKELIHOODS, references=TEXTS)
    assert texts == BitsPerByte().compute(predictions=LOG_LIKELIHOODS, references=[7, 16, 2, 20])
    digits = BitsPerByte().compute(predictions=[-1.0, -2.0], references=["12", "345"])
    assert digits["bits_per_byte"] == pytest.approx(3 / 5 / math.log(2))


def test_perplexity_per_token_takes_counts():
    results = Perplexity().compute(predictions=[-2.0, -6.0], references=[2, 2])
    assert results["token_perplexity"] == pytest.approx(math.exp(2))


def test_documents_can_be_added_one_by_one_or_in_batches():
    metric = BitsPerByte()
    metric.add(prediction=LOG_LIKELIHOODS[0], reference=TEXTS[0])
    metric.add_batch(predictions=LOG_LIKELIHOODS[1:], references=TEXTS[1:])
    assert metric.compute() == BitsPerByte().compute(predictions=LOG_LIKELIHOODS, references=TEXTS)


@pytest.mark.parametrize("label", [int, str, lambda number: "ABCD"[number]])
def test_two_models_are_compared_on_the_same_documents(label):
    references = [0, 1, 2, 3] * 10
    first = [0, 1, 0, 0] * 10
    second = [0, 1, 2, 0] * 8 + [1, 1, 2, 0] * 2
    answers = {"predictions1": first, "predictions2": second, "references": references}
    answers = {name: [label(each) for each in column] for name, column in answers.items()}
    results = evaluate.combine([PairedAccuracyDifference(), ExactMcnemar()]).compute(**answers)
    interval = scipy.stats.ttest_rel([1, 1, 1, 0] * 8 + [0, 1, 1, 0] * 2, [1, 1, 0, 0] * 10).confidence_interval(0.95)
    assert results["accuracy_difference"] == pytest.approx(8 / 40)
    assert results["accuracy_difference_low"] == pytest.approx(interval.low)
    assert results["accuracy_difference_high"] == pytest.approx(interval.high)
    assert (results["only_first_right"], results["only_second_right"]) == (2, 10)
    assert results["mcnemar_p_value"] == pytest.approx(scipy.stats.binomtest(2, 12).pvalue)


def test_the_paired_difference_takes_groups():
    answers = {"predictions1": [0, 0, 1, 1], "predictions2": [1, 1, 1, 0], "references": [1, 1, 1, 1]}
    results = PairedAccuracyDifference().compute(**answers, groups=["a", "a", "b", "b"])
    expected = estimate_mean([1, 1, 0, -1], groups=["a", "a", "b", "b"])
    assert results["accuracy_difference_stderr"] == pytest.approx(expected.standard_error)


@pytest.mark.parametrize(
    ("metric", "columns", "message"),
    [
        (BitsPerByte, {"predictions": [-1.0, math.nan], "references": ["a", "b"]}, "not finite"),
        (BitsPerByte, {"predictions": [-1.0, -2.0], "references": ["a", ""]}, "no positive size"),
        (BitsPerByte, {"predictions": [-1.0, -2.0], "references": ["a", None]}, "1 references are None"),
        (ExactMcnemar, {"predictions1": [1, None], "predictions2": [1, 1], "references": [1, None]}, "2 labels"),
        (
            PairedAccuracyDifference,
            {"predictions1": [1.0, math.nan], "predictions2": [1, 1], "references": [1, 2]},
            "1 labels are None or NaN",
        ),
    ],
)
def test_missing_answers_are_refused(metric, columns, message):
    with pytest.raises(EvaluationError, match=message):
        metric().compute(**columns)


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="Mismatch in the number"):
        BitsPerByte().compute(predictions=LOG_LIKELIHOODS, references=TEXTS[:2])


def test_an_unknown_unit_is_refused():
    with pytest.raises(ConfigError, match="'sentence' is unknown; choose word or byte"):
        Perplexity("sentence")


def test_statistics_import_neither_torch_nor_evaluate_nor_scipy():
    code = "import sys, hub_moe.evals, hub_moe.evals.statistics\n"
    code += "print({'torch', 'evaluate', 'scipy', 'datasets', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_an_unknown_name_of_evals_is_an_attribute_error():
    import hub_moe.evals

    assert all(getattr(hub_moe.evals, name) for name in hub_moe.evals.__all__)
    with pytest.raises(AttributeError, match="compare_task'"):
        hub_moe.evals.compare_task  # noqa: B018
