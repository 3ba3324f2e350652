"""Which names and paths may be stored: the one place that decides what is safe to put on a disk or into git."""

import re
import unicodedata
from dataclasses import dataclass

from .errors import InvalidInputError, InvalidPathError

KINDS = ("model", "dataset", "space")
RESERVED_OWNERS = {"api", "datasets", "kernels", "lfs", "login", "logout", "models", "settings", "spaces", "static"}
RESERVED_OWNERS |= {"uploads", "v1", "v2", "xet"}
MAX_PATH_BYTES = 1024
MAX_SEGMENT_BYTES = 255
MAX_REF_BYTES = 200
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REF = re.compile(r"[^\x00-\x20\x7f~^:?*\[\\]{1,200}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RepoId:
    """A repo's kind (`model`, `dataset`, `space`), owner and name, checked when made."""

    kind: str
    owner: str
    name: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidInputError(f"{self.kind!r} is not a kind of repo; expected one of {', '.join(KINDS)}.")
        check_name(self.owner)
        check_name(self.name)

    def __str__(self) -> str:
        return f"{self.owner}/{self.name}"


def check_name(name: str) -> str:
    """`name` if it may be the name of a user or repo, by the Hub's rule: ASCII, at most 96 characters."""
    if not _NAME.fullmatch(name) or "--" in name or ".." in name or name.lower().endswith((".git", ".ipynb")):
        raise InvalidInputError(
            f"{name!r} is not a valid name: use letters, digits, '-', '_' and '.', at most 96, not '--' or '..', "
            "not '-' or '.' at either end."
        )
    return name


def check_path(path: str) -> str:
    """`path` if it may be a file inside a repo: relative, no `..`, nothing that git or a file system would misread."""
    try:
        encoded = path.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidPathError(f"The path {path!r} is not valid Unicode.") from None
    if not encoded or len(encoded) > MAX_PATH_BYTES:
        raise InvalidPathError(f"A path has 1 to {MAX_PATH_BYTES} bytes; got {len(encoded)}.")
    if "\\" in path or any(unicodedata.category(letter) == "Cc" for letter in path):
        raise InvalidPathError(f"The path {path!r} holds a backslash or a control character.")
    for segment in path.split("/"):
        if segment in {"", ".", ".."} or len(segment.encode()) > MAX_SEGMENT_BYTES or _looks_like_git(segment):
            raise InvalidPathError(f"The path {path!r} is not a valid path inside a repo.")
    return path


def _looks_like_git(segment: str) -> bool:
    """Whether some file system would take `segment` for `.git` (CVE-2014-9390: case, ignorable characters, 8.3)."""
    visible = "".join(letter for letter in segment if unicodedata.category(letter) not in {"Cf", "Mn"})
    folded = unicodedata.normalize("NFKC", visible).casefold().split(":")[0].rstrip(" .")
    return folded in {".git", "git~1", "..", ""}


def check_ref_name(name: str) -> str:
    """`name` if it may be a branch or tag: git's own rule (git check-ref-format), and not the look of a commit."""
    parts = name.split("/")
    is_bad = (
        len(name.encode("utf-8", "replace")) > MAX_REF_BYTES
        or not _REF.fullmatch(name)
        or not name.isprintable()
        or ".." in name
        or "@{" in name
        or name in {"@", "HEAD"}
        or name.startswith(("-", "refs/"))
        or name.endswith(".")
        or _SHA1.fullmatch(name)
        or any(not part or part.startswith(".") or part.endswith(".lock") for part in parts)
    )
    if is_bad:
        raise InvalidInputError(f"{name!r} is not a valid name of a branch or tag.")
    return name


def check_sha256(oid: str) -> str:
    """`oid` if it is a sha256 in lower-case hex."""
    if not _SHA256.fullmatch(oid):
        raise InvalidInputError(f"{oid[:80]!r} is not a sha256: expected 64 lower-case hex digits.")
    return oid


def is_commit_id(revision: str) -> bool:
    """Whether `revision` has the form of a full commit id."""
    return _SHA1.fullmatch(revision) is not None
