"""Text in: where it comes from, how it becomes tokens, and how tokens become rows for training."""

from .bpe_tokenizer import train_bpe_tokenizer
from .chat_template import set_chat_template
from .language_reference import read_language_reference
from .loading import load_rows
from .overlap import OverlapReport, measure_overlap
from .packing import BlockDataset, pack_documents
from .prepare import PreparedData, prepare
from .report import BadRow, DataReport
from .source import DataSource, LoadedRows, Provenance
from .source_corpus import Corpus, Document, read_stdlib_corpus
from .tokenizer_check import check_packing, check_tokenizer

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
