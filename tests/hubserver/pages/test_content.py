"""Rows, tensors and diffs as pages show them, from honest files and broken ones."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_moe.hubserver.pages.diffs import parse_hunks
from hub_moe.hubserver.pages.preview import can_preview, read_preview
from hub_moe.hubserver.pages.rendering import format_count, format_day, format_size
from hub_moe.hubserver.pages.tensors import parse_header


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("a.csv", b'x,y\n1,"two, three"\n'),
        ("a.tsv", b"x\ty\n1\ttwo, three\n"),
        ("a.jsonl", b'{"x": 1, "y": "two, three"}\n\n'),
        ("a.json", b'[{"x": 1, "y": "two, three"}]'),
        ("b.json", b'{"x": [1], "y": ["two, three"]}'),
        ("c.json", b'{"version": 2, "data": [{"x": 1, "y": "two, three"}]}'),
        ("d.CSV", b'\xef\xbb\xbfx,y\r\n1,"two, three"\r\n'),
    ],
)
def test_rows_are_read_from_every_kind_of_file(path, content):
    preview = read_preview(path, content, is_whole=True)
    assert (preview.columns, preview.rows) == (["x", "y"], [["1", "two, three"]])


@pytest.mark.parametrize(("path", "row"), [("a.csv", "1,2\n"), ("a.jsonl", '{"x": 1, "y": 2}\n')])
def test_a_row_cut_in_two_at_the_end_of_a_long_file_is_left_out(path, row):
    start = "x,y\n" if path == "a.csv" else ""
    assert len(read_preview(path, f"{start}{row}{row}{row[:2]}".encode(), is_whole=False).rows) == 2
    assert len(read_preview("a.json", b'[{"x": 1}, {"x": 2}, {"x"', is_whole=False).rows) == 2


def test_rows_are_bounded_in_number_width_and_length():
    wide = {f"column {number}": "x" * 1000 for number in range(50)}
    preview = read_preview("a.jsonl", "\n".join([json.dumps(wide)] * 100).encode(), is_whole=True)
    assert (len(preview.rows), len(preview.columns), preview.more_columns) == (20, 20, 30)
    assert max(len(cell) for row in preview.rows for cell in row) <= 301


def test_rows_with_different_keys_share_the_columns():
    preview = read_preview("a.jsonl", b'{"x": 1}\n{"y": null}\n[1]\n', is_whole=True)
    assert preview.columns == ["x", "y", "value"]
    assert preview.rows == [["1", "", ""], ["", "null", ""], ["", "", "[1]"]]


@pytest.mark.parametrize("content", [b"", b"[", b"{", b"\0\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b'"'])
def test_a_file_that_is_not_what_its_name_says_has_no_rows(content):
    for path in ("a.json", "a.jsonl"):
        assert read_preview(path, content, is_whole=True) is None or content == b"\0\xff"


@given(st.binary() | st.text().map(str.encode), st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.json"]), st.booleans())
def test_any_bytes_are_rows_or_none(content, path, is_whole):
    read_preview(path, content, is_whole=is_whole)


def test_settings_are_not_rows():
    assert not can_preview("config.json")
    assert can_preview("data/train.jsonl")
    assert not can_preview("data/train.parquet")


def test_the_tensors_of_a_header_come_in_the_order_of_their_bytes():
    header = {"__metadata__": {"format": "pt"}}
    header |= {"b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [4, 28]}}
    header |= {"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}
    tensors, notes = parse_header(json.dumps(header).encode())
    assert [(one.name, one.shape, one.count) for one in tensors] == [("a", (), 1), ("b", (2, 3), 6)]
    assert notes == {"format": "pt"}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"null",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
        json.dumps({name: {"dtype": "F", "shape": [], "data_offsets": [name or 0]} for name in ("", "a")}).encode(),
        b'{"a": {"shape": [1], "data_offsets": [0]}}',
        b'{"__metadata__": [1], "a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b"{" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [' + b"1," * 1000 + b'1], "data_offsets": [0]}}',
    ],
)
def test_a_malformed_header_has_no_tensors(header):
    assert parse_header(header) is None


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_json_is_a_header_or_none(value):
    parse_header(json.dumps({"a": value, "__metadata__": value}).encode())


def test_the_lines_of_a_diff_have_the_numbers_of_both_sides():
    diff = "diff --git a/x b/x\nindex 1..2\n--- a/x\n+++ b/x\n@@ -3,3 +3,4 @@\n same\n-old\n+new\n+--- more\n end\n"
    lines = parse_hunks(diff + "@@ -90 +91 @@\n-@@ -1 +1 @@\n+x\n\\ No newline at end of file\n")
    assert [(one.kind, one.old, one.new, one.text) for one in lines] == [
        ("same", 3, 3, "same"),
        ("removed", 4, None, "old"),
        ("added", None, 4, "new"),
        ("added", None, 5, "--- more"),
        ("same", 5, 6, "end"),
        ("gap", None, None, ""),
        ("removed", 90, None, "@@ -1 +1 @@"),
        ("added", None, 91, "x"),
    ]
    assert parse_hunks("diff --git a/x b/x\nBinary files a/x and b/x differ\n") == []


def test_sizes_counts_and_dates_read_well():
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 99_940: "99.9 kB", 999_940: "1000 kB", 1_260_000_000: "1.3 GB"}
    assert {size: format_size(size) for size in sizes} == sizes
    counts = {7: "7", 1000: "1k", 52_100_000: "52.1M", 671_026_419_200: "671B", 1_040_000_000_000: "1.04T"}
    assert {count: format_count(count) for count in counts} == counts
    assert format_day("2026-09-02T17:25:10.000Z") == format_day(1_788_369_910) == "2 Sep 2026"
    assert format_day(1 << 70) == "1 Jan 1970"
