"""Xorbs and shards made by hand, as hf_xet makes them, and false in any way a test wants; and a client for them."""

import hashlib
import json
import struct
from dataclasses import dataclass, field, replace

import lz4.frame

from hub_moe.hubserver.store.shards import Term
from hub_moe.hubserver.store.xet_hashes import format_hash, hash_chunk, hash_file, hash_term, hash_xorb, parse_hash

from .client_over_http import Client

TAG = b"HFRepoMetaData\0\x55\x69\x67\x45\x6a\x7b\x81\x57\x83\xa5\xbd\xd9\x5c\xcd\xd1\x4a\xa9"
BOOKEND = b"\xff" * 32 + bytes(16)


@dataclass
class Xorb:
    """Some chunks, each packed by the scheme at its place in `schemes`."""

    chunks: list
    schemes: tuple = (0, 1, 2)

    @property
    def name(self):
        return format_hash(hash_xorb((hash_chunk(chunk), len(chunk)) for chunk in self.chunks))

    @property
    def body(self):
        return b"".join(
            pack_chunk(chunk, self.schemes[place % len(self.schemes)]) for place, chunk in enumerate(self.chunks)
        )

    def term(self, first=0, end=None):
        end = len(self.chunks) if end is None else end
        return Term(self.name, sum(map(len, self.chunks[first:end])), first, end)


@dataclass
class File:
    """A file of a shard: runs `(xorb, first, end)`, and what the client claims of it (None: the truth)."""

    runs: list
    sha256: str | None = None
    name: str | None = None
    proofs: list | None = None
    terms: list | None = None
    flags: int = 0b11 << 30
    count: int | None = None
    chunks: list = field(init=False)

    def __post_init__(self):
        self.chunks = [chunk for xorb, first, end in self.runs for chunk in xorb.chunks[first:end]]

    @property
    def content(self):
        return b"".join(self.chunks)

    @property
    def true_name(self):
        return format_hash(hash_file((hash_chunk(chunk), len(chunk)) for chunk in self.chunks))

    def but(self, **changes):
        return replace(self, **changes)

    def pack(self):
        terms = self.terms or [xorb.term(first, end) for xorb, first, end in self.runs]
        proofs = self.proofs or [
            hash_term(b"".join(map(hash_chunk, xorb.chunks[first:end]))) for xorb, first, end in self.runs
        ]
        sha256 = self.sha256 or hashlib.sha256(self.content).hexdigest()
        count = len(terms) if self.count is None else self.count
        records = [parse_hash(self.name or self.true_name) + struct.pack("<II8x", self.flags, count)]
        records += [parse_hash(t.xorb) + struct.pack("<IIII", 0, t.size_bytes, t.first, t.end) for t in terms]
        records += [proof + bytes(16) for proof in proofs]
        return b"".join([*records, parse_hash(sha256) + bytes(16)])


def pack_shard(*files, version=2):
    return b"".join([TAG, struct.pack("<QQ", version, 0), *(file.pack() for file in files), BOOKEND, BOOKEND])


def pack_chunk(chunk, scheme):
    data = chunk if scheme == 0 else lz4.frame.compress(chunk if scheme == 1 else group(chunk), store_size=False)
    return struct.pack("<I", len(data) << 8) + bytes([scheme]) + len(chunk).to_bytes(3, "little") + data


def group(chunk):
    return b"".join(chunk[place::4] for place in range(4))


class XetClient(Client):
    """A client that speaks Xet by hand."""

    def token(self, kind, repo, status=200):
        answer = self.send("GET", f"/api/models/{repo}/xet-{kind}-token/main")
        assert answer.status_code == status, answer.text
        return answer.json().get("accessToken")

    def cas(self, method, path, token, **options):
        options.setdefault("headers", {})["authorization"] = f"Bearer {token}"
        return self.client.request(method, f"{self.hub.url}/xet/0{path}", **options)

    def add(self, repo, *files):
        """Send every xorb of some files, then the shard; the answer to that."""
        token = self.token("write", repo)
        for xorb in {id(run[0]): run[0] for file in files for run in file.runs}.values():
            self.cas("POST", f"/v1/xorbs/default/{xorb.name}", token, content=xorb.body).raise_for_status()
        return self.cas("POST", "/v1/shards", token, content=pack_shard(*files))

    def commit_large(self, name, path, sha256):
        lines = [{"key": "header", "value": {"summary": "m"}}]
        lines.append({"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": sha256}})
        return self.commit_body(name, "\n".join(map(json.dumps, lines)).encode())

    def commit_by_xet(self, name, path, content):
        """Send a content in chunks of 50,000 bytes, the last half of them in a xorb of its own, and commit it."""
        chunks = [content[start : start + 50_000] for start in range(0, len(content), 50_000)]
        middle = (len(chunks) + 1) // 2
        xorbs = [Xorb(some) for some in (chunks[:middle], chunks[middle:]) if some]
        file = File([(xorb, 0, len(xorb.chunks)) for xorb in xorbs])
        self.add(f"{self.user}/{name}", file).raise_for_status()
        return self.commit_large(name, path, hashlib.sha256(content).hexdigest())
