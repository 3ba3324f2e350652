"""Text in: where it comes from, how it becomes tokens, and how tokens become rows for training."""

from .loading import load_rows
from .overlap import OverlapReport, measure_overlap
from .packing import BlockDataset, pack_documents
from .prepare import PreparedData, prepare
from .report import BadRow, DataReport
from .source import DataSource, LoadedRows, Provenance
from .source_corpus import Corpus, Document, read_language_reference, read_stdlib_corpus
from .tokenizers import check_packing, check_tokenizer, set_chat_template, train_bpe_tokenizer

__all__ = [
    "BadRow",
    "BlockDataset",
    "Corpus",
    "DataReport",
    "DataSource",
    "Document",
    "LoadedRows",
    "OverlapReport",
    "PreparedData",
    "Provenance",
    "check_packing",
    "check_tokenizer",
    "load_rows",
    "measure_overlap",
    "pack_documents",
    "prepare",
    "read_language_reference",
    "read_stdlib_corpus",
    "set_chat_template",
    "train_bpe_tokenizer",
]
