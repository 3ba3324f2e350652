"""Which git objects of a repository anything still needs, and which large contents they name."""

from collections.abc import Iterable, Iterator

from dulwich.objects import Commit, ShaFile, Tag, parse_tree
from dulwich.refs import DiskRefsContainer

from .files import Files
from .git import GitRepo
from .packs import BLOB, TREE

_FILES_AT_ONCE = 500
_SUBMODULE_MODE = 0o160000


class Reachable:
    """Grows with every call of `add`; what was met once is not read again."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._met: set[bytes] = set()
        self.contents: set[str] = set()

    def __contains__(self, oid: str) -> bool:
        return bytes.fromhex(oid) in self._met

    def add(self, git: GitRepo, oids: Iterable[str]) -> None:
        """Meet some objects and everything they need; KeyError if one is missing."""
        waiting, found = list(oids), list[str]()
        while waiting:
            oid = waiting.pop()
            raw = bytes.fromhex(oid)
            if raw in self._met:
                continue
            self._met.add(raw)
            kind = git.objects.type_of(oid)
            if kind == BLOB:
                found.append(oid)
            else:
                waiting += _list_needed(*git.objects.read(oid))
            if len(found) >= _FILES_AT_ONCE:
                self._add_files(git, found)
        self._add_files(git, found)

    def add_refs(self, git: GitRepo) -> None:
        """Meet what the refs need now."""
        refs = DiskRefsContainer(str(git.path))
        targets = [refs.read_loose_ref(name) or refs.get_packed_refs().get(name) for name in refs.allkeys()]
        self.add(git, [target.decode() for target in targets if target and not target.startswith(b"ref:")])

    def _add_files(self, git: GitRepo, oids: list[str]) -> None:
        self.contents |= {facts.sha256 for facts in self._files.facts(git, oids).values() if facts.sha256}
        oids.clear()


def _list_needed(kind: int, content: bytes) -> Iterator[str]:
    if kind == TREE:
        yield from (raw.decode() for _, mode, raw in parse_tree(content, 20) if mode != _SUBMODULE_MODE)
        return
    thing = ShaFile.from_raw_string(kind, content)
    if isinstance(thing, Commit):
        yield thing.tree.decode()
        yield from (parent.decode() for parent in thing.parents)
    elif isinstance(thing, Tag):
        yield thing.object[1].decode()
