"""Large contents by their sha256, whatever they are kept as: one whole file, or a recipe over xorbs.

A content has a recipe if it ever came by Xet; a file that another way of upload left before is deleted by `hub gc`.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .blobs import BlobStore, IncomingFile, read_file
from .errors import NotFoundError
from .recipes import Recipes


class Contents:
    """Every large content of a store."""

    def __init__(self, blobs: BlobStore, recipes: Recipes) -> None:
        self.blobs = blobs
        self.recipes = recipes

    def size_bytes(self, sha256: str) -> int | None:
        """The size of a stored content, None if it is not here."""
        recipe = self.recipes.find(sha256)
        return recipe.size_bytes if recipe else self.blobs.size_bytes(sha256)

    def read(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes | memoryview]:
        """The bytes `start` to `end` of a content (None: its end), in pieces of about 256 KiB.

        Raises:
            NotFoundError: If the content is not here; or later, when xorbs of it are deleted while it is read.
            InvalidInputError: Later, if it is damaged.
        """
        recipe = self.recipes.find(sha256)
        if recipe:
            end = recipe.size_bytes if end is None else min(end, recipe.size_bytes)
            return self.recipes.read(recipe, start, end) if start < end else iter(())
        try:
            file = self.blobs.path(sha256).open("rb")
        except FileNotFoundError:
            raise NotFoundError("upload", f"No content with the sha256 {sha256} has been uploaded.") from None
        return read_file(file, start, os.fstat(file.fileno()).st_size if end is None else end)

    def receive(self, *, sha256: str, size_bytes: int) -> IncomingFile:
        """A place to write a content into; `finish` keeps it, if it is what was promised and not here yet."""
        return IncomingFile(self.blobs.incoming, self.place(sha256), size_bytes=size_bytes, sha256=sha256)

    def place(self, sha256: str) -> Path | None:
        """Where a content that comes whole belongs; None if it has a recipe already."""
        return None if self.recipes.find(sha256) else self.blobs.path(sha256)

    def store(self, chunks: Iterable[bytes], *, sha256: str, size_bytes: int) -> None:
        """Write a whole content; InvalidInputError if its sha256 or size differ from what was promised."""
        with self.receive(sha256=sha256, size_bytes=size_bytes) as incoming:
            for chunk in chunks:
                incoming.write(chunk)
            incoming.finish()

    def all(self) -> Iterator[str]:
        """The sha256 of every stored content."""
        yield from self.blobs.all()
        yield from (sha256 for sha256 in self.recipes.all() if self.blobs.size_bytes(sha256) is None)
