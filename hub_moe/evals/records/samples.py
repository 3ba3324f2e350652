"""Every answer of a run, one row per document, as parquet."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...errors import EvaluationError


@dataclass(frozen=True)
class Sample:
    """One document of one task and all that the model answered to it.

    Attributes:
        entry: The entry of the suite.
        index: Place of the document in the split, before any limit or shuffle.
        document_sha256: Of the document's canonical JSON.
        group: What documents belong together; None where each stands alone.
        prompt_sha256s: For each request, of its kind and all its arguments: context, continuation, settings.
        log_likelihoods: For each request, in nats; empty for generation.
        is_greedy: For each request, whether the continuation is what greedy decoding gives.
        texts: For each request, what was generated; empty for log-likelihoods.
        scores: By metric as lm_eval's task gives it for this document. A ratio such as bits per byte is its numerator.
        sizes: By metric, what the sum of scores is divided by, such as bytes; absent for means over documents.
        is_unparsable: Whether the task found nothing to score in the answer.
    """

    entry: str
    task: str
    index: int
    document_sha256: str
    prompt_sha256s: Sequence[str]
    log_likelihoods: Sequence[float] = ()
    is_greedy: Sequence[bool] = ()
    texts: Sequence[str] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, float] = field(default_factory=dict)
    group: str | None = None
    is_unparsable: bool = False


# of a stranger's table; MMLU has 14,042 documents with 4 answers each
_MAX_VALUES, _MAX_BYTES, _ROWS_AT_ONCE = 20_000_000, 2**31, 1000

_NUMBERS = pa.map_(pa.string(), pa.float64())
_SCHEMA = pa.schema(
    {
        "entry": pa.string(),
        "task": pa.string(),
        "index": pa.int64(),
        "document_sha256": pa.string(),
        "prompt_sha256s": pa.list_(pa.string()),
        "log_likelihoods": pa.list_(pa.float64()),
        "is_greedy": pa.list_(pa.bool_()),
        "texts": pa.list_(pa.string()),
        "scores": _NUMBERS,
        "sizes": _NUMBERS,
        "group": pa.string(),
        "is_unparsable": pa.bool_(),
    }
)


def write_samples(path: Path, samples: Iterable[Sample]) -> int:
    """Write the table; returns the number of rows."""
    rows = [_to_row(sample) for sample in samples]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path, compression="zstd")
    return len(rows)


def read_samples(path: Path, *, num_rows: int | None = None) -> list[Sample]:
    """The rows of a table that `write_samples` wrote; `num_rows` is how many are expected.

    Raises:
        EvaluationError: If it is damaged, has other columns or another number of rows, or would fill the memory:
            strangers' tables are small files that may claim to hold anything.
        OSError: If it cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(_SCHEMA):
                names = ", ".join(file.schema_arrow.names)
                raise EvaluationError(f"{path} is no table of samples: its columns are {names}.")
            if num_rows is not None and file.metadata.num_rows != num_rows:
                raise EvaluationError(f"{path} has {file.metadata.num_rows:,} rows; {num_rows:,} were expected.")
            _refuse_bomb(path, file.metadata)
            columns = [file.schema.column(index) for index in range(len(file.schema))]
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        return _read_rows(path, texts)
    except pa.ArrowException as error:
        raise EvaluationError(f"{path} is no table of samples: {error}.") from error


def _refuse_bomb(path: Path, metadata: pq.FileMetaData) -> None:
    """Runs of one value take no space in a file, so sizes say little and numbers of values say more."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    num_values = max((g.column(c).num_values for g in groups for c in range(g.num_columns)), default=0)
    if num_values > _MAX_VALUES:
        raise EvaluationError(f"{path} has {num_values:,} values in a column, more than the answers of any suite.")
    if sum(group.total_byte_size for group in groups) > _MAX_BYTES:
        raise _too_large(path)


def _read_rows(path: Path, texts: Sequence[str]) -> list[Sample]:
    samples, size_bytes = [], 0
    with pq.ParquetFile(path, read_dictionary=texts) as file:  # a text that repeats is first unpacked once
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            size_bytes += sum(map(_unpacked_bytes, batch.columns))
            if size_bytes > _MAX_BYTES:
                raise _too_large(path)
            unpacked = batch.cast(_SCHEMA)
            for name, column in zip(unpacked.schema.names, unpacked.columns, strict=True):
                if name != "group" and _has_gap(column):
                    raise EvaluationError(f"{path} has a gap in its column {name}.")
            samples += [_from_row(row) for row in unpacked.to_pylist()]
    return samples


def _too_large(path: Path) -> EvaluationError:
    return EvaluationError(f"{path} unpacks to more than {_MAX_BYTES:,} bytes; no table of samples is so large.")


def _unpacked_bytes(column: pa.Array) -> int:
    """What a column takes with every text as often as it is used."""
    if pa.types.is_dictionary(column.type):
        lengths = pc.cast(pc.binary_length(column.dictionary), pa.int64())
        return pc.sum(lengths.take(column.indices)).as_py() or 0
    if pa.types.is_map(column.type):
        return _unpacked_bytes(column.keys) + _unpacked_bytes(column.items)
    return _unpacked_bytes(column.flatten()) if pa.types.is_list(column.type) else column.nbytes


def _has_gap(column: pa.Array) -> bool:
    if column.null_count:
        return True
    if pa.types.is_map(column.type):
        return _has_gap(column.keys) or _has_gap(column.items)
    return pa.types.is_list(column.type) and _has_gap(column.flatten())


def _to_row(sample: Sample) -> dict[str, object]:
    row = asdict(sample)
    return {**row, "scores": sorted(sample.scores.items()), "sizes": sorted(sample.sizes.items())}


def _from_row(row: dict[str, object]) -> Sample:
    values = {each.name: row[each.name] for each in fields(Sample)}
    for name in ("scores", "sizes"):
        values[name] = dict(values[name])  # type: ignore[call-overload]
    for name in ("prompt_sha256s", "log_likelihoods", "is_greedy", "texts"):
        values[name] = tuple(values[name])  # type: ignore[arg-type]
    return Sample(**values)  # type: ignore[arg-type]
