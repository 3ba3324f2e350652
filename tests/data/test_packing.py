import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hub_moe.data import BlockDataset, pack_documents
from hub_moe.errors import DatasetError


def test_documents_lie_end_to_end_with_a_separator_before_each():
    blocks = pack_documents([[5, 6, 7], [8]], block_length=3, separator=0)
    assert blocks.tolist() == [[0, 5, 6], [7, 0, 8]]


def test_the_last_block_reaches_back_instead_of_losing_tokens():
    blocks = pack_documents([[5, 6, 7, 8]], block_length=3, separator=0)
    assert blocks.tolist() == [[0, 5, 6], [6, 7, 8]]


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    block_length=st.integers(1, 12),
)
def test_no_token_is_lost_or_invented(lengths, block_length):
    documents, next_token = [], 1
    for length in lengths:
        documents.append(list(range(next_token, next_token + length)))
        next_token += length
    if sum(lengths) + len(lengths) < block_length:
        with pytest.raises(DatasetError, match="fewer than one block"):
            pack_documents(documents, block_length=block_length, separator=0)
        return
    blocks = pack_documents(documents, block_length=block_length, separator=0)
    assert blocks.shape[1] == block_length
    assert set(blocks.flatten().tolist()) == {0, *range(1, next_token)}


def test_an_example_predicts_itself():
    dataset = BlockDataset(torch.tensor([[1, 2], [3, 4]]))
    assert len(dataset) == 2
    assert dataset[1]["labels"].tolist() == dataset[1]["input_ids"].tolist() == [3, 4]
