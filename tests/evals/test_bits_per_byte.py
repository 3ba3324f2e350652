import gzip
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_moe.errors import ConfigError
from hub_moe.evals import score_with_compressor, score_with_model, score_with_unigrams
from hub_moe.evals.bits_per_byte import _cut_windows


class Successor(torch.nn.Module):
    """Gives the token after the current one probability `p`, every other an equal share of the rest."""

    device = torch.device("cpu")

    def __init__(self, vocab_size, p):
        super().__init__()
        self.table_VV = torch.full((vocab_size, vocab_size), math.log((1 - p) / (vocab_size - 1)))
        for token in range(vocab_size):
            self.table_VV[token, (token + 1) % vocab_size] = math.log(p)

    def forward(self, input_ids):
        return type("Output", (), {"logits": self.table_VV[input_ids]})


def test_bits_per_byte_equal_those_computed_by_hand():
    # separator 0, then 1, 2, 3: each is the successor and costs 1 bit; then 1: it shares a half with two others
    score = score_with_model(Successor(4, 0.5), [[1, 2, 3, 1]], size_bytes=10, separator=0, context_length=2, stride=1)
    assert score.tokens == 4
    assert score.bits == pytest.approx(3 + math.log2(6), abs=1e-5)
    assert score.bits_per_byte == pytest.approx((3 + math.log2(6)) / 10, abs=1e-6)
    assert score.nats_per_token == pytest.approx((3 + math.log2(6)) * math.log(2) / 4, abs=1e-6)


@given(
    length=st.integers(0, 60),
    context_length=st.integers(1, 20),
    stride_share=st.floats(0.01, 1.0),
)
def test_every_token_is_scored_once_with_the_promised_context(length, context_length, stride_share):
    stride = max(1, int(stride_share * context_length))
    stream = list(range(length + 1))
    scored = []
    for window in _cut_windows(stream, context_length=context_length, stride=stride):
        assert len(window.inputs) == len(window.targets) <= context_length
        assert [token + 1 for token in window.inputs] == list(window.targets)
        for target in window.targets[window.num_scored_before :]:
            scored.append(target)
            assert target - window.inputs[0] >= min(target, context_length - stride)
    assert scored == stream[1:]


@settings(max_examples=10, deadline=None)
@given(batch_size=st.integers(1, 9))
def test_documents_within_one_window_cost_the_models_own_loss(batch_size):
    torch.manual_seed(0)
    documents = [torch.randint(2, 128, (length,)).tolist() for length in (1, 30, 7, 12)]
    model = _tiny_model()
    expected = 0.0
    for document in documents:
        row = torch.tensor([[0, *document]])
        expected += model(row, labels=row).loss.item() * len(document)
    score = score_with_model(
        model, documents, size_bytes=1, separator=0, context_length=64, stride=32, batch_size=batch_size
    )
    assert score.tokens == 50
    assert score.bits * math.log(2) == pytest.approx(expected, rel=1e-5)


def _tiny_model():
    from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM

    torch.manual_seed(0)
    config = HubMoeConfig.from_preset(
        "nano", vocab_size=128, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2
    )
    return HubMoeForCausalLM(config).eval()


def test_a_stride_longer_than_the_context_is_an_error():
    with pytest.raises(ConfigError, match="stride=5 must lie between 1 and context_length=4"):
        score_with_model(Successor(4, 0.5), [[1]], size_bytes=1, separator=0, context_length=4, stride=5)


def test_unigrams_cost_their_smoothed_frequency():
    # counts plus one: token 0 has 4, token 1 has 1, token 2 has 1, of 6
    score = score_with_unigrams([[0, 0], [0]], [[0, 1], [2]], vocab_size=3, size_bytes=5)
    assert score.bits == pytest.approx(math.log2(6 / 4) + 2 * math.log2(6))
    assert (score.tokens, score.size_bytes) == (3, 5)


def test_a_compressor_is_measured_on_utf8_bytes():
    score = score_with_compressor(lambda data: data[: len(data) // 2], ["é" * 10, "ab"])
    assert (score.size_bytes, score.bits_per_byte) == (22, 4.0)
    assert score_with_compressor(gzip.compress, ["a" * 10_000]).bits_per_byte < 0.1
