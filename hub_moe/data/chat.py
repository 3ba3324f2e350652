"""Conversations to token ids, with the tokens of the assistant's answers marked: those are trained on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import DatasetError
from .formats import BadRowError, Message

Span = tuple[int, int]
_PROBE: list[Message] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "probed answer"}]


@dataclass(frozen=True)
class Encoded:
    """Token ids and, for each, whether it is trained on."""

    input_ids: list[int]
    trained: list[bool]


class ChatEncoder:
    """Renders conversations by the tokenizer's chat template and marks every answer, its end-of-turn token included.

    What is an answer is told by the template's `{% generation %}` blocks. A template without them is rendered up to
    each answer as for generation, and that text must be how the whole conversation begins.

    Raises:
        DatasetError: If the tokenizer has no chat template or is not a fast one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise DatasetError(
                'The tokenizer has no chat template: set chat_template = "plain" (or the path of a Jinja file), which '
                "is then saved with the tokenizer, or use the tokenizer of a chat model."
            )
        self.template: str = tokenizer.get_chat_template()
        self.has_generation_blocks = bool(re.search(r"\{%-?\s*generation\s*-?%\}", self.template))
        special = {*tokenizer.all_special_tokens}
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(special, key=lambda token: (-len(token), token))
        self._special = re.compile("|".join(map(re.escape, longest_first)) if special else r"(?!)")

    def describe(self) -> str:
        """How answers are found and closed, in a sentence."""
        found = "{% generation %} blocks" if self.has_generation_blocks else "rendering up to each answer"
        if self.end_of_turn is None:
            return f"answers found by {found}; the template closes none, so {self.tokenizer.eos_token} is appended"
        return f"answers found by {found} and closed by {self.end_of_turn}"

    @cached_property
    def end_of_turn(self) -> str | None:
        """The special token that the template puts behind an answer; None if it puts none."""
        text = self._render(_PROBE)[0]
        tail = text[text.rindex(_PROBE[1]["content"]) + len(_PROBE[1]["content"]) :]
        match = self._special.search(tail)
        return match.group() if match else None

    def encode(self, conversations: Sequence[list[Message]]) -> list[Encoded | BadRowError]:
        """Each conversation's tokens, or why it cannot be used."""
        rendered: list[tuple[str, list[Span]] | BadRowError] = []
        for messages in conversations:
            try:
                rendered.append(self._find_answers(messages))
            except BadRowError as error:
                rendered.append(error)
        good = [item for item in rendered if not isinstance(item, BadRowError)]
        tokens = iter(self._tokenize(good))
        return [item if isinstance(item, BadRowError) else next(tokens) for item in rendered]

    def _find_answers(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The rendered conversation up to the end of its last answer, and the answers in it as character spans."""
        self._refuse_special_tokens(messages)
        text, spans = self._render(messages)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not self.has_generation_blocks:
            spans = [self._find_answer(messages, number, text) for number in answers]
        if len(spans) != len(answers):
            raise BadRowError(f"the chat template marks {len(spans)} answers, and the row has {len(answers)}")
        spans = [self._close(text, span) for span in spans]
        for (start, end), (next_start, _) in zip(spans, [*spans[1:], (len(text), 0)], strict=True):
            if not start < end <= next_start:
                raise DatasetError("The chat template does not close each answer before the next message begins.")
        for (start, end), number in zip(spans, answers, strict=True):
            if messages[number]["content"].strip() not in text[start:end]:
                raise BadRowError(f"the chat template leaves out or changes part of the answer in message {number}")
        text = text[: spans[-1][1]]
        if self.end_of_turn is None:
            text += self.tokenizer.eos_token
            spans[-1] = (spans[-1][0], len(text))
        return text, spans

    def _refuse_special_tokens(self, messages: list[Message]) -> None:
        """A special token in a message would end or fake a turn."""
        for number, message in enumerate(messages):
            match = self._special.search(message["content"])
            if match:
                raise BadRowError(f"message {number} contains the special token {match.group()} as text")

    def _find_answer(self, messages: list[Message], number: int, text: str) -> Span:
        """Where the answer `messages[number]` lies in `text`, told by rendering what comes before it.

        Raises:
            DatasetError: If the template renders a beginning in another way than the whole.
        """
        before = self._render(messages[:number], add_generation_prompt=True)[0]
        if not text.startswith(before):
            raise DatasetError(
                "The chat template renders the beginning of a conversation in another way than the whole, so its "
                "answers cannot be told; put {% generation %} ... {% endgeneration %} around answers in the template."
            )
        if self.end_of_turn is not None:
            end = text.find(self.end_of_turn, len(before))
            return len(before), end + len(self.end_of_turn) if end >= 0 else -1
        through = self._render(messages[: number + 1])[0]
        return len(before), len(through) if text.startswith(through) else -1

    def _close(self, text: str, span: Span) -> Span:
        """End the span with its end-of-turn token: not before it, and not after it."""
        start, end = span
        if end < 0:
            return span
        inside = list(self._special.finditer(text, start, end))
        if inside and not text[inside[-1].end() : end].strip():
            return start, inside[-1].end()
        behind = self._special.match(text, end)
        return start, behind.end() if behind else end

    def _render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        # Not `apply_chat_template(return_assistant_tokens_mask=True)`: where no token covers the last character of an
        # answer, its mask runs on to the end of the conversation (transformers 5.23).
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                return_assistant_tokens_mask=self.has_generation_blocks,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise BadRowError(f"the chat template refuses it: {error}") from error
        return texts[0], [tuple(span) for span in spans[0]] if self.has_generation_blocks else []

    def _tokenize(self, rendered: Sequence[tuple[str, list[Span]]]) -> list[Encoded | BadRowError]:
        """Tokens of each text; a text is cut at its spans, and the pieces must have the tokens of the whole."""
        wholes = self._ids([text for text, _ in rendered])
        pieces = [_cut(text, spans) for text, spans in rendered]
        ids_of_pieces = iter(self._ids([piece for row in pieces for piece in row]))
        encoded: list[Encoded | BadRowError] = []
        for (text, spans), whole, row in zip(rendered, wholes, pieces, strict=True):
            parts = [next(ids_of_pieces) for _ in row]
            if [token for part in parts for token in part] != whole:
                parts = self._parts_by_beginnings(text, spans, whole)
            if not parts:
                encoded.append(BadRowError("a token reaches across the border of an answer, as no prompt would end"))
                continue
            trained = [number % 2 == 1 for number, part in enumerate(parts) for _ in part]
            encoded.append(Encoded(whole, trained))
        return encoded

    def _parts_by_beginnings(self, text: str, spans: list[Span], whole: list[int]) -> list[list[int]]:
        """`whole` cut where the tokens of each beginning of `text` end; nothing if one is no beginning of `whole`.

        For tokenizers that put a mark at the start of every text, so that pieces differ from the whole.
        """
        borders = [border for span in spans for border in span if border < len(text)]
        ends = []
        for beginning in self._ids([text[:border] for border in borders]):
            if whole[: len(beginning)] != beginning:
                return []
            ends.append(len(beginning))
        return [whole[start:end] for start, end in zip([0, *ends], [*ends, len(whole)], strict=True)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _cut(text: str, spans: list[Span]) -> list[str]:
    """Pieces of `text`: before the first span, the span, between, ...; the last span ends the text."""
    borders = [border for span in spans for border in span]
    return [text[start:end] for start, end in zip([0, *borders], borders, strict=False)]
