import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hub_moe.data import train_bpe_tokenizer

TEXTS = ["def route(self, token):\n        return self.gate(token)\n" * 20, "x = [1, 2, 3]  # été\n" * 10]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe_tokenizer(TEXTS, vocab_size=300)


@given(st.text())
def test_every_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False) == text


def test_the_special_tokens_have_the_ids_of_the_presets(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert 0 not in tokenizer(TEXTS[0])["input_ids"]


def test_a_token_holds_a_word_with_its_dot_and_a_line_end_with_its_indentation(tokenizer):
    tokens = [tokenizer.decode([token]) for token in tokenizer(TEXTS[0])["input_ids"]]
    assert {".gate", "):\n        "} <= set(tokens)


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    assert train_bpe_tokenizer(TEXTS, vocab_size=300).get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) <= 300


def test_it_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS[1])["input_ids"] == tokenizer(TEXTS[1])["input_ids"]
    assert (loaded.bos_token_id, loaded.pad_token_id) == (0, 1)
