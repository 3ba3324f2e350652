"""Licences that may stand together, those that may not, and the many of which nothing is known."""

import pytest

from hub_moe.cards.licences import check_licence, find_terms, summarise


def judge(model, source, *, is_dataset=False):
    return check_licence(model, "alice/base", source, is_dataset=is_dataset).verdict


@pytest.mark.parametrize(
    ("model", "base", "verdict"),
    [
        ("mit", "apache-2.0", "compatible"),
        ("llama3.1", "mit", "compatible"),
        ("llama3.1", "llama3.1", "compatible"),
        ("apache-2.0", "llama3.1", "conflict"),
        ("llama3.1", "llama3.2", "unknown"),
        ("mit", "gemma", "conflict"),
        ("mit", "deepseek", "conflict"),
        ("mit", "gpl-3.0", "conflict"),
        ("agpl-3.0", "gpl-3.0", "compatible"),
        ("gpl-2.0", "gpl-3.0", "unknown"),
        ("apache-2.0", "cc-by-nc-4.0", "conflict"),
        ("cc-by-nc-4.0", "cc-by-nc-4.0", "compatible"),
        ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "conflict"),
        ("cc-by-nc-nd-4.0", "cc-by-nc-nd-4.0", "conflict"),
        ("cc-by-sa-4.0", "cc-by-sa-3.0", "compatible"),
        ("mit", "bigscience-openrail-m", "conflict"),
        ("mit", "my-own-words", "unknown"),
        ("my-own-words", "mit", "unknown"),
        ("mit", None, "unknown"),
        (None, "mit", "unknown"),
        ("other", "other", "unknown"),
    ],
)
def test_a_fine_tune_beside_the_licence_of_its_base(model, base, verdict):
    assert judge(model, base) == verdict


@pytest.mark.parametrize(
    ("model", "data", "verdict"),
    [
        ("mit", "cc-by-4.0", "compatible"),
        ("mit", "cc-by-nc-4.0", "conflict"),
        ("mit", "cc-by-sa-4.0", "unknown"),
        ("cc-by-sa-4.0", "cc-by-sa-4.0", "compatible"),
        ("mit", "cc-by-nd-4.0", "unknown"),
        ("cc-by-nc-nd-4.0", "cc-by-nc-nd-4.0", "unknown"),
        ("mit", "llama3", "unknown"),
        ("mit", None, "unknown"),
    ],
)
def test_a_model_beside_the_licence_of_its_data(model, data, verdict):
    assert judge(model, data, is_dataset=True) == verdict


def test_what_is_unknown_never_passes():
    good = check_licence("mit", "a", "mit", is_dataset=False)
    unknown = check_licence("mit", "b", None, is_dataset=False)
    conflict = check_licence("mit", "c", "gpl-3.0", is_dataset=False)
    assert summarise([good]) == "compatible"
    assert summarise([good, unknown]) == "unknown"
    assert summarise([good, unknown, conflict]) == "conflict"
    assert summarise([]) == "unknown"


def test_spelling_does_not_matter_and_every_reason_is_said():
    assert find_terms(" Apache-2.0 ") == find_terms("apache-2.0")
    assert find_terms("nobody-knows") is None
    assert all(
        check_licence(m, "x", s, is_dataset=d).reason
        for m in ("mit", None)
        for s in ("gpl", None)
        for d in (True, False)
    )
