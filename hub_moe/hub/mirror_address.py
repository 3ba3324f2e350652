"""Which repo, or which owner's repos, at which Hub; with what token; and how its refusals are told."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ..errors import ConfigError, HubError

KINDS = ("model", "dataset", "space")
_ADDRESS = re.compile(r"(https?://[^/?#@\s]+)/(?:(models|datasets|spaces)/)?([\w.-]+)(?:/([\w.-]+?)(?:\.git)?)?/?")


@dataclass(frozen=True)
class RepoAddress:
    """A repo at a Hub."""

    endpoint: str
    kind: str
    owner: str
    name: str

    @property
    def repo_id(self) -> str:
        """`OWNER/NAME`."""
        return f"{self.owner}/{self.name}"

    @property
    def path(self) -> str:
        """Where the repo is below its endpoint."""
        return f"/{'' if self.kind == 'model' else f'{self.kind}s/'}{self.repo_id}"

    def __str__(self) -> str:
        return self.endpoint + self.path

    def is_same(self, other: "RepoAddress") -> bool:
        """Whether both name one repo: a Hub takes names in any case."""
        return str(self).casefold() == str(other).casefold()


@dataclass(frozen=True)
class Address:
    """What a person types: a repo, or (`name` None) every repo of an owner, of one kind or (`kind` None) of several."""

    endpoint: str
    kind: str | None
    owner: str
    name: str | None

    @staticmethod
    def parse(text: str) -> "Address":
        """The address that a text means; ConfigError if it means none."""
        match = _ADDRESS.fullmatch(text)
        if not match:
            raise ConfigError(
                f"{text!r} is no address: expected ENDPOINT/[datasets/|spaces/]OWNER/NAME or ENDPOINT/OWNER, "
                "such as https://huggingface.co/OWNER/NAME; a token never stands in an address."
            )
        endpoint, plural, owner, name = match.groups()
        kind = plural.removesuffix("s") if plural else "model" if name else None
        return Address(endpoint, kind, owner, name)


@dataclass(frozen=True)
class Side:
    """One of the two Hubs, as the holder of a token sees it."""

    endpoint: str
    token: str | None

    @staticmethod
    def open(endpoint: str, token_variable: str | None) -> "Side":
        """The Hub at `endpoint`, with the token in an environment variable.

        Without one, the token of this machine (HF_TOKEN, `hf auth login`) goes to HF_ENDPOINT and to no other Hub.
        """
        if token_variable is None:
            return Side(endpoint, get_token() if endpoint == constants.ENDPOINT else None)
        token = os.environ.get(token_variable, "").strip()
        if not token:
            raise ConfigError(f"The environment variable {token_variable} holds no token.")
        return Side(endpoint, token)

    @cached_property
    def api(self) -> HfApi:
        """The client of this Hub."""
        return HfApi(endpoint=self.endpoint, token=self.token or False)


def pair_repos(source: Address, target: Address, side: Side) -> list[tuple[RepoAddress, RepoAddress]]:
    """Each repo to copy and where to; ConfigError if the two addresses do not fit together."""
    if (source.name is None) != (target.name is None):
        raise ConfigError("SRC and DST must both name a repo, or both an owner.")
    if target.kind not in {None, source.kind} and not (source.kind is None and target.name is None):
        raise ConfigError(f"SRC is a {source.kind} and DST a {target.kind}; they must be of one kind.")
    if source.name is not None and target.name is not None:
        assert source.kind is not None
        names = [(source.kind, source.owner, source.name, target.name)]
    else:
        kind_named = source.kind or target.kind
        wanted = (kind_named,) if kind_named else KINDS
        names = [(kind, owner, name, name) for kind in wanted for owner, name in _list_repos(side, source.owner, kind)]
    pairs = [
        (RepoAddress(source.endpoint, kind, owner, name), RepoAddress(target.endpoint, kind, target.owner, new_name))
        for kind, owner, name, new_name in names
    ]
    if any(one.is_same(other) for one, other in pairs):
        raise ConfigError("SRC and DST are the same.")
    return pairs


def _list_repos(side: Side, owner: str, kind: str) -> list[tuple[str, str]]:
    lists: dict[str, Callable[..., Iterable[Any]]] = {
        "model": side.api.list_models,
        "dataset": side.api.list_datasets,
        "space": side.api.list_spaces,
    }
    with in_one_sentence(f"{side.endpoint}/{owner}"):
        found = sorted(repo.id for repo in lists[kind](author=owner))
    return [(repo_owner, name) for repo_owner, slash, name in (one.partition("/") for one in found) if slash]


@contextmanager
def in_one_sentence(place: object) -> Iterator[None]:
    """What the client of the Hub raises, as a HubError that names the repo or owner."""
    try:
        yield
    except RepositoryNotFoundError as error:
        raise HubError(f"{place} does not exist, or needs another token.") from error
    except HfHubHTTPError as error:
        reason = error.server_message or str(error).strip().splitlines()[0]
        raise HubError(f"{place}: {reason}") from error
    except httpx2.TransportError as error:
        raise HubError(f"{place} cannot be reached or broke off: {error}.") from error
