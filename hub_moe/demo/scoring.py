"""How well the base knows held-out files, beside general compressors and the frequencies of its tokens."""

import gzip
import lzma
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import modeling  # noqa: F401  (teaches AutoModelForCausalLM our models)
from ..data import Corpus
from ..evals import score_with_compressor, score_with_model, score_with_unigrams


def score_held_out(folder: Path, corpus: Corpus, *, context_length: int) -> dict[str, float]:
    """Bits per byte of the held-out files under the model in `folder` and under each baseline; lower is better.

    Every token is scored with at least half of `context_length` before it, where its file has that much. gzip and xz
    at level 9 see the files end to end as one, and no training text.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = {
        side: tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
        for side, documents in (("train", corpus.train), ("held_out", corpus.held_out))
    }
    texts = [document.text for document in corpus.held_out]
    size_bytes = sum(document.size_bytes for document in corpus.held_out)
    scores = {
        "model": score_with_model(
            model,
            tokens["held_out"],
            size_bytes=size_bytes,
            separator=tokenizer.bos_token_id,
            context_length=context_length,
            stride=context_length // 2,
        ),
        "xz -9": score_with_compressor(lambda data: lzma.compress(data, preset=9), texts),
        "gzip -9": score_with_compressor(lambda data: gzip.compress(data, 9), texts),
        "unigram": score_with_unigrams(
            tokens["train"], tokens["held_out"], vocab_size=model.config.vocab_size, size_bytes=size_bytes
        ),
    }
    return {name: score.bits_per_byte for name, score in scores.items()}
