import json
import random

import numpy as np
import pytest
import torch

from hub_moe.data import DataSource, LoadedRows, check_tokenizer, load_rows, prepare
from hub_moe.errors import DatasetError

from ..anatomy.families import tiny_config

PAIRS = [{"question": f"what is {n}", "answer": f"it is {n}"} for n in range(60)]


def in_memory(rows):
    return LoadedRows.from_list(rows, name="rows.jsonl")


def texts_of(rows, tokenizer):
    """The documents in `rows`, decoded."""
    documents = []
    for row in rows:
        starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), len(row["input_ids"])]
        documents += [tokenizer.decode(row["input_ids"][a:b]) for a, b in zip(starts, starts[1:], strict=False)]
    return documents


def test_every_row_is_trained_on_once_with_labels_on_its_answer_only(chat_tokenizer):
    prepared = prepare(in_memory(PAIRS), chat_tokenizer, max_length=200)
    labels = [chat_tokenizer.decode(row["labels"][row["labels"] != -100]) for row in prepared.train]

    assert sorted(texts_of(prepared.train, chat_tokenizer)) == sorted(
        f"<eos>User: what is {n}\n\nAssistant: it is {n}<eos>" for n in range(60)
    )
    answers = [answer for label in labels for answer in label.split("<eos>") if answer]
    assert sorted(answers) == sorted(f" it is {n}" for n in range(60))
    assert all(len(row["input_ids"]) <= 200 for row in prepared.train)
    report = prepared.report
    assert report.train.tokens == sum(len(row["input_ids"]) for row in prepared.train)
    assert report.train.trained_tokens == sum(int((row["labels"] != -100).sum()) for row in prepared.train)
    assert report.train.fill == report.train.tokens / (200 * len(prepared.train)) > 0.8
    assert sum(count for _, count in report.length_histogram) == 60


def test_the_first_token_of_each_document_has_no_label(chat_tokenizer):
    for packing in (True, False):
        prepared = prepare(in_memory([{"text": "abc " * n} for n in range(1, 9)]), chat_tokenizer, max_length=24)
        for row in prepared.train:
            assert (row["labels"][row["position_ids"] == 0] == -100).all(), packing
            others = row["position_ids"] > 0
            assert torch.equal(row["labels"][others], row["input_ids"][others])


def test_texts_are_cut_and_no_token_is_lost(chat_tokenizer):
    texts = [{"text": f"{n} " * 40} for n in range(5)]
    packed, single = (
        prepare(in_memory(texts), chat_tokenizer, max_length=32, packing=packing) for packing in (True, False)
    )
    lengths = [len(row["input_ids"]) for row in packed.train]
    assert set(lengths[:-1]) == {32}
    assert sum(lengths) == sum(len(row["input_ids"]) for row in single.train)
    assert "".join(texts_of(single.train, chat_tokenizer)).count("<eos>") == 10
    assert max(len(row["input_ids"]) for row in single.train) == 32


def test_duplicates_up_to_white_space_are_left_out_and_counted(chat_tokenizer):
    rows = [*PAIRS[:3], {"question": " what  is 1\n", "answer": "it is 1"}, PAIRS[2], {**PAIRS[0], "answer": "other"}]
    report = prepare(in_memory(rows), chat_tokenizer, max_length=64).report
    assert report.duplicate_rows == (3, 4)
    assert report.train.documents == 4


@pytest.mark.parametrize("packing", [True, False])
def test_the_split_and_the_order_do_not_depend_on_the_order_of_the_file(chat_tokenizer, packing):
    shuffled = random.Random(1).sample(PAIRS, len(PAIRS))
    one, other = (
        prepare(in_memory(rows), chat_tokenizer, max_length=120, packing=packing, held_out=0.3, seed=5)
        for rows in (PAIRS, shuffled)
    )
    for side in ("train", "held_out"):
        a, b = ([row["input_ids"].tolist() for row in getattr(prepared, side)] for prepared in (one, other))
        assert a == b
        assert a
    assert 5 < one.report.held_out.documents < 35
    reseeded = prepare(in_memory(PAIRS), chat_tokenizer, max_length=120, held_out=0.3, seed=6)
    held = [set(texts_of(prepared.held_out, chat_tokenizer)) for prepared in (one, reseeded)]
    assert held[0] != held[1]


def test_a_row_keeps_its_side_when_others_come_or_go(chat_tokenizer):
    few, many = (prepare(in_memory(PAIRS[:n]), chat_tokenizer, max_length=64, held_out=0.3) for n in (30, 60))
    assert set(texts_of(few.held_out, chat_tokenizer)) <= set(texts_of(many.held_out, chat_tokenizer))
    assert set(texts_of(few.train, chat_tokenizer)) <= set(texts_of(many.train, chat_tokenizer))


def test_rows_with_the_same_prompt_are_on_one_side(chat_tokenizer):
    rows = [{"question": f"what is {n // 4}", "answer": f"it is {n}"} for n in range(80)]
    prepared = prepare(in_memory(rows), chat_tokenizer, max_length=64, held_out=0.4)
    prompts = [
        {text.split("Assistant")[0] for text in texts_of(side, chat_tokenizer)}
        for side in (prepared.train, prepared.held_out)
    ]
    assert prompts[0]
    assert prompts[1]
    assert not prompts[0] & prompts[1]


def test_one_long_text_is_held_out_in_sections(chat_tokenizer):
    text = "".join(f"line {n} of the play\n" for n in range(2000))
    prepared = prepare(in_memory([{"text": text}]), chat_tokenizer, max_length=64, held_out=0.2)
    sections = texts_of(prepared.train, chat_tokenizer), texts_of(prepared.held_out, chat_tokenizer)
    lines = [set("".join(side).replace("<eos>", "").splitlines()) for side in sections]

    assert sum(len(side) for side in lines) >= 2000
    assert all(prepared.report.to_dict()[side]["documents"] > 1 for side in ("train", "held_out"))
    assert any("Long texts are cut into sections" in note for note in prepared.report.notes)
    whole = prepare(in_memory([{"text": text}]), chat_tokenizer, max_length=64)
    assert whole.report.train.documents == 1


BAD = [
    PAIRS[0],
    {"question": "a", "answer": None},
    {"question": "a", "answer": " "},
    {"question": "a", "answer": 3},
    {"question": "a", "answer": "b " * 80},
    {"question": "a " * 80, "answer": "b"},
    PAIRS[1],
]


def test_bad_rows_stop_and_are_named(chat_tokenizer):
    with pytest.raises(DatasetError) as caught:
        prepare(in_memory(BAD), chat_tokenizer, max_length=64)
    sentence = str(caught.value)
    assert sentence.startswith(
        "5 of 7 rows do not fit, more than allow_bad_rows = 0 permits: row 1 (answer is missing), "
    )
    assert "row 2 (answer is empty), row 3 (answer is a number, not text)" in sentence
    assert len(sentence.splitlines()) == 1


def test_an_allowed_share_of_bad_rows_is_left_out_and_listed(chat_tokenizer, tmp_path):
    prepared = prepare(in_memory(BAD), chat_tokenizer, max_length=64, allow_bad_rows=0.8)
    reasons = {bad.row: bad.reason for bad in prepared.report.bad_rows}

    assert sorted(reasons) == [1, 2, 3, 4, 5]
    assert reasons[4].endswith("tokens, more than max_length = 64")
    assert "more than max_length = 64, which its prompt alone reaches" in reasons[5]
    assert prepared.report.train.documents == 2
    saved = json.loads(json.dumps(prepared.report.to_dict()))
    assert {bad["row"]: bad["reason"] for bad in saved["bad_rows"]} == reasons
    with pytest.raises(DatasetError, match="more than allow_bad_rows = 0.5 permits"):
        prepare(in_memory(BAD), chat_tokenizer, max_length=64, allow_bad_rows=0.5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"held_out": 1.0}, "held_out=1.0 is a share"),
        ({"held_out": -0.1}, "held_out=-0.1 is a share"),
        ({"max_length": 1}, "max_length=1 leaves nothing to predict"),
        (
            {"held_out": 1e-9},
            r"No row of rows\.jsonl is left for held_out: of 60 rows 0 do not fit and 0 are duplicates",
        ),
        (
            {"max_length": 8, "allow_bad_rows": 1.0},
            r"No row of rows\.jsonl is left for train: of 60 rows 60 do not fit",
        ),
    ],
)
def test_settings_that_leave_nothing_are_refused(chat_tokenizer, options, sentence):
    with pytest.raises(DatasetError, match=sentence):
        prepare(in_memory(PAIRS), chat_tokenizer, **{"max_length": 64, **options})


def test_no_rows_are_refused():
    with pytest.raises(DatasetError, match="rows in memory holds no rows"):
        LoadedRows.from_list([])


@pytest.fixture
def file(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*PAIRS, *BAD]))
    datasets.disable_progress_bars()
    yield str(path)
    datasets.enable_progress_bars()


def test_rows_on_disk_streamed_and_in_memory_are_prepared_alike(chat_tokenizer, file):
    ways = [load_rows(DataSource(file)), load_rows(DataSource(file, streaming=True)), in_memory([*PAIRS, *BAD])]
    done = [prepare(rows, chat_tokenizer, max_length=64, held_out=0.2, allow_bad_rows=0.5) for rows in ways]
    first = done[0]
    for other in done[1:]:
        assert np.array_equal(first.train.store.input_ids, other.train.store.input_ids)
        assert (first.train.rows, first.held_out.rows) == (other.train.rows, other.held_out.rows)
        assert first.report.bad_rows == other.report.bad_rows
        assert first.report.train == other.report.train


def test_tokens_are_kept_until_the_tokenizer_or_its_template_changes(bare_tokenizer, file):
    def prepared(template):
        bare_tokenizer.chat_template = template
        done = prepare(load_rows(DataSource(file)), bare_tokenizer, max_length=64, allow_bad_rows=0.5)
        return texts_of(done.train, bare_tokenizer)

    template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    first = prepared(template)
    assert prepared(template.replace("assistant ", "assistant ")) == first
    assert any("assistant it is" in text for text in first)
    changed = prepared(template.replace("m['role'] + ' '", "m['role'] + ': '").replace("'assistant '", "'assistant: '"))
    assert any("assistant: it is" in text for text in changed)


def test_padding_is_on_the_right_masked_and_without_labels(chat_tokenizer):
    prepared = prepare(
        in_memory(PAIRS[:1] + [{"question": "why", "answer": "so"}]), chat_tokenizer, max_length=64, packing=False
    )
    batch = prepared.collator()([prepared.train[0], prepared.train[1]])
    lengths = [len(row["input_ids"]) for row in prepared.train]

    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert lengths[0] != lengths[1]
    for row, length in enumerate(lengths):
        assert (batch["attention_mask"][row, :length] == 1).all()
        assert (batch["labels"][row, length:] == -100).all()
        assert (batch["input_ids"][row, length:] == chat_tokenizer.pad_token_id).all()


def test_packed_rows_need_no_pad_token_and_others_say_so(bare_tokenizer):
    bare_tokenizer.pad_token = None
    rows = in_memory([{"text": "abc"}, {"text": "defgh"}])
    prepare(rows, bare_tokenizer, max_length=64).collator()
    with pytest.raises(DatasetError, match="has no pad_token, and rows that are not packed are padded"):
        prepare(rows, bare_tokenizer, max_length=64, packing=False).collator()


def test_a_tokenizer_that_is_not_the_models_is_refused(bare_tokenizer):
    config = tiny_config("qwen3_moe")
    check_tokenizer(bare_tokenizer, config)
    with pytest.raises(DatasetError, match=r"ids up to 12[0-9], and the model \(qwen3_moe\) embeds 64 tokens"):
        check_tokenizer(bare_tokenizer, tiny_config("qwen3_moe", vocab_size=64))
    bare_tokenizer.pad_token = None
    with pytest.raises(DatasetError, match="The tokenizer has no pad_token to pad texts with"):
        check_tokenizer(bare_tokenizer, config)
    bare_tokenizer.eos_token = None
    with pytest.raises(DatasetError, match="The tokenizer has no eos_token to end texts with"):
        check_tokenizer(bare_tokenizer, config)
    with pytest.raises(DatasetError, match="has no eos_token, which ends documents"):
        prepare(in_memory([{"text": "a"}]), bare_tokenizer, max_length=64)
