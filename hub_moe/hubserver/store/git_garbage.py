"""The git objects of one repository that nothing reaches: to count, or to delete while nobody else has it open."""

from collections.abc import Iterator
from pathlib import Path

from .blobs import sync_folder
from .git import GitRepo
from .packs import BLOB, COMMIT, TAG, TREE, PackWriter
from .reachable import Reachable

_IDS_START = 8 + 4 * 256
_ORDER = {TAG: 0, COMMIT: 1, TREE: 2, BLOB: 3}  # a kill half-way leaves no commit without its files


class GitGarbage:
    """Finds garbage older than `before_s`. What younger objects need is no garbage: their ref may be on the way."""

    def __init__(self, git: GitRepo, reachable: Reachable, *, before_s: float) -> None:
        self._git = git
        self._reachable = reachable
        self._folder = git.path / "objects"
        self._before_s = before_s
        reachable.add(git, self._list_young())

    def count(self) -> Iterator[int]:
        """The size on disk of each object that `delete` would delete."""
        yield from (path.stat().st_size for path in self._doomed_loose().values())
        for pack in self._old_packs():
            doomed = self._doomed_in(pack)
            yield from [pack.stat().st_size // max(1, len(_list_packed(pack)))] * len(doomed)

    def delete(self) -> Iterator[int]:
        """Delete the garbage; the size on disk of each object."""
        for pack in self._old_packs():
            doomed = self._doomed_in(pack)
            if doomed:
                yield from self._rewrite(pack, doomed)
        doomed_loose = self._doomed_loose()
        for oid in sorted(doomed_loose, key=lambda oid: _ORDER[self._git.objects.type_of(oid)]):
            size_bytes = doomed_loose[oid].stat().st_size
            doomed_loose[oid].unlink()
            yield size_bytes

    def _rewrite(self, pack: Path, doomed: set[str]) -> list[int]:
        """Put what is needed of a pack into a new one, then delete the old one."""
        size_before_bytes, sizes = pack.stat().st_size, 0
        kept = [oid for oid in _list_packed(pack) if oid not in doomed]
        if kept:
            writer = PackWriter(self._folder)
            try:
                for oid in kept:
                    writer.add(oid, *self._git.objects.read(oid))
                new = writer.finish()
            finally:
                writer.discard()
            sizes = new.stat().st_size
            if new == pack:
                return []
        pack.with_suffix(".idx").unlink()  # first, so that no index ever names a pack that is not there
        pack.unlink()
        sync_folder(pack.parent)
        return _spread(size_before_bytes - sizes, len(doomed))

    def _doomed_loose(self) -> dict[str, Path]:
        old = ((oid, path) for oid, path in self._list_loose() if path.stat().st_mtime <= self._before_s)
        return {oid: path for oid, path in old if oid not in self._reachable}

    def _doomed_in(self, pack: Path) -> set[str]:
        return {oid for oid in _list_packed(pack) if oid not in self._reachable}

    def _list_young(self) -> Iterator[str]:
        yield from (oid for oid, path in self._list_loose() if path.stat().st_mtime > self._before_s)
        for pack in self._list_packs():
            if pack.stat().st_mtime > self._before_s:
                yield from _list_packed(pack)

    def _old_packs(self) -> list[Path]:
        return [pack for pack in self._list_packs() if pack.stat().st_mtime <= self._before_s]

    def _list_packs(self) -> list[Path]:
        return sorted(index.with_suffix(".pack") for index in (self._folder / "pack").glob("pack-*.idx"))

    def _list_loose(self) -> Iterator[tuple[str, Path]]:
        for path in sorted(self._folder.glob("[0-9a-f][0-9a-f]/*")):
            if len(path.name) == 38:
                yield path.parent.name + path.name, path


def _list_packed(pack: Path) -> list[str]:
    """The ids in a pack, from its index (gitformat-pack, version 2)."""
    index = pack.with_suffix(".idx").read_bytes()
    if index[:8] != b"\xfftOc\0\0\0\2":
        raise ValueError(f"{pack.name} has an index of another version than 2")
    end = _IDS_START + 20 * int.from_bytes(index[_IDS_START - 4 : _IDS_START], "big")
    return [index[start : start + 20].hex() for start in range(_IDS_START, end, 20)]


def _spread(size_bytes: int, count: int) -> list[int]:
    return [max(0, size_bytes)] + [0] * (count - 1)
