import pytest

from hub_moe.data import LoadedRows
from hub_moe.data.formats import BadRowError, find_layout, read_messages, read_text
from hub_moe.data.source import Provenance
from hub_moe.errors import DatasetError

ANSWERED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def rows_with(*columns, **options):
    return LoadedRows([], columns, Provenance("rows.jsonl", "memory"), **options)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (["id", "messages"], "chat (messages = messages), told by the columns"),
        (["conversations"], "chat (messages = conversations), told by the columns"),
        (["prompt", "messages"], "chat (messages = messages), told by the columns"),
        (["prompt", "completion"], "prompt-completion (prompt = prompt, completion = completion), told by the columns"),
        (["question", "answer"], "prompt-completion (prompt = question, completion = answer), told by the columns"),
        (
            ["instruction", "input", "output"],
            "prompt-completion (prompt = instruction+input, completion = output), told by the columns",
        ),
        (
            ["instruction", "output"],
            "prompt-completion (prompt = instruction, completion = output), told by the columns",
        ),
        (["text", "url"], "text (text = text), told by the columns"),
    ],
)
def test_the_format_is_told_by_the_columns(columns, told):
    assert find_layout(rows_with(*columns)).describe() == told


def test_columns_of_other_names_are_mapped():
    rows = rows_with("ask", "hint", "reply", column_map={"prompt": "ask+hint", "completion": "reply"})
    layout = find_layout(rows)

    assert layout.describe() == "prompt-completion (prompt = ask+hint, completion = reply)"
    assert read_messages({"ask": "why", "hint": "think", "reply": "so"}, layout) == [
        {"role": "user", "content": "why\n\nthink"},
        {"role": "assistant", "content": "so"},
    ]
    assert read_messages({"ask": "why", "hint": "", "reply": "so"}, layout)[0]["content"] == "why"
    assert read_messages({"ask": "why", "hint": None, "reply": "so"}, layout)[0]["content"] == "why"


def test_a_system_prompt_goes_first_where_there_is_one():
    rows = rows_with("s", "p", "c", column_map={"system": "s", "prompt": "p", "completion": "c"})
    layout = find_layout(rows)
    assert [m["role"] for m in read_messages({"s": "be kind", "p": "a", "c": "b"}, layout)] == [
        "system",
        "user",
        "assistant",
    ]
    assert [m["role"] for m in read_messages({"s": None, "p": "a", "c": "b"}, layout)] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("rows", "format", "sentence"),
    [
        (
            rows_with("body", "title"),
            "auto",
            r"rows\.jsonl cannot be read as chat, .* its columns are body, title; say",
        ),
        (rows_with("messages"), "text", r"cannot be read as text: its columns are messages"),
        (rows_with("text"), "txet", r"There is no format 'txet'; use auto, chat, prompt-completion, text\."),
        (rows_with("ask", column_map={"text": "aks"}), "auto", r"has no column 'aks'; its columns are ask\."),
        (
            rows_with("ask", column_map={"promt": "ask"}),
            "auto",
            r"columns names promt, but a format needs its own parts",
        ),
        (rows_with("ask", column_map={"text": "ask"}), "chat", r"columns names text, but a format needs its own parts"),
    ],
)
def test_what_is_not_there_is_one_sentence_that_lists_what_is(rows, format, sentence):
    with pytest.raises(DatasetError, match=sentence):
        find_layout(rows, format)


def test_messages_of_either_spelling_are_the_same():
    told = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    layout = find_layout(rows_with("conversations"))
    assert read_messages({"conversations": told}, layout) == ANSWERED
    assert read_messages({"conversations": ANSWERED}, layout) == ANSWERED
    padded = [{**m, "role": None, "content": None} for m in told]  # as Arrow fills in absent keys
    assert read_messages({"conversations": padded}, layout) == ANSWERED


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "messages is missing, not a list of messages"),
        ("hello", "messages is text, not a list of messages"),
        ([], "messages is an empty list, not a list of messages"),
        (["hello"], "message 0 is text, not a role with content"),
        (
            [{"content": "a"}],
            "message 0 has the role None, not one of user, human, assistant, gpt, system, developer, tool",
        ),
        ([{"role": "usr", "content": "a"}], "message 0 has the role 'usr', not one of"),
        ([ANSWERED[0]], "no message is the assistant's, so there is no answer to learn"),
        ([*ANSWERED, ANSWERED[0]], "the last message is the user's, so its answer is missing"),
        ([ANSWERED[0], {"role": "assistant", "content": " \n"}], "message 1 (assistant) is empty"),
        ([ANSWERED[0], {"role": "assistant", "content": None}], "message 1 (assistant) is missing"),
        ([ANSWERED[0], {"role": "assistant"}], "message 1 (assistant) is missing"),
        ([{"role": "user", "content": [{"text": "a"}]}, ANSWERED[1]], "message 0 (user) is a list, not text"),
        ([ANSWERED[0], {"role": "assistant", "content": "x", "tool_calls": [{}]}], "message 1 calls tools"),
        ([{"role": ["user"], "content": "a"}], "message 0 has the role ['user']"),
    ],
)
def test_a_chat_that_does_not_fit_has_a_reason(messages, reason):
    with pytest.raises(BadRowError) as caught:
        read_messages({"messages": messages}, find_layout(rows_with("messages")))
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a"}, "answer is missing"),
        ({"question": "a", "answer": None}, "answer is missing"),
        ({"question": "a", "answer": "  "}, "answer is empty"),
        ({"question": "a", "answer": 42}, "answer is a number, not text"),
        ({"question": ["a"], "answer": "b"}, "question is a list, not text"),
        ({"question": {}, "answer": "b"}, "question is a mapping, not text"),
        ({"question": "", "answer": "b"}, "question is empty"),
    ],
)
def test_a_pair_that_does_not_fit_has_a_reason(row, reason):
    with pytest.raises(BadRowError) as caught:
        read_messages(row, find_layout(rows_with("question", "answer")))
    assert str(caught.value) == reason


@pytest.mark.parametrize(("row", "reason"), [({"text": 1.5}, "text is a number, not text"), ({}, "text is missing")])
def test_a_text_that_does_not_fit_has_a_reason(row, reason):
    with pytest.raises(BadRowError) as caught:
        read_text(row, find_layout(rows_with("text")))
    assert str(caught.value) == reason
