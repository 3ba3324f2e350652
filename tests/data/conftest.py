import pytest


@pytest.fixture(scope="session")
def chat_tokenizer():
    """A byte-level tokenizer of at most 128 tokens with the plain chat template."""
    from hub_moe.data import set_chat_template

    tokenizer = _train()
    set_chat_template(tokenizer, "plain")
    return tokenizer


@pytest.fixture
def bare_tokenizer():
    """The same without a chat template; changing it disturbs nobody."""
    return _train()


def _train():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=128,
        special_tokens=["<eos>", "<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "User: Assistant: the road was long"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<eos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
