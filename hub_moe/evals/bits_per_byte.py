"""Bits per byte of a text under a model, a unigram model and file compressors.

Shape letters: W windows in a batch, C tokens of a window, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class CodeLength:
    """The bits that a text of `size_bytes` UTF-8 bytes costs; `tokens` is 0 where nothing was tokenized."""

    bits: float
    size_bytes: int
    tokens: int = 0

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers and with compressors."""
        return self.bits / self.size_bytes

    @property
    def nats_per_token(self) -> float:
        """The loss that training reports."""
        return self.bits * math.log(2) / self.tokens


def score_with_model(
    model: Any,
    documents: Iterable[Sequence[int]],
    *,
    size_bytes: int,
    separator: int,
    context_length: int,
    stride: int,
    batch_size: int = 32,
) -> CodeLength:
    """The negative log-likelihood of all tokens of `documents` under a causal language model, each scored exactly once.

    Each document is scored by itself. Its first token is predicted from `separator` alone; the separator is not
    scored, and neither is the end of the document. A document longer than `context_length` is read in windows of that
    length, each `stride` tokens on: the first scores all its tokens, every other only its last `stride`, so that a
    token is predicted from at least `context_length - stride` tokens wherever so many come before it.

    Args:
        model: A causal language model in eval mode, taking `input_ids` and returning `logits`.
        documents: Token ids, without separators.
        size_bytes: UTF-8 bytes of the texts, by which the sum is divided.
        separator: Token that came before each document in training.
        context_length: Tokens that the model sees at once, the separator included.
        stride: From 1 to `context_length`.
        batch_size: Windows at a time.

    Raises:
        ConfigError: If `stride` is outside its range.
    """
    if not 1 <= stride <= context_length:
        raise ConfigError(f"stride={stride} must lie between 1 and context_length={context_length}.")
    windows = [
        window
        for document in documents
        for window in _cut_windows([separator, *document], context_length=context_length, stride=stride)
    ]
    windows.sort(key=lambda window: len(window.inputs))  # little padding
    nats, tokens = 0.0, 0
    for start in range(0, len(windows), batch_size):
        batch_nats, batch_tokens = _score_windows(model, windows[start : start + batch_size])
        nats, tokens = nats + batch_nats, tokens + batch_tokens
    return CodeLength(bits=nats / math.log(2), size_bytes=size_bytes, tokens=tokens)


def score_with_unigrams(
    train: Iterable[Sequence[int]], documents: Iterable[Sequence[int]], *, vocab_size: int, size_bytes: int
) -> CodeLength:
    """The cost of `documents` when each token costs what its frequency in `train` says, one added to every count."""
    counts = Counter(token for document in train for token in document)
    total = sum(counts.values()) + vocab_size
    tokens = [token for document in documents for token in document]
    bits = -sum(math.log2((counts[token] + 1) / total) for token in tokens)
    return CodeLength(bits=bits, size_bytes=size_bytes, tokens=len(tokens))


def score_with_compressor(compress: Callable[[bytes], bytes], texts: Iterable[str]) -> CodeLength:
    """The size of the texts, UTF-8 and end to end, as one compressed file. A compressor sees no training text."""
    data = "".join(texts).encode()
    return CodeLength(bits=8 * len(compress(data)), size_bytes=len(data))


@dataclass(frozen=True)
class _Window:
    """Inputs, the token after each of them, and how many of these at the front another window scores."""

    inputs: Sequence[int]
    targets: Sequence[int]
    num_scored_before: int


def _cut_windows(stream: Sequence[int], *, context_length: int, stride: int) -> Iterator[_Window]:
    end_of_scored = 0  # targets are stream[1:]; this many have a window
    start = 0
    while end_of_scored < len(stream) - 1:
        end = min(start + context_length, len(stream) - 1)
        yield _Window(stream[start:end], stream[start + 1 : end + 1], end_of_scored - start)
        end_of_scored = end
        start += stride


@torch.no_grad()
def _score_windows(model: Any, windows: Sequence[_Window]) -> tuple[float, int]:
    """Nats and number of the scored tokens. Windows are padded on the right, where causal attention does not look."""
    longest = max(len(window.inputs) for window in windows)
    input_WC = torch.zeros(len(windows), longest, dtype=torch.int64)
    target_WC = torch.full((len(windows), longest), -100)
    for row, window in enumerate(windows):
        length = len(window.inputs)
        input_WC[row, :length] = torch.tensor(window.inputs)
        target_WC[row, window.num_scored_before : length] = torch.tensor(window.targets[window.num_scored_before :])
    logits_WCV: Tensor = model(input_ids=input_WC.to(model.device)).logits.float()
    nats = torch.nn.functional.cross_entropy(
        logits_WCV.flatten(0, 1), target_WC.flatten().to(logits_WCV.device), ignore_index=-100, reduction="sum"
    )
    return nats.item(), int((target_WC != -100).sum())
