"""Rows to tokenized documents: their tokens, what is trained on, and keys that depend on nothing but their content."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import DatasetError
from .chat import ChatEncoder, Encoded
from .formats import BadRowError, Layout, Message, find_layout, read_messages, read_text
from .report import BadRow
from .source import LoadedRows, Row
from .token_rows import Span, TokenStore

_BATCH = 1000


@dataclass(frozen=True)
class Documents:
    """Tokenized documents. Lists run in parallel; `rows` are the numbers of the rows that the documents come from.

    Documents with equal `keys` are the same up to white space; those with equal `side_keys` share a prompt.
    """

    store: TokenStore
    spans: list[Span]
    rows: list[int]
    keys: list[str]
    side_keys: list[str]
    bad_rows: list[BadRow]
    num_rows: int


class DocumentEncoder:
    """Encodes rows of one layout.

    Args:
        tokenizer: A fast tokenizer.
        layout: Of the rows.
        section_chars: Texts longer than this are cut into documents of about this length, at the end of a line.

    Raises:
        DatasetError: If the tokenizer cannot serve the layout.
    """

    def __init__(self, tokenizer: Any, layout: Layout, *, section_chars: int | None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DatasetError(f"{type(tokenizer).__name__} is not a fast tokenizer; load it by AutoTokenizer.")
        if tokenizer.eos_token_id is None:
            raise DatasetError("The tokenizer has no eos_token, which ends documents; set tokenizer.eos_token.")
        self.tokenizer = tokenizer
        self.layout = layout
        self.section_chars = section_chars
        self.chat = None if layout.format == "text" else ChatEncoder(tokenizer)

    def __call__(self, columns: dict[str, list[Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        """For `datasets.map`: documents of a batch of rows given as columns; bad rows have a `reason`."""
        names = list(columns)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        documents = self._encode_texts(rows, numbers) if self.chat is None else self._encode_chats(rows, numbers)
        return {name: [document[name] for document in documents] for name in _FIELDS}

    def _encode_chats(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[dict[str, Any]]:
        assert self.chat is not None
        read: list[list[Message] | BadRowError] = []
        for row in rows:
            try:
                read.append(read_messages(row, self.layout))
            except BadRowError as error:
                read.append(error)
        good = [item for item in read if not isinstance(item, BadRowError)]
        encoded = iter(self.chat.encode(good))
        documents = []
        for number, messages in zip(numbers, read, strict=True):
            item = messages if isinstance(messages, BadRowError) else next(encoded)
            if isinstance(item, BadRowError) or isinstance(messages, BadRowError):
                documents.append(_bad_document(number, str(item)))
                continue
            first_answer = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
            documents.append(
                _document(number, item, key=_key_messages(messages), side_key=_key_messages(messages[:first_answer]))
            )
        return documents

    def _encode_texts(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[dict[str, Any]]:
        read: list[tuple[int, str, bool] | tuple[int, BadRowError, bool]] = []
        for number, row in zip(numbers, rows, strict=True):
            try:
                sections = list(_cut_into_sections(read_text(row, self.layout), self.section_chars))
                read.extend((number, section, section is sections[-1]) for section in sections)
            except BadRowError as error:
                read.append((number, error, True))
        texts = [item for _, item, _ in read if isinstance(item, str)]
        ids_of_texts: Iterator[list[int]] = iter(
            self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        )
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        documents = []
        for number, item, is_end in read:
            if isinstance(item, BadRowError):
                documents.append(_bad_document(number, str(item)))
                continue
            ids = [*bos, *next(ids_of_texts), *([self.tokenizer.eos_token_id] if is_end else [])]
            key = _hash_text(_normalise(item))
            documents.append(_document(number, Encoded(ids, [True] * len(ids)), key=key, side_key=key))
        return documents

    @cached_property
    def fingerprint(self) -> str:
        """Changes with whatever changes the documents of the same rows: the key of the cache."""
        code = [(Path(__file__).parent / name).read_bytes() for name in ("documents.py", "chat.py", "formats.py")]
        tokenizer = self.tokenizer
        settings = (self.layout, self.section_chars, tokenizer.special_tokens_map, tokenizer.chat_template)
        parts = [*code, tokenizer.backend_tokenizer.to_str().encode(), repr(settings).encode()]
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


_FIELDS = ("row", "input_ids", "trained", "key", "side_key", "reason")
_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "input_ids": pa.list_(pa.int32()),
        "trained": pa.list_(pa.bool_()),
        "key": pa.string(),
        "side_key": pa.string(),
        "reason": pa.string(),
    }
)


def encode_documents(rows: LoadedRows, encoder: DocumentEncoder) -> Documents:
    """All documents of `rows`, in the order of the rows.

    Rows that `datasets` holds on disk are encoded once and kept in its cache, with a progress bar; streamed rows and
    rows in memory are encoded as they come, and only their tokens are kept.
    """
    import datasets

    if isinstance(rows.rows, datasets.Dataset):
        encoded = rows.rows.map(
            encoder,
            batched=True,
            batch_size=_BATCH,
            with_indices=True,
            remove_columns=rows.rows.column_names,
            features=datasets.Features.from_arrow_schema(_SCHEMA),
            new_fingerprint=hashlib.sha256(f"{rows.rows._fingerprint}{encoder.fingerprint}".encode()).hexdigest()[:32],
            desc="Tokenizing",
        )
        return _collect([encoded.with_format("arrow")[:]], num_rows=len(rows.rows))
    tables, num_rows = [], 0
    for batch in _batches(rows):
        columns = {name: [row.get(name) for row in batch] for name in rows.columns}
        documents = encoder(columns, range(num_rows, num_rows + len(batch)))
        tables.append(pa.table(documents, schema=_SCHEMA))
        num_rows += len(batch)
    return _collect(tables, num_rows=num_rows)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _collect(tables: Sequence[Any], *, num_rows: int) -> Documents:
    table = pa.concat_tables(tables) if tables else _SCHEMA.empty_table()
    chunks = table.column("input_ids").chunks
    ids = [chunk.flatten().to_numpy() for chunk in chunks]
    trained = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table.column("trained").chunks]
    lengths = np.concatenate([np.zeros(0, np.int64), *(chunk.value_lengths().to_numpy() for chunk in chunks)])
    store = TokenStore(np.concatenate([np.zeros(0, np.int32), *ids]), np.concatenate([np.zeros(0, bool), *trained]))
    ends = np.cumsum(lengths).tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []
    columns = {name: table.column(name).to_pylist() for name in ("row", "key", "side_key", "reason")}
    good = [place for place, reason in enumerate(columns["reason"]) if reason is None]
    bad = [
        BadRow(row, reason) for row, reason in zip(columns["row"], columns["reason"], strict=True) if reason is not None
    ]
    rows, keys, side_keys = ([columns[name][place] for place in good] for name in ("row", "key", "side_key"))
    return Documents(
        store=store,
        spans=[spans[place] for place in good],
        rows=rows,
        keys=keys,
        side_keys=side_keys,
        bad_rows=bad,
        num_rows=num_rows,
    )


def _document(number: int, encoded: Encoded, *, key: str, side_key: str) -> dict[str, Any]:
    tokens = {"input_ids": encoded.input_ids, "trained": encoded.trained}
    return {"row": number, **tokens, "key": key, "side_key": side_key, "reason": None}


def _bad_document(number: int, reason: str) -> dict[str, Any]:
    return {"row": number, "input_ids": [], "trained": [], "key": "", "side_key": "", "reason": reason}


def _cut_into_sections(text: str, section_chars: int | None) -> Iterator[str]:
    """`text` in pieces of about `section_chars`, each but the last ending with a line where there are lines."""
    start = 0
    while section_chars is not None and len(text) - start > 2 * section_chars:
        end = text.rfind("\n", start, start + section_chars) + 1 or start + section_chars
        if not text[start:end].strip():
            end = start + section_chars
        yield text[start:end]
        start = end
    if text[start:].strip() or not start:
        yield text[start:]


def _normalise(text: str) -> str:
    return " ".join(text.split())


def _key_messages(messages: Sequence[Message]) -> str:
    return _hash_text("\0".join(f"{message['role']}\0{_normalise(message['content'])}" for message in messages))


def _hash_text(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True)
class MarkedRow:
    """Pieces of text in order, each with whether its tokens are trained on, and the counts."""

    pieces: tuple[tuple[str, bool], ...]
    tokens: int
    trained_tokens: int


def mark_row(rows: LoadedRows, number: int, tokenizer: Any, *, max_tokens: int | None = None) -> MarkedRow:
    """Row `number` (from 0) decoded from its tokens; of a row of more than `max_tokens`, the pieces show the first.

    Raises:
        DatasetError: If there is no such row, or it does not fit its format.
    """
    encoder = DocumentEncoder(tokenizer, find_layout(rows), section_chars=None)
    row = _pick(rows.rows, number)
    if row is None:
        raise DatasetError(f"{rows.provenance.source} has no row {number:,}; rows count from 0.")
    document = encoder({name: [row.get(name)] for name in rows.columns}, [number])
    if document["reason"][0] is not None:
        raise DatasetError(f"Row {number:,} does not fit: {document['reason'][0]}.")
    ids, trained = document["input_ids"][0], document["trained"][0]
    trained[0] = False  # nothing comes before it
    shown = list(zip(ids, trained, strict=True))[:max_tokens]
    pieces = [
        (tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False), is_trained)
        for is_trained, run in groupby(shown, key=lambda pair: pair[1])
    ]
    return MarkedRow(tuple(pieces), len(ids), sum(trained))


def _pick(rows: Any, number: int) -> Row | None:
    if hasattr(rows, "__getitem__") and number < len(rows):
        picked: Row = rows[number]
        return picked
    return next(islice(rows, number, None), None)
