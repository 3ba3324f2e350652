"""What a repo says about itself: the YAML of its README, its config, its safetensors headers, and the tags of these."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import yaml

MAX_CARD_BYTES = 1 << 20
_MAX_YAML_CHARACTERS = 200_000
_MAX_DEPTH = 100
_MAX_DIMENSIONS = 16
_MAX_DTYPES = 100
_TOO_MANY = 1 << 63
_FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_ARXIV = re.compile(r"arxiv\.org/(?:abs|pdf)/([0-9]{4}\.[0-9]{4,5})")
_LISTS = ("tags", "datasets", "metrics", "language", "base_model")
_TEXTS = ("license", "library_name", "pipeline_tag", "license_name", "license_link")
_DATASET_TAGS = (
    *("task_categories", "task_ids", "size_categories", "language", "annotations_creators", "modality"),
    *("language_creators", "multilinguality", "source_datasets"),
)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # written in C where PyYAML was built with libyaml
_RELATIONS = {"adapter", "merge", "quantized", "finetune"}


@dataclass(frozen=True)
class Card:
    """A README's YAML as plain JSON values, and what is wrong with it."""

    data: dict[str, Any]
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    text: str = ""


def read_card(readme: str) -> Card:
    """The card in a README; one that cannot be read has no data and says why."""
    match = _FRONT_MATTER.search(readme)
    if not match:
        return Card({}, warnings=("empty or missing yaml metadata in repo card",), text=readme)
    text = readme[match.end() :]
    try:
        data = parse_yaml(match.group(1))
    except ValueError as error:
        return Card({}, errors=(f"Invalid YAML: {error}",), text=text)
    if data is None:
        return Card({}, warnings=("empty or missing yaml metadata in repo card",), text=text)
    if not isinstance(data, dict):
        return Card({}, errors=("The YAML of a repo card must be a mapping.",), text=text)
    return Card(data, errors=tuple(_find_errors(data)), text=text)


def find_tags(kind: str, card: Card, files: list[str], config: dict[str, Any]) -> list[str]:
    """The tags by which a repo is found, in the Hub's spelling (`license:mit`, `base_model:adapter:OWNER/NAME`)."""
    data = card.data
    tags = [
        tag for tag in words_of(data, "tags") if not tag.startswith("benchmark:")
    ]  # that is not the author's to say
    if kind == "model":
        tags += words_of(data, "library_name") + words_of(data, "pipeline_tag") + words_of(data, "language")
        tags += [f"dataset:{name}" for name in words_of(data, "datasets")]
        tags += _lineage_tags(data)
        tags += [config["model_type"]] if isinstance(config.get("model_type"), str) else []
        tags += ["custom_code"] if "auto_map" in config else []
        tags += ["safetensors"] if any(name.endswith(".safetensors") for name in files) else []
    elif kind == "space":
        tags += [f"{key[:-1]}:{name}" for key in ("datasets", "models") for name in words_of(data, key)]
    else:
        tags += [f"{key}:{word}" for key in _DATASET_TAGS for word in words_of(data, key)]
    tags += [f"arxiv:{paper}" for paper in _ARXIV.findall(card.text)]
    tags += [f"license:{word.lower()}" for word in words_of(data, "license")]
    return list(dict.fromkeys([*tags, "region:us"]))


def words_of(data: dict[str, Any], name: str) -> list[str]:
    """The text or texts that a card has under a key; a card may hold anything."""
    value = data.get(name)
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str) and item]


def find_bases(card: Card) -> tuple[str | None, list[str]]:
    """How a model relates to its bases (`adapter`, `merge`, ...; None without one) and their names."""
    bases = words_of(card.data, "base_model")
    relation = card.data.get("base_model_relation")
    if not bases:
        return None, []
    if relation in _RELATIONS:
        return str(relation), bases
    if len(bases) > 1:
        return "merge", bases
    is_adapter = card.data.get("library_name") == "peft" or {"lora", "adapter"} & set(words_of(card.data, "tags"))
    return "adapter" if is_adapter else "finetune", bases


def count_parameters(headers: Iterable[bytes]) -> dict[str, Any] | None:
    """`{"parameters": {dtype: count}, "total"}` over the headers of safetensors files; None if one is malformed.

    Of the headers only the one being counted is held.
    """
    counts: dict[str, int] = {}
    for header in headers:
        try:
            tensors = json.loads(header)
            for name, tensor in tensors.items():
                if name != "__metadata__":
                    dtype = str(tensor["dtype"])[:16]
                    counts[dtype] = counts.get(dtype, 0) + math.prod(read_shape(tensor["shape"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        if len(counts) > _MAX_DTYPES or sum(counts.values()) >= _TOO_MANY:
            return None
    return {"parameters": counts, "total": sum(counts.values())} if counts else None


def read_shape(value: object) -> tuple[int, ...]:
    """The shape of a tensor whose size is a number of 63 bits; ValueError for anything else."""
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        raise ValueError(f"a shape is a list of at most {_MAX_DIMENSIONS} lengths")
    if not all(type(length) is int and 0 <= length < _TOO_MANY for length in value) or math.prod(value) >= _TOO_MANY:
        raise ValueError("a shape has lengths whose product is less than 2 to the power of 63")
    return tuple(value)


def parse_object(content: bytes) -> dict[str, Any]:
    """A JSON object, empty if `content` is something else."""
    try:
        return read_object(content)
    except ValueError:
        return {}


def read_object(content: bytes) -> dict[str, Any]:
    """A JSON object that can be sent again; ValueError if `content` is something else, or nested too deeply."""
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return {_to_text(key): _to_json(inner) for key, inner in found.items()}


def weigh(value: Any) -> int:
    """About how many bytes of memory a JSON value takes."""
    weight, rest = 0, [value]
    while rest:
        one = rest.pop()
        weight += 64 + (len(one) if isinstance(one, str) else 0)
        if isinstance(one, dict):
            rest += [*one, *one.values()]
        elif isinstance(one, list):
            rest += one
    return weight


def parse_yaml(text: str) -> Any:
    """A YAML text as JSON values; ValueError with one sentence if it is malformed.

    Aliases are refused: a few hundred bytes of them can stand for gigabytes. So is what is nested deeply or long, for
    which a parser takes minutes; cards with the results of a hundred benchmarks have 130,000 characters.
    """
    if len(text) > _MAX_YAML_CHARACTERS:
        raise ValueError(f"it has more than {_MAX_YAML_CHARACTERS} characters")
    try:
        _check_events(text)
        return _to_json(yaml.load(text, Loader=_LOADER))
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError):  # from PyYAML, as for `!!bool "x"`
        raise ValueError("a value is not of the type that its tag says") from None


def _check_events(text: str) -> None:
    """Stops the parser, which reads little ahead, before the depth of a text costs anything."""
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("aliases are not allowed")


def _to_json(value: Any, depth: int = 0) -> Any:
    """A value that JSON can carry: dates as text, text keys, no NaN, and no deeper than a JSON encoder can follow."""
    if depth > _MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict):
        return {_to_text(key): _to_json(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_to_json(inner, depth + 1) for inner in value]
    if value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return _to_text(value)


def _to_text(value: object) -> str:
    text = value.isoformat() if isinstance(value, date) else str(value)
    return text.encode("utf-8", "replace").decode()


def _find_errors(data: dict[str, Any]) -> Iterator[str]:
    for name in _LISTS:
        value = data.get(name)
        if value is not None and not (
            isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
        ):
            yield f'"{name}" must be a string or an array of strings'
    for name in _TEXTS:
        value = data.get(name)
        if value is not None and not isinstance(value, str) and not (name == "license" and isinstance(value, list)):
            yield f'"{name}" must be a string'
    if data.get("model-index") is not None and not isinstance(data["model-index"], list):
        yield '"model-index" must be an array'


def _lineage_tags(data: dict[str, Any]) -> list[str]:
    relation, bases = find_bases(Card(data))
    return [tag for base in bases for tag in (f"base_model:{base}", f"base_model:{relation}:{base}")]
