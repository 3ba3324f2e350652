"""Which numbers of people's prose are results, and when a record has them."""

import pytest

from hub_moe.cards.claims import find_claims


def claimed(text, names=()):
    return [claim.text for claim in find_claims(text, names)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It reaches an accuracy of 71.3 on our tests.", ["71.3"]),
        ("GSM8K rises\nfrom 41.2% to 45.0 %.", ["41.2%", "45.0 %"]),
        ("On my_task it gets 0.75.", ["0.75"]),
        ("| model | MMLU |\n| --- | --- |\n| ours | 71.2 |\n", ["71.2"]),
        ("## HellaSwag\n\n| ours | 0.71 |\n| base | 0.70 |\n", ["0.71", "0.70"]),
        ("**Perplexity**: 12.34", ["12.34"]),
        ("| lr | MMLU |\n| --- | --- |\n| 0.01 | **71.2** |\n| 0.02 | 0.5 ± 0.1 |\n", ["71.2", "0.5", "0.1"]),
        ("pass@1 of 31%", ["31%"]),
        ("The `acc` is 0.5 here.", ["0.5"]),
        ("- accuracy 0.8\n- we slept 7.5 nights\n", ["0.8"]),
        ("Accuracy falls by -1.25 %.", ["-1.25 %"]),
    ],
)
def test_numbers_beside_a_metric_or_task_are_claims(text, found):
    assert claimed(text, ["my_task"]) == found


@pytest.mark.parametrize(
    "text",
    [
        "A model of 671.0 B parameters with 37.5 billion active.",
        "GSM8K has 1319 questions; we asked 5-shot.",
        "MMLU was run at temperature 0.7 and top_p = 0.95.",
        "Accuracy was measured with transformers 5.17.0 and torch 2.10.",
        "Scores need 1.5 GB of memory and 2.5 hours.",
        "Accuracy is described in arXiv:2412.19437, section 5.2.",
        "The card of [another](https://example.org/model) says MMLU 81.3.",
        "We use a learning rate of 0.001 for the MMLU set.",
        "```\naccuracy 0.99\n```",
        "`accuracy: 0.99` is what lm_eval prints.",
        "<!-- accuracy 0.99 -->",
        "![accuracy 0.99](a.png)",
        "It was trained for 3.5 days. The accuracy is in the table.",
        "Released 2026-11-24, version 1.2.",
        "| MMLU of Qwen2.5 | version 2.5 |\n| --- | --- |\n| Claude-3.5 | 3.1 |\n",
        "| model | learning rate | MMLU |\n| --- | --- | --- |\n| ours | 0.01 | - |\n",
    ],
)
def test_numbers_that_are_no_results_are_left_alone(text):
    assert claimed(text) == []


@pytest.mark.parametrize(
    ("text", "value", "is_backed"),
    [
        ("accuracy 0.71", 0.7132, True),
        ("accuracy 71.3", 0.7132, True),
        ("accuracy 71.32 %", 0.7132, True),
        ("accuracy 71 %", 0.7132, True),
        ("accuracy 0.72", 0.7132, False),
        ("accuracy 71.4 %", 0.7132, False),
        ("accuracy 0.71 %", 0.7132, False),
        ("perplexity 1,234.5", 1234.49, True),
        ("accuracy changes by -0.02", -0.0204, True),
    ],
)
def test_a_claim_is_backed_at_the_precision_it_is_written_in(text, value, is_backed):
    (claim,) = find_claims(text)
    assert claim.is_backed_by([0.001, value]) == is_backed


def test_a_claim_says_where_it_stands():
    text = "# Title\n\nWords.\n\nThe accuracy is 0.25."
    (claim,) = find_claims(text)
    assert text[claim.position :].startswith("0.25")
