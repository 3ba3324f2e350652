"""How good a model is, next to what it has to beat."""

from .bits_per_byte import CodeLength, score_with_compressor, score_with_model, score_with_unigrams

__all__ = ["CodeLength", "score_with_compressor", "score_with_model", "score_with_unigrams"]
