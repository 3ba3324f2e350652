"""The models below a model and the licences around it, as their own cards on a Hub, or in a folder, declare them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..errors import ConfigError
from ..files.json_files import read_json
from .facts import FACTS_FILE, Ancestor, Facts
from .metadata import is_hub_id
from .readme import read_readme
from .training_run import without_folder

_MOST_ANCESTORS = 20
_UNREACHABLE = (OSError, httpx2.TransportError)  # the second is no OSError, and what a closed port gives
Say = Callable[[str], None]


def find_lineage(base: Ancestor, *, say: Say) -> tuple[Ancestor, ...]:
    """The base and everything below it, nearest first, each with the licence that its card declares.

    A base with a `model_card.json` of ours names its own bases with their commits; other cards name them without. What
    cannot be reached is told to `say` and left unknown.
    """
    found: list[Ancestor] = []
    waiting = [base]
    while waiting and len(found) < _MOST_ANCESTORS:
        each = waiting.pop(0)
        if any(each.name == earlier.name and each.revision == earlier.revision for earlier in found):
            continue
        card = _read_card(each, say=say)
        found.append(without_folder(replace(each, license=read_license(card))))
        known = _read_known_lineage(each, say=say) if card else ()
        if known:
            found += known
            break
        bases = card.get("base_model")
        names = [bases] if isinstance(bases, str) else bases if isinstance(bases, list) else []
        relation = str(card.get("base_model_relation") or "finetune")
        waiting += [Ancestor(name, relation) for name in names if isinstance(name, str) and is_hub_id(name)]
    return tuple(found)


def read_license(card: Mapping[str, Any]) -> str | None:
    """The licence in a front matter: its name where the id is `other`."""
    license_id, name = card.get("license"), card.get("license_name")
    chosen = name if license_id == "other" else license_id
    return chosen if isinstance(chosen, str) else None


def find_dataset_license(name: str, revision: str | None, *, say: Say) -> str | None:
    """What the card of a dataset on the Hub declares; None where it declares nothing or cannot be read."""
    try:
        data = HfApi().dataset_info(name, revision=revision).card_data
    except _UNREACHABLE as error:
        say(f"The licence of {name} is not known: {_first_line(error)}")
        return None
    return read_license(data.to_dict()) if data is not None else None


def _read_card(model: Ancestor, *, say: Say) -> dict[str, Any]:
    folder = Path(model.name).expanduser()
    try:
        if folder.is_dir():
            return read_readme(folder / "README.md").metadata
        if not is_hub_id(model.name):
            say(f"The card of {model.name} is not known: it is neither a folder nor the id of a repo.")
            return {}
        data = HfApi().model_info(model.name, revision=model.revision).card_data
    except (*_UNREACHABLE, ConfigError) as error:
        say(f"The card of {model.name} is not known: {_first_line(error)}")
        return {}
    return data.to_dict() if data is not None else {}


def _read_known_lineage(model: Ancestor, *, say: Say) -> tuple[Ancestor, ...]:
    folder = Path(model.name).expanduser()
    try:
        path = (
            folder / FACTS_FILE
            if folder.is_dir()
            else Path(hf_hub_download(model.name, FACTS_FILE, revision=model.revision))
        )
        if not path.is_file():
            return ()
        return Facts.from_dict(read_json(path, "the facts of a card"), where=str(path)).lineage
    except EntryNotFoundError:
        return ()
    except (*_UNREACHABLE, ConfigError) as error:
        say(f"What {model.name} was made from is not known: {_first_line(error)}")
        return ()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
