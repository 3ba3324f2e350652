"""Two real texts that are on every machine: the source of Python's standard library, and its language reference."""

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError

# Not written by hand (tables, copies), not the library itself (tests, installed packages), or absent from many
# installs.
_LEFT_OUT = {
    "__phello__", "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One text and the name it goes by, a path relative to the corpus."""

    name: str
    text: str

    @property
    def size_bytes(self) -> int:
        """Length in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents never trained on; no document is in both."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def sha256(self) -> str:
        """Hash over the names, texts and sides of all documents."""
        digest = hashlib.sha256()
        for side, documents in (("train", self.train), ("held_out", self.held_out)):
            for document in documents:
                digest.update(f"{side}\0{document.name}\0{document.size_bytes}\0{document.text}".encode())
        return digest.hexdigest()


def read_stdlib_corpus(*, seed: int, held_out_share: float, max_bytes: int | None = None) -> Corpus:
    """The running Python's standard-library source, split by file.

    Left out are tests, installed packages, generated tables (`encodings`, whose files are near-copies of each other and
    would leak from one side to the other) and parts that many installs lack. The split depends on `seed` and on a
    file's name only, so a file keeps its side when others come or go.

    Args:
        seed: Chooses the split.
        held_out_share: Expected share of the files that are held out.
        max_bytes: Stop after this much text, for a quick try; None reads everything.

    Raises:
        DatasetError: If this Python has no library source, or a side of the split is empty.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    documents = list(_take(_read_documents(folder), max_bytes))
    held_out = tuple(doc for doc in documents if _draw(doc.name, seed) < held_out_share)
    train = tuple(doc for doc in documents if _draw(doc.name, seed) >= held_out_share)
    if not train or not held_out:
        raise DatasetError(
            f"Found {len(documents)} source files of the standard library in {folder}, too few to train on some and "
            "hold out others; use a Python whose library is installed as .py files."
        )
    return Corpus(train=train, held_out=held_out)


def _read_documents(folder: Path) -> Iterable[Document]:
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if any(part in _LEFT_OUT or part.startswith("config-") for part in relative.parts[:-1]):
            continue
        if relative.name.startswith("_sysconfigdata"):  # names the machine that built this Python
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a handful of files in other encodings
            continue
        if text.strip():
            yield Document(relative.as_posix(), text)


def _take(documents: Iterable[Document], max_bytes: int | None) -> Iterable[Document]:
    size_bytes = 0
    for document in documents:
        if max_bytes is not None and size_bytes >= max_bytes:
            return
        size_bytes += document.size_bytes
        yield document


def _draw(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on the name and the seed only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]) / 2**64


def read_language_reference() -> tuple[Document, ...]:
    """What `help("TOPIC")` shows in the running Python: English prose about the language, one document a topic.

    Raises:
        DatasetError: If this Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DatasetError(
            "This Python lacks pydoc_data, the text of its own help(); use one with the whole standard library."
        ) from error
    return tuple(Document(name, topics[name]) for name in sorted(topics))
