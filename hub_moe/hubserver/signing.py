"""Links that carry their own permission: signed, expiring, good for one purpose."""

import base64
import binascii
import hashlib
import hmac
import json
import time
from typing import Any

from .store.errors import ForbiddenError

DEFAULT_LIFE_S = 24 * 3600


def sign(secret: bytes, purpose: str, fields: dict[str, Any], *, life_s: float = DEFAULT_LIFE_S) -> str:
    """A URL-safe token that says `fields` and expires after `life_s` seconds."""
    payload = json.dumps({"for": purpose, "until": time.time() + life_s, **fields}, separators=(",", ":")).encode()
    return f"{_encode(payload)}.{_encode(_mac(secret, payload))}"


def read_signed(secret: bytes, purpose: str, token: str) -> dict[str, Any]:
    """The fields of a token made by `sign` for this purpose; ForbiddenError if it is forged, for another or expired."""
    first, _, second = token.partition(".")
    try:
        payload, mac = _decode(first), _decode(second)
    except (binascii.Error, ValueError):
        raise ForbiddenError("This link is damaged.") from None
    if not hmac.compare_digest(mac, _mac(secret, payload)):
        raise ForbiddenError("This link was not made by this server.")
    fields: dict[str, Any] = json.loads(payload)
    if fields["for"] != purpose:
        raise ForbiddenError(f"This link is not for {purpose}.")
    if fields["until"] < time.time():
        raise ForbiddenError("This link has expired; ask for a new one.")
    return fields


def _mac(secret: bytes, payload: bytes) -> bytes:
    return hmac.new(secret, payload, hashlib.sha256).digest()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
