"""Links that carry their own permission: signed, expiring, good for one purpose."""

import base64
import hashlib
import hmac
import json
import time
from typing import Any

from .store.errors import ForbiddenError

DEFAULT_LIFE_S = 24 * 3600


class LinkExpiredError(ForbiddenError):
    """A link or token that was good once."""


def sign(secret: bytes, purpose: str, fields: dict[str, Any], *, life_s: float = DEFAULT_LIFE_S) -> str:
    """A URL-safe token that says `fields` and expires after `life_s` seconds."""
    payload = json.dumps({"for": purpose, "until": time.time() + life_s, **fields}, separators=(",", ":")).encode()
    text = base64.urlsafe_b64encode(payload).decode()
    return f"{text}.{_mac(secret, text)}"


def read_signed(secret: bytes, purpose: str, token: str) -> dict[str, Any]:
    """The fields of a token made by `sign` for this purpose; ForbiddenError if it is forged, for another or expired."""
    text, _, mac = token.partition(".")
    if not token.isascii() or not hmac.compare_digest(mac, _mac(secret, text)):
        raise ForbiddenError("This link was not made by this server.")
    fields: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text))
    if fields["for"] != purpose:
        raise ForbiddenError(f"This link is not for {purpose}.")
    if fields["until"] < time.time():
        raise LinkExpiredError("This link has expired; ask for a new one.")
    return fields


def _mac(secret: bytes, text: str) -> str:
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()
