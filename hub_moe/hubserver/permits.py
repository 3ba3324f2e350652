"""Links and tokens that act for who asked for them, in one repo: they end with that person's token or rights."""

from typing import Any

from .calls import Call
from .signing import DEFAULT_LIFE_S, sign
from .store import Identity, Repo, Store


def sign_for(call: Call, purpose: str, repo: Repo, fields: dict[str, Any], *, life_s: float = DEFAULT_LIFE_S) -> str:
    """Like `sign`, with the repo and the caller's token, if they gave one, among the fields."""
    by = call.who.token_id if call.who else ""
    return sign(call.store.secret, purpose, {"repo": repo.uid, "by": by, **fields}, life_s=life_s)


def repo_to_read(store: Store, fields: dict[str, Any]) -> Repo:
    """The repo of a link, if who asked for the link may read it still."""
    return store.repos.find_to_read(store.repos.name_of(fields.get("repo", "")), _identify(store, fields))


def repo_to_contribute(store: Store, fields: dict[str, Any]) -> Repo:
    """The repo of a link, if who asked for the link may propose changes to it still."""
    return store.repos.find_to_contribute(store.repos.name_of(fields.get("repo", "")), _identify(store, fields))


def _identify(store: Store, fields: dict[str, Any]) -> Identity | None:
    return store.accounts.identify_by_id(fields["by"]) if fields.get("by") else None
