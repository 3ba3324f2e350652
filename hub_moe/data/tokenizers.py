"""Tokenizers: learned from a corpus, given a chat template, held against the model they are to serve."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..errors import DatasetError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"

# No token reaches beyond one of these: a word with the character before it (".append", " self"), a digit, a run of
# signs with the line break and indentation after it ("):\n        "), white space. On source code this takes about 5 %
# fewer tokens than GPT-2's rule, which has none such as ".append".
_SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{L}_]+|\p{N}| ?[^\s\p{L}\p{N}_]+(?:\n *)?|\s*\n *|\s+(?!\S)|\s+"


def train_bpe_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A lossless tokenizer with at most `vocab_size` tokens: every UTF-8 text survives encoding and decoding.

    Token 0 starts and ends texts (`bos_token` and `eos_token`), token 1 pads; encoding adds neither. The same texts
    give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


# The layout that DeepSeek-V2's chat models use: roles in words, every answer closed by the end-of-text token.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def set_chat_template(tokenizer: Any, template: str | Path) -> None:
    """Give `tokenizer` a chat template, which `tokenizer.save_pretrained` then saves with it.

    Args:
        tokenizer: Changed in place.
        template: `"plain"` (User: ..., Assistant: ..., each answer closed by the end-of-text token) or the path of a
            Jinja file. For Mixture-of-Experts models that are pretrained only, plain is a good choice.

    Raises:
        DatasetError: If there is no such file, it is no template, or the tokenizer has no `eos_token` to close answers.
    """
    if template == "plain":
        if tokenizer.eos_token is None:
            raise DatasetError("The plain chat template closes answers by eos_token, and this tokenizer has none.")
        tokenizer.chat_template = PLAIN_TEMPLATE
        return
    path = Path(template).expanduser()
    if not path.is_file():
        raise DatasetError(f'chat_template is "plain" or the path of a Jinja file; there is no file {template}.')
    text = path.read_text(encoding="utf-8")
    if "messages" not in text:
        raise DatasetError(f"{template} is not a chat template: it never mentions messages.")
    tokenizer.chat_template = text


def check_tokenizer(tokenizer: Any, model_config: Any) -> None:
    """Refuse a tokenizer that the model cannot be trained with.

    Raises:
        DatasetError: If it has ids that the model has no embedding for, or no token to end or to pad texts with.
    """
    config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise DatasetError(
            f"The tokenizer has ids up to {highest:,}, and the model ({config.model_type}) embeds "
            f"{config.vocab_size:,} tokens: use the tokenizer that is stored with the model."
        )
    for name, use in (("eos_token", "end"), ("pad_token", "pad")):
        if getattr(tokenizer, name) is None:
            raise DatasetError(
                f"The tokenizer has no {name} to {use} texts with: set tokenizer.{name} to one it knows."
            )


def check_packing(model_config: Any) -> None:
    """Refuse to pack for a model whose layers carry a state from one document to the next.

    transformers keeps packed documents apart in attention only.

    Raises:
        DatasetError: If the model has linear-attention or state-space layers.
    """
    config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    kinds = sorted({kind for kind in getattr(config, "layer_types", None) or () if "attention" not in kind})
    if "linear_attention" in (getattr(config, "layer_types", None) or ()):
        kinds = ["linear_attention", *kinds]
    if kinds:
        raise DatasetError(
            f"{config.model_type} has {', '.join(kinds)} layers, through which packed documents would see each other; "
            "use packing = false."
        )
