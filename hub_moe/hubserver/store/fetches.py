"""What a git client that fetches has to get: which commits, down to where, and the pack of their objects."""

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dulwich.objects import Commit, ShaFile, Tag, parse_tree

from .errors import InvalidInputError
from .git import FOLDER_MODE, GitRepo
from .packs import COMMIT, TAG, object_header, pack_header

_CHUNK_BYTES = 1 << 18


@dataclass
class Depth:
    """How far back a shallow client wants to go. Commits in `has` are the oldest that it has."""

    commits: int | None = None
    is_relative: bool = False
    since_s: int | None = None
    without: list[str] = field(default_factory=list)
    has: set[str] = field(default_factory=set)

    @property
    def is_limited(self) -> bool:
        """Whether the client asks for a new limit."""
        return self.commits is not None or self.since_s is not None or bool(self.without)


@dataclass(frozen=True)
class Boundary:
    """Where a shallow history ends: what becomes an end, and what is none any more."""

    shallow: set[str]
    unshallow: set[str]
    ends: set[str]


@dataclass(frozen=True, slots=True)
class _Commit:
    tree: str
    parents: tuple[str, ...]
    date_s: int


class Fetch:
    """One client's fetch from one repository."""

    def __init__(self, git: GitRepo, wants: list[str]) -> None:
        self._git = git
        self._wants = wants
        self._commits: dict[str, _Commit] = {}
        self.tags = [want for want in wants if self._type(want) == TAG]
        self.heads = [git.resolve(want) for want in wants]
        self._require_reachable()

    def _require_reachable(self) -> None:
        """A commit that no ref leads to is nobody's to fetch."""
        tips = {oid for _, *oids in list_tips(self._git) for oid in oids if oid}
        missing = set(self._wants) - tips
        if missing:
            missing -= self.ancestors(tips, stop=set(), until=missing)
        if missing:
            raise InvalidInputError(f"upload-pack: not our ref {missing.pop()}")

    def find_common(self, haves: Iterable[str]) -> list[str]:
        """The commits of the client that are here too."""
        return [oid for oid in haves if oid in self._git.objects and self._type(oid) == COMMIT]

    def is_ready(self, common: set[str], has: set[str]) -> bool:
        """Whether every wanted commit is one of `common` or descends from one: the client need not name more."""
        return all(head in common or common & self.ancestors([head], stop=has, until=common) for head in self.heads)

    def find_boundary(self, depth: Depth) -> Boundary:
        """Where the client's history will end."""
        if not depth.is_limited:
            return Boundary(set(), set(), depth.has)
        if depth.commits is not None:
            starts = [oid for oid in depth.has if oid in self._git.objects] if depth.is_relative else self.heads
            inner, ends = self._count_down(starts, depth.commits + depth.is_relative)
        else:
            inner, ends = self._cut_off(depth)
        return Boundary(ends - depth.has, depth.has & inner, ends)

    def find_objects(self, common: set[str], depth: Depth, boundary: Boundary) -> list[bytes]:
        """The ids of the objects to send: commits first, then what they hold and the client has not."""
        if not depth.has and not boundary.ends:
            commits = [entry.oid for entry in self._git.log_many(self.heads, without=sorted(common))]
        else:
            # where the client's history was cut, what lies behind the cut is not there
            had = self.ancestors(common, stop=depth.has)
            wanted = self.ancestors(self.heads, stop=boundary.ends)
            commits = [oid for oid in wanted if oid not in had]
        seen = self._known_objects(commits, boundary.ends) if common else set()
        found = [bytes.fromhex(oid) for oid in dict.fromkeys([*self._tag_chain(), *commits])]
        for oid in commits:
            found += self._walk(self._commit(oid).tree, seen)
        return found

    def find_tags(self, sent: list[bytes]) -> list[bytes]:
        """The annotated tags of commits that are sent."""
        found, there = [], set(sent)
        for name, oid, peeled in list_tips(self._git):
            if peeled and name.startswith("refs/tags/") and bytes.fromhex(peeled) in there:
                while self._type(oid) == TAG:
                    found.append(bytes.fromhex(oid))
                    oid = _target(self._git, oid)
        return [raw for raw in dict.fromkeys(found) if raw not in there]

    def ancestors(self, starts: Iterable[str], *, stop: set[str], until: set[str] | None = None) -> set[str]:
        """Commits and all that came before, down to `stop` (included); ends early when all of `until` are met."""
        found: set[str] = set()
        waiting = list(starts)
        while waiting:
            oid = waiting.pop()
            if oid in found or self._type(oid) != COMMIT:
                continue
            found.add(oid)
            if until is not None and oid in until and until <= found:
                break
            if oid not in stop:
                waiting += self._commit(oid).parents
        return found

    def _count_down(self, starts: list[str], depth: int) -> tuple[set[str], set[str]]:
        """Breadth first, so that each commit is met at its smallest depth."""
        inner: set[str] = set()
        level, met = dict.fromkeys(starts), set(starts)
        for _ in range(depth - 1):
            inner |= level.keys()
            parents = [parent for oid in level for parent in self._commit(oid).parents]
            level = dict.fromkeys(oid for oid in parents if oid not in met)
            met |= level.keys()
            if not level:
                break
        ends = {oid for oid in level if self._commit(oid).parents}
        return inner | (level.keys() - ends), ends

    def _cut_off(self, depth: Depth) -> tuple[set[str], set[str]]:
        left_out = self.ancestors([self._git.resolve(name) for name in depth.without], stop=set())
        since_s = depth.since_s or 0
        kept = {
            oid
            for oid in self.ancestors(self.heads, stop=left_out)
            if oid not in left_out and self._commit(oid).date_s >= since_s
        }
        if not kept:
            raise InvalidInputError("No commits selected for shallow requests")
        ends = {oid for oid in kept if any(parent not in kept for parent in self._commit(oid).parents)}
        return kept - ends, ends

    def _known_objects(self, commits: list[str], ends: set[str]) -> set[bytes]:
        """What is in the parents that the client has: it need not come again."""
        sent, seen = set(commits), set[bytes]()
        for oid in commits:
            for parent in self._commit(oid).parents if oid not in ends else ():
                if parent not in sent:
                    for _ in self._walk(self._commit(parent).tree, seen):
                        pass
        return seen

    def _walk(self, tree: str, seen: set[bytes]) -> Iterator[bytes]:
        raw = bytes.fromhex(tree)
        if raw not in seen:
            seen.add(raw)
            yield raw
            for _, mode, child in parse_tree(self._git.objects.read(tree)[1], 20):
                if mode == FOLDER_MODE:
                    yield from self._walk(child.decode(), seen)
                elif (file := bytes.fromhex(child.decode())) not in seen:
                    seen.add(file)
                    yield file

    def _tag_chain(self) -> Iterator[str]:
        for oid in self.tags:
            while self._type(oid) == TAG:
                yield oid
                oid = _target(self._git, oid)

    def _type(self, oid: str) -> int | None:
        if oid in self._commits:
            return COMMIT
        try:
            return self._git.objects.type_of(oid)
        except KeyError:
            return None

    def _commit(self, oid: str) -> _Commit:
        if oid not in self._commits:
            found = ShaFile.from_raw_string(*self._git.objects.read(oid))
            assert isinstance(found, Commit)
            parents = tuple(parent.decode() for parent in found.parents)
            self._commits[oid] = _Commit(found.tree.decode(), parents, found.commit_time)
        return self._commits[oid]


def list_tips(git: GitRepo) -> list[tuple[str, str, str | None]]:
    """Every ref that clients see: its name, what it points at, and for an annotated tag the commit behind it."""
    found: list[tuple[str, str, str | None]] = []
    for prefix in ("refs/convert/", "refs/heads/", "refs/pr/", "refs/tags/"):
        for name, commit in git.list_refs(prefix).items():
            oid = git.read_ref(prefix + name)
            assert oid is not None
            found.append((prefix + name, oid, commit if commit != oid else None))
    return found


def stream_pack(git: GitRepo, oids: list[bytes]) -> Iterator[bytes]:
    """A pack of these objects in pieces of about 256 KiB; one object is in memory at a time."""
    digest = hashlib.sha1(usedforsecurity=False)
    waiting = bytearray()
    for piece in _list_pieces(git, oids):
        digest.update(piece)
        waiting += piece
        if len(waiting) >= _CHUNK_BYTES:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting) + digest.digest()


def _list_pieces(git: GitRepo, oids: list[bytes]) -> Iterator[bytes]:
    yield pack_header(len(oids))
    for raw in oids:
        type_num, content = git.objects.read(raw.hex())
        yield object_header(type_num, len(content))
        engine, view = zlib.compressobj(1), memoryview(content)
        for start in range(0, len(view), _CHUNK_BYTES):
            yield engine.compress(view[start : start + _CHUNK_BYTES])
        yield engine.flush()
        del content, view  # before the next one is read


def _target(git: GitRepo, tag: str) -> str:
    found = ShaFile.from_raw_string(*git.objects.read(tag))
    assert isinstance(found, Tag)
    return found.object[1].decode()
