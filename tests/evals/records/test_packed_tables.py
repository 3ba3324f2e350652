"""Strangers' tables of answers: files of a few kilobytes that would unpack to more than a machine has."""

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_moe.errors import EvaluationError
from hub_moe.evals.records import Sample
from hub_moe.evals.records.samples import _SCHEMA, _to_row, read_samples, write_samples

SAMPLE = Sample("e", "t", 0, "0" * 64, ("1" * 64,), texts=("yes",), scores={"acc": 1.0}, sizes={"bytes": 2.0})
NESTED = {
    "entry": lambda text: text,
    "group": lambda text: text,
    "prompt_sha256s": lambda text: [text],
    "texts": lambda text: [text],
    "scores": lambda text: [(text, 1.0)],
    "sizes": lambda text: [(text, 1.0)],
}


def write_bomb(path, column, *, num_rows=300, num_letters=10_000_000):
    """A table whose rows all hold one long text, which parquet keeps once."""
    row = _to_row(SAMPLE) | {column: NESTED[column]("x" * num_letters)}
    one = pa.Table.from_pylist([row], schema=_SCHEMA)
    repeated = pa.table([pa.chunked_array(column.chunks * num_rows) for column in one.columns], schema=_SCHEMA)
    pq.write_table(repeated, path, compression="zstd", dictionary_pagesize_limit=2**30)


@pytest.mark.parametrize("column", NESTED)
def test_one_long_text_in_every_row_is_refused_before_it_is_unpacked(tmp_path, column):
    path = tmp_path / "bomb.parquet"
    write_bomb(path, column)
    assert path.stat().st_size < 200_000
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from hub_moe.errors import EvaluationError\n"
        "from hub_moe.evals.records.samples import read_samples\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_samples(Path(sys.argv[1]))\n"
        "except EvaluationError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    reason, used_kb = done.stdout.splitlines()
    assert "unpacks to more than 2,147,483,648 bytes" in reason
    assert int(used_kb) < 200_000


def test_texts_that_are_not_packed_are_refused_by_what_the_file_says(tmp_path, monkeypatch):
    path = tmp_path / "plain.parquet"
    rows = [_to_row(SAMPLE) | {"texts": [f"{index} {'x' * 10_000}"]} for index in range(200)]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path, compression="zstd", use_dictionary=False)
    assert len(read_samples(path)) == 200
    monkeypatch.setattr("hub_moe.evals.records.samples._MAX_BYTES", 1_000_000)
    with pytest.raises(EvaluationError, match="unpacks to more than 1,000,000 bytes"):
        read_samples(path)


@pytest.mark.parametrize("num_rows", [0, 1, 2500])
def test_every_answer_comes_back_whether_texts_repeat_or_not(tmp_path, num_rows):
    samples = [
        Sample(
            entry="e",
            task="t",
            index=index,
            document_sha256=f"{index:064x}",
            prompt_sha256s=tuple(f"{each:064x}" for each in range(index % 3)),
            texts=("", "same", f"own {index} ü")[: index % 4],
            scores={"acc": float(index % 2), "f1": 0.5},
            group=None if index % 2 else "pair",
        )
        for index in range(num_rows)
    ]
    write_samples(tmp_path / "t.parquet", samples)
    assert read_samples(tmp_path / "t.parquet") == samples
