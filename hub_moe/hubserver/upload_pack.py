"""What a git client that clones or fetches says and hears (gitprotocol-pack, gitprotocol-v2), on one request."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import IO

from .. import __version__
from .pktlines import DELIMITER, FLUSH, decode, in_band, pkt, read_pkt, read_words
from .store.errors import InvalidInputError, StoreError
from .store.fetches import Boundary, Depth, Fetch, list_tips, stream_pack
from .store.git import GitRepo
from .store.names import is_commit_id

AGENT = f"agent=hub_moe/{__version__}"
_HEAD = "refs/heads/main"
_CAPABILITIES = (
    "multi_ack_detailed no-done side-band side-band-64k thin-pack shallow deepen-since deepen-not "
    f"deepen-relative no-progress include-tag ofs-delta allow-tip-sha1-in-want allow-reachable-sha1-in-want "
    f"object-format=sha1 symref=HEAD:{_HEAD} {AGENT}"
)
_MAX_WANTS, _MAX_HAVES = 100_000, 200_000
_MAX_FLUSHES = 1000

Opener = Callable[[], AbstractContextManager[GitRepo]]


@dataclass
class _Request:
    """What a client wants and has."""

    wants: list[str] = field(default_factory=list)
    haves: list[str] = field(default_factory=list)
    words: set[str] = field(default_factory=set)
    """Capabilities, and arguments without a value."""
    depth: Depth = field(default_factory=Depth)


def advertise(git: GitRepo, version: int) -> Iterator[bytes]:
    """The answer to `info/refs?service=git-upload-pack`."""
    if version == 2:
        yield pkt("version 2") + pkt(AGENT) + pkt("ls-refs") + pkt("fetch=shallow") + pkt("object-format=sha1") + FLUSH
        return
    yield pkt("# service=git-upload-pack") + FLUSH + (pkt("version 1") if version == 1 else b"")
    yield from list_refs(git, _CAPABILITIES, with_head=True)


def list_refs(git: GitRepo, capabilities: str, *, with_head: bool) -> Iterator[bytes]:
    """Every ref as protocol 0 lists them; the first line carries what this server can do."""
    tips = list_tips(git)
    heads = [("HEAD", oid, None) for name, oid, _ in tips if name == _HEAD and with_head]
    extra = f"\0{capabilities}"
    for name, oid, peeled in [*heads, *tips] or [("capabilities^{}", "0" * 40, None)]:
        yield pkt(f"{oid} {name}{extra}")
        extra = ""
        if peeled and with_head:
            yield pkt(f"{peeled} {name}^{{}}")
    yield FLUSH


def answer(open_git: Opener, body: IO[bytes], version: int) -> Iterator[bytes]:
    """The answer to a POST to git-upload-pack, piece by piece; what is wrong with the request stands in it."""
    with open_git() as git:
        try:
            yield from _answer_2(git, body) if version == 2 else _answer_0(git, body)
        except StoreError as error:
            yield pkt(f"ERR {error}")


def _answer_2(git: GitRepo, body: IO[bytes]) -> Iterator[bytes]:
    command = ""
    while (line := read_pkt(body)) not in {None, FLUSH, DELIMITER}:
        assert line is not None
        command = decode(line).removeprefix("command=") if line.startswith(b"command=") else command
    if command == "ls-refs":
        yield from _answer_ls_refs(git, set(read_words(body)) if line == DELIMITER else set())
    elif command == "fetch":
        yield from _answer_fetch(git, _read_request(read_words(body) if line == DELIMITER else iter(())))
    else:
        raise InvalidInputError(f"This server does not know the command {command[:40]!r}.")


def _answer_ls_refs(git: GitRepo, words: set[str]) -> Iterator[bytes]:
    prefixes = tuple(word.removeprefix("ref-prefix ") for word in words if word.startswith("ref-prefix "))
    tips = list_tips(git)
    heads = [("HEAD", oid, None) for name, oid, _ in tips if name == _HEAD]
    for name, oid, peeled in [*heads, *tips]:
        if not prefixes or name.startswith(prefixes):
            target = f" symref-target:{_HEAD}" if name == "HEAD" and "symrefs" in words else ""
            yield pkt(f"{oid} {name}{target}" + (f" peeled:{peeled}" if peeled and "peel" in words else ""))
    yield FLUSH


def _answer_fetch(git: GitRepo, request: _Request) -> Iterator[bytes]:
    if not request.wants:
        yield FLUSH
        return
    fetch = Fetch(git, request.wants)
    common = fetch.find_common(request.haves)
    if "done" not in request.words and request.haves:
        yield pkt("acknowledgments") + (b"".join(pkt(f"ACK {oid}") for oid in common) or pkt("NAK"))
        if "wait-for-done" in request.words or not common or not fetch.is_ready(set(common), request.depth.has):
            yield FLUSH
            return
        yield pkt("ready") + DELIMITER
    boundary = fetch.find_boundary(request.depth)
    if request.depth.is_limited:
        yield pkt("shallow-info") + _format_boundary(boundary) + DELIMITER
    yield pkt("packfile")
    yield from in_band(1, _pack(git, fetch, common, request, boundary))
    yield FLUSH


def _answer_0(git: GitRepo, body: IO[bytes]) -> Iterator[bytes]:
    request = _read_request(read_words(body))
    if not request.wants:
        return
    fetch = Fetch(git, request.wants)
    boundary = fetch.find_boundary(request.depth)
    if request.depth.is_limited:
        yield _format_boundary(boundary) + FLUSH
    negotiation = _Negotiation(fetch, request)
    yield from negotiation.answer(body)
    if negotiation.is_over:
        pack = _pack(git, fetch, negotiation.common, request, boundary)
        is_banded = "side-band-64k" in request.words
        yield from chain(in_band(1, pack), [FLUSH]) if is_banded else pack


class _Negotiation:
    """Protocol 0: each line about what the client has is answered at once, in one of two dialects."""

    def __init__(self, fetch: Fetch, request: _Request) -> None:
        self._fetch = fetch
        self._has = request.depth.has
        self._is_detailed = "multi_ack_detailed" in request.words
        self._needs_no_done = "no-done" in request.words
        self._flushes = 0
        self._is_ready = False
        self.common: list[str] = []
        self.is_over = False
        """Whether the client waits for the pack now."""

    def answer(self, body: IO[bytes]) -> Iterator[bytes]:
        """The answers to the rest of a request."""
        while not self.is_over and (line := read_pkt(body)) is not None:
            word = decode(line)
            if line == FLUSH:
                yield self._answer_flush()
            elif word == "done":
                self.is_over = True
                is_silent = self.common and not self._is_detailed
                yield b"" if is_silent else pkt(f"ACK {self.common[-1]}") if self.common else pkt("NAK")
            elif word.startswith("have "):
                yield self._answer_have(_read_oid(word))

    def _answer_have(self, oid: str) -> bytes:
        found = self._fetch.find_common([oid])
        is_first = not self.common
        self.common += found
        if len(self.common) > _MAX_HAVES:
            raise InvalidInputError(f"A fetch names at most {_MAX_HAVES} commits.")
        if not found or not (self._is_detailed or is_first):
            return b""
        return pkt(f"ACK {oid} common" if self._is_detailed else f"ACK {oid}")

    def _answer_flush(self) -> bytes:
        self._flushes += 1
        if self._flushes > _MAX_FLUSHES:
            raise InvalidInputError(f"A fetch asks at most {_MAX_FLUSHES} times in one request.")
        can_be_ready = self._is_detailed and self.common and not self._is_ready
        is_ready = self._is_ready = self._is_ready or bool(
            can_be_ready and self._fetch.is_ready(set(self.common), self._has)
        )
        lines = [f"ACK {self.common[-1]} ready"] if is_ready else []
        lines += ["NAK"] if self._is_detailed or not self.common else []
        if is_ready and self._needs_no_done:
            self.is_over = True
            lines.append(f"ACK {self.common[-1]}")
        return b"".join(pkt(line) for line in lines)


def _pack(git: GitRepo, fetch: Fetch, common: list[str], request: _Request, boundary: Boundary) -> Iterator[bytes]:
    oids = fetch.find_objects(set(common), request.depth, boundary)
    if "include-tag" in request.words:
        oids += fetch.find_tags(oids)
    yield from stream_pack(git, oids)


def _format_boundary(boundary: Boundary) -> bytes:
    lines = [f"shallow {oid}" for oid in sorted(boundary.shallow)]
    lines += [f"unshallow {oid}" for oid in sorted(boundary.unshallow)]
    return b"".join(pkt(line) for line in lines)


def _read_request(lines: Iterator[str]) -> _Request:
    request = _Request()
    for line in lines:
        word, _, value = line.partition(" ")
        if word == "want":
            if not request.wants:  # protocol 0 puts its capabilities behind the first
                request.words |= set(value[40:].split())
            request.wants.append(_read_oid(line))
        elif word == "have":
            request.haves.append(_read_oid(line))
        elif word == "shallow":
            request.depth.has.add(_read_oid(line))
        elif word == "deepen":
            request.depth.commits = min(_number(value), 1 << 31)
        elif word == "deepen-since":
            request.depth.since_s = _number(value)
        elif word == "deepen-not":
            request.depth.without.append(value)
        else:
            request.words.add(word)
        if len(request.wants) > _MAX_WANTS or len(request.haves) > _MAX_HAVES:
            raise InvalidInputError("This fetch names too many commits.")
    request.depth.is_relative = "deepen-relative" in request.words
    return request


def _read_oid(line: str) -> str:
    oid = line.partition(" ")[2][:40]
    if not is_commit_id(oid):
        raise InvalidInputError(f"{line[:60]!r} names no object.")
    return oid


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18 or (number := int(text)) == 0:
        raise InvalidInputError(f"{text[:40]!r} is not a number above zero.")
    return number
