"""Tokenized documents to training blocks of one length."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DatasetError


def pack_documents(documents: Iterable[list[int]], *, block_length: int, separator: int) -> Tensor:
    """Token ids of shape (blocks, block_length), int64: the documents end to end, `separator` before each.

    No padding, and no token is dropped: where the stream does not divide evenly, the last block reaches back into the
    one before it. Attention runs across documents; the separator tells them apart.

    Raises:
        DatasetError: If the documents together are shorter than one block.
    """
    stream = torch.tensor([token for document in documents for token in [separator, *document]], dtype=torch.int64)
    if len(stream) < block_length:
        raise DatasetError(f"The documents hold {len(stream)} tokens, fewer than one block of {block_length}.")
    blocks = stream[: len(stream) - len(stream) % block_length].view(-1, block_length)
    if len(stream) % block_length:
        blocks = torch.cat([blocks, stream[None, -block_length:]])
    return blocks


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Blocks of token ids of shape (blocks, block_length) as examples for a causal language model."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}
