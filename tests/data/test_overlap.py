import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_moe.data import LoadedRows, measure_overlap
from hub_moe.errors import DatasetError

WORDS = [f"word{n}" for n in range(400)]


def text(start, length=30):
    return " ".join(WORDS[start : start + length])


def test_thirteen_words_in_a_row_are_a_hit_and_twelve_are_not():
    train = [text(0, 20), text(100, 20)]
    for shared, hits in ((13, (0,)), (12, ())):
        report = measure_overlap(train, [f"{text(300, 20)} {text(100, shared)} {text(340, 20)}"])
        assert report.eval_rows_hit == hits
    assert measure_overlap(train, [f"{text(300, 20)} {text(100, 13)}"]).train_rows_hit == (1,)


def test_case_punctuation_and_form_do_not_count():
    train = ["The quick brown fox, jumps over the lazy dog; then it sleeps -- until noon."]
    told = measure_overlap(train, ["the QUICK brown\nfox jumps over the lazy dog then it sleeps until noon"])

    assert told.share_hit == 1.0
    example = told.examples[0]
    assert (example.eval_row, example.train_row) == (0, 0)
    assert example.words == "the quick brown fox jumps over the lazy dog then it sleeps until"


def test_what_more_than_ten_training_rows_hold_is_a_set_phrase():
    instruction = text(0, 15)
    evaluation = [f"{instruction} {text(100, 20)}", f"{instruction} {text(200, 20)}"]
    for copies, hits, common in ((10, (0, 1), ()), (11, (), (0, 1))):
        train = [f"{instruction} own{n} " + " ".join(f"{n}x{i}" for i in range(20)) for n in range(copies)]
        report = measure_overlap(train, evaluation)
        assert (report.eval_rows_hit, report.eval_rows_common) == (hits, common)
    report = measure_overlap([*train, text(200, 20)], evaluation)
    assert (report.eval_rows_hit, report.eval_rows_common, report.train_rows_hit) == ((1,), (0,), (11,))


def test_one_training_row_that_repeats_itself_counts_once():
    assert measure_overlap([text(0, 13) + " " + text(0, 13)] * 1 + [text(0, 13)], [text(0, 13)]).eval_rows_hit == (0,)
    assert measure_overlap([" x ".join([text(0, 13)] * 40)], [text(0, 13)]).eval_rows_hit == (0,)


def test_short_texts_are_sought_whole():
    train = [f"before {text(0, 9)} after", text(50, 5), f"{text(60, 5)} after"]
    evaluation = [text(0, 9), text(50, 5), text(60, 5), text(0, 7), "", "?!"]
    report = measure_overlap(train, evaluation)

    assert report.eval_rows_hit == (0, 1)  # 5 or 7 words inside a longer text are no hit
    assert report.eval_rows_without_words == (4, 5)
    assert report.share_hit == 2 / 6


CASE = "原告与被告经人介绍相识于二零零五年登记结婚后因感情不和起诉离婚请求判决准予离婚"


def test_chinese_is_compared_by_characters():
    shared = CASE[:20]
    others = "今天天气很好我们一起去公园散步看花听鸟唱歌真是太开心了明天还想再去一次"
    assert measure_overlap([CASE], [f"{others}{shared}。{others}"]).examples[0].words == shared
    assert measure_overlap([CASE], [f"{others}{CASE[:19]}。{others}"]).eval_rows_hit == ()
    assert measure_overlap([CASE], [CASE[:13]]).eval_rows_hit == (0,)
    assert measure_overlap([CASE], [CASE[:9]]).eval_rows_hit == ()


def test_n_grams_do_not_run_from_one_text_into_the_next():
    rows = LoadedRows.from_list([{"prompt": text(0, 7), "completion": text(7, 7)}])
    assert measure_overlap(rows, [text(0, 14)]).eval_rows_hit == ()
    assert measure_overlap([text(0, 7), text(7, 7)], [text(0, 14)]).eval_rows_hit == ()
    assert measure_overlap([text(0, 14)], rows).eval_rows_hit == ()


def test_rows_of_any_format_are_compared_by_their_texts():
    chats = LoadedRows.from_list([{"messages": [{"role": "user", "content": text(0)}, {"role": "a", "content": "b"}]}])
    other = LoadedRows.from_list([{"n": 1, "query": {"body": [text(5)]}}, {"n": 2, "query": None}])
    report = measure_overlap(chats, other)
    assert (report.eval_rows_hit, report.eval_rows_without_words) == ((0,), (1,))


def test_a_stream_is_enough_for_training_rows():
    report = measure_overlap((text(n % 300) for n in range(20_000)), [text(250, 20)])
    assert report.train_rows == 20_000
    assert report.eval_rows_common == (0,)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), vocabulary=st.integers(2, 6), n=st.integers(8, 10))
def test_hits_are_those_of_a_plain_search(seed, vocabulary, n):
    rng = random.Random(seed)
    train, evaluation = ([rng.choices(WORDS[:vocabulary], k=rng.randrange(0, 40)) for _ in range(8)] for _ in range(2))

    def grams(words, length):
        return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}

    expected = []
    for number, words in enumerate(evaluation):
        length = min(n, len(words))
        found = any(grams(words, length) & grams(other, length) for other in train) if length >= 8 else words in train
        expected += [number] if words and found else []
    report = measure_overlap([" ".join(w) for w in train], [" ".join(w) for w in evaluation], n=n)
    assert report.eval_rows_hit == tuple(expected)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(DatasetError, match="n=7: shorter n-grams"):
        measure_overlap(["a"], ["a"], n=7)
    with pytest.raises(DatasetError, match="no evaluation rows"):
        measure_overlap(["a"], [])
