"""Text in: where it comes from, how it becomes tokens, and how tokens become blocks."""

from .bpe_tokenizer import train_bpe_tokenizer
from .packing import BlockDataset, pack_documents
from .source_corpus import Corpus, Document, read_stdlib_corpus

__all__ = ["BlockDataset", "Corpus", "Document", "pack_documents", "read_stdlib_corpus", "train_bpe_tokenizer"]
