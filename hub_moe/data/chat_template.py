"""Templates for tokenizers that have none."""

from pathlib import Path
from typing import Any

from ..errors import DatasetError

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
