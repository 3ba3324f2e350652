"""The text of a comparison as blocks of tokens, the same for every arm and seed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hub_moe.data import Corpus, Document, pack_documents, read_stdlib_corpus, train_bpe_tokenizer
from hub_moe.errors import DatasetError

HELD_OUT_SHARE = {"stdlib": 0.05, "file": 0.1}


@dataclass(frozen=True)
class Text:
    """Blocks to train on and blocks held out, with where they come from."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    train_blocks: Tensor
    held_out_blocks: Tensor
    facts: dict[str, Any]


def read_text(source: str, *, name: str, vocab_size: int, block_length: int, held_out_blocks: int) -> Text:
    """The standard library split by file, or a file whose last tenth is held out; the tokenizer learns from the rest.

    Of the held-out blocks, `held_out_blocks` spread evenly over them are used.

    Raises:
        DatasetError: If the file is missing or too short.
    """
    is_stdlib = source == "stdlib"
    corpus = read_stdlib_corpus(seed=0, held_out_share=HELD_OUT_SHARE["stdlib"]) if is_stdlib else _split_file(source)
    tokenizer = train_bpe_tokenizer((document.text for document in corpus.train), vocab_size=vocab_size)
    train, held_out = (
        pack_documents(
            tokenizer([document.text for document in documents])["input_ids"],
            block_length=block_length,
            separator=tokenizer.bos_token_id,
        )
        for documents in (corpus.train, corpus.held_out)
    )
    spread = torch.linspace(0, len(held_out) - 1, min(held_out_blocks, len(held_out))).long()
    facts = {
        "source": "the running Python's standard library, split by file" if is_stdlib else Path(source).name,
        "sha256": corpus.sha256,
        "train_tokens": train.numel(),
        "held_out_tokens": held_out[spread].numel(),
    }
    return Text(name, tokenizer, train, held_out[spread], facts)


def _split_file(source: str) -> Corpus:
    path = Path(source)
    if not path.is_file():
        raise DatasetError(f"There is no file {source}; expected a UTF-8 text or the word stdlib.")
    text = path.read_text("utf-8")
    cut = round(len(text) * (1 - HELD_OUT_SHARE["file"]))
    return Corpus(
        train=(Document(path.name, text[:cut]),), held_out=(Document(f"{path.name}, last tenth", text[cut:]),)
    )
