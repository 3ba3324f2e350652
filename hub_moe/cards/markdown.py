"""Facts as Markdown: whatever comes from somebody's files can say nothing but its letters."""

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from ..energy.report import describe_joules
from ..errors import ConfigError

_SPECIAL = re.compile(r"([\\`*_\[\]<>|&~$])")
_ADDRESS = re.compile(r"(://|www\.|@)", re.IGNORECASE)
_UNITS_OF_COUNTS = ("", " K", " M", " B", " T")
_UNITS_OF_FLOPS = (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP", " ZFLOP", " YFLOP")


class Markdown(str):
    """Text that is Markdown already; all other text is escaped when it is written into a template."""


def escape(value: Any) -> Markdown:
    """Text that shows as it is: one line, no markup, no links.

    Raises:
        TypeError: If there is nothing to write.
    """
    if isinstance(value, Markdown):
        return value
    if value is None:
        raise TypeError("A template writes a fact that is not known.")
    text = _SPECIAL.sub(r"\\\1", one_line(str(value)))
    return Markdown(_ADDRESS.sub(lambda found: "".join(f"&#{ord(letter)};" for letter in found.group()), text))


def one_line(text: str) -> Markdown:
    """Without line breaks and control characters, among them those that turn the direction of writing."""
    plain = "".join(" " if letter.isspace() else letter for letter in text)
    return Markdown("".join(letter for letter in plain if unicodedata.category(letter) not in ("Cc", "Cf")))


def code(text: Any) -> Markdown:
    """A code span, in a table too; letters that would end it are written by their numbers."""
    plain = one_line(str(text)).strip() or " "
    if "`" not in plain and "|" not in plain:
        return Markdown(f"`{plain}`")
    letters = (letter if letter.isalnum() or letter in " -./" else f"&#{ord(letter)};" for letter in plain)
    return Markdown(f"<code>{''.join(letters)}</code>")


def scale(number: float, units: tuple[str, ...]) -> Markdown:
    """A number in three or four digits with its unit: `671.0 B`."""
    place = 0
    while number >= 999.95 and place < len(units) - 1:
        number, place = number / 1000, place + 1
    digits = 0 if not place else 2 if number < 9.995 else 1
    return Markdown(f"{number:.{digits}f}{units[place]}")


def describe_duration(seconds: float) -> Markdown:
    """`1 h 02 min`, `3 min 05 s`, `12.3 s`."""
    if seconds < 60:
        return Markdown(f"{seconds:.1f} s")
    minutes, rest = divmod(round(seconds), 60)
    return Markdown(f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min")


def describe_execution(execution: Mapping[str, Any]) -> Markdown:
    """How a model was run, in a line."""
    names = {
        "dtype": "",
        "experts": "experts ",
        "attention": "attention ",
        "batch_size": "batch size ",
        "device": "on ",
    }
    parts = [f"{word}{code(execution[name])}" for name, word in names.items() if name in execution]
    parts += [f"chat template {code(execution['chat_template'][:12])}"] if "chat_template" in execution else []
    return Markdown(", ".join(parts))


def find_template(name: str) -> Path:
    """A template: beside the installed code, or in `model_cards/templates` of a checkout.

    Raises:
        ConfigError: If the installation lacks it.
    """
    here = Path(__file__)
    for folder in (here.parent / "templates", here.parents[2] / "model_cards" / "templates"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"The template {name} is missing from this installation of hub_moe; install it again.")


def fill_template(name: str, values: Mapping[str, Any]) -> str:
    """The text of a template, runs of blank lines made one."""
    environment = jinja2.Environment(
        finalize=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # HTML's; `escape` is Markdown's
    )
    environment.filters |= _FILTERS
    text = environment.from_string(find_template(name).read_text("utf-8")).render(values)
    return re.sub(r"\n{3,}", "\n\n", text)


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _sum_lengths(values: Iterable[Collection[Any]]) -> int:
    return sum(len(value) for value in values)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


_FILTERS: dict[str, Any] = {
    "address": lambda path: Markdown(re.sub(r"[^\w./-]", "", str(path))),
    "code": code,
    "count": lambda number: scale(number, _UNITS_OF_COUNTS),
    "describe_execution": describe_execution,
    "duration": describe_duration,
    "energy": lambda joules: Markdown(describe_joules(joules)),
    "figure": lambda number: Markdown(f"{number:.4f}"),
    "flops": lambda number: scale(number, _UNITS_OF_FLOPS),
    "marked": lambda text: Markdown(f"**[{text}]**"),
    "number": lambda number: Markdown(f"{number:,}"),
    "one_line": one_line,
    "ratio": lambda number: Markdown(f"{number:.2f}"),
    "sentence": _sentence,
    "setting": _setting,
    "short": lambda text: text[:12],
    "signed": lambda number: Markdown(f"{number:+.4f}"),
    "small": lambda number: Markdown(f"{number:.2g}"),
    "sum_lengths": _sum_lengths,
    "whole": lambda number: Markdown(f"{number:.0f}"),
    "words": lambda text: str(text).replace("_", " "),
}
