"""What must not get into a public repo: pickles, links, secrets, and where things lie on somebody's machine."""

import html
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ..cards.lint import LOCAL_PATH
from ..errors import ConfigError


def _apart(word: str) -> str:
    """A pattern for a word between whose letters there may be what browsers leave out of an address."""
    return r"[\x00-\x20]{0,3}".join(map(re.escape, word))


_PICKLES = {
    *(".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth", ".h5", ".keras"),
    ".msgpack",
}
_LEFT_OUT = {".git", ".cache", "__pycache__", ".ipynb_checkpoints", ".DS_Store", "Thumbs.db", ".gitattributes"}
_SECRET_FILES = (
    *(".env", ".env.*", "*.env", ".netrc", "_netrc", ".git-credentials", ".npmrc", ".pypirc", "id_rsa", "id_ed25519"),
    *("*.pem", "*.p12", "*.pfx", "*.key", "credentials", "credentials.json"),
)
_SECRETS = {
    "a token of a Hub": r"\bhf_(?:[A-Za-z0-9]{20,}\b|(?=[a-z0-9_-]*[A-Z])(?=[A-Z0-9_-]*[a-z])[A-Za-z0-9_-]{30,})",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "a key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a secret key of AWS": r"(?i:aws_secret_access_key)[\"']?\s{0,3}[=:]\s{0,3}[\"']?[A-Za-z0-9/+=]{40}",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})\b",
    "a token of GitLab": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "a token of Slack": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "an API key": r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}",
    "an API key of Google": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "a key of Weights & Biases": r"(?i:wandb_api_key)[\"']?\s{0,3}[=:]\s{0,3}[\"']?[0-9a-f]{40}",
}
_SECRET = re.compile("|".join(f"(?P<s{place}>{pattern})" for place, pattern in enumerate(_SECRETS.values())))
_TEXTS = {
    *(".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".toml", ".jinja", ".py", ".cfg", ".ini", ".sh", ".csv"),
    *(".log", ".html", ".xml", ""),
}
_VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"}  # may spell any path
_ACTIVE_TAGS = {"script", "iframe", "object", "embed", "form", "meta", "link", "style", "svg", "base"}
_EVENTS = (
    "abort|after|animation|aux|before|begin|blur|can|change|click|close|command|context|copy|cue|cut|dbl|drag|drop|duration|"
    "emptied|end|error|focus|form|full|got|hash|input|invalid|key|load|lost|message|mouse|offline|online|page|paste|pause|"
    "play|pointer|pop|progress|rate|rejection|repeat|reset|resize|scroll|search|seek|select|show|slot|stalled|storage|"
    "submit|suspend|time|toggle|touch|transition|unhandled|unload|volume|waiting|webkit|wheel"
)
_LINK = re.compile(
    rf"[\x00-\x20]*+(?:{'|'.join(map(_apart, ('javascript:', 'vbscript:', 'data:text/html')))})", re.IGNORECASE
)
_HANDLER = re.compile(rf"on(?:{_EVENTS})[a-z]*", re.IGNORECASE)
_TAG = re.compile(r"<[a-z][^\s/>\"']*+(?P<attributes>(?:[^>\"']++|\"[^\"]*+\"|'[^']*+')*+)", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"(?P<name>[^\s/>\"'=]++)(?:\s*+=\s*+(?P<value>\"[^\"]*+\"|'[^']*+'|[^\s/>]*+))?")
_ACTIVE = re.compile(
    rf"<\s{{0,5}}/?(?:{'|'.join(sorted(_ACTIVE_TAGS))})\b|(?:\]\(|\]:|<){_LINK.pattern}[^\s)>]{{0,40}}", re.IGNORECASE
)
_MAX_TEXT_BYTES = 50_000_000
_MAX_FILES = 100_000  # of a repo, and below in a folder: https://huggingface.co/docs/hub/storage-limits
_MAX_FILES_IN_FOLDER = 10_000
_MAX_FILE_BYTES = 200_000_000_000
_MOST_SHOWN = 3


@dataclass(frozen=True)
class Problem:
    """Why something may not be published, and what to do about it. `path` is the file at fault, if it is one."""

    what: str
    advice: str = ""
    path: str | None = None

    def __str__(self) -> str:
        return f"{self.path + ' ' if self.path else ''}{self.what}" + (f"; {self.advice}" if self.advice else "")


def list_folder(folder: Path, exclude: Sequence[str] = ()) -> dict[str, Path]:
    """The files of a folder by the names that they get in a repo, without caches and those that match a pattern.

    Raises:
        ConfigError: If it is no folder, or nothing is left.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder.")
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_left_out = _LEFT_OUT.intersection(name.split("/")) or any(fnmatch(name, pattern) for pattern in exclude)
        if not is_left_out and (path.is_symlink() or not path.is_dir()):
            found[name] = path
    if not found:
        raise ConfigError(f"{folder} holds no files to publish.")
    return found


def check_files(files: Mapping[str, Path]) -> list[Problem]:
    """Everything that speaks against publishing these files, by their names in the repo."""
    return [*_check_names(files), *(problem for name, path in files.items() for problem in _check_file(name, path))]


def find_secrets(text: str) -> list[str]:
    """What kinds of secrets a text holds; the secrets themselves are not repeated."""
    kinds = list(_SECRETS)
    return sorted({kinds[int(str(match.lastgroup)[1:])] for match in _SECRET.finditer(text)})


def find_local_paths(text: str) -> list[str]:
    """The absolute paths of somebody's machine in a text, each once."""
    homes = [re.escape(str(place)) for place in {Path.home(), Path.cwd()} if len(place.parts) > 2]
    own = [match.group() for match in re.finditer(rf"(?<![\w.:-])(?:{'|'.join(homes)})[\w./-]*", text)] if homes else []
    return sorted({*own, *(match.group() for match in LOCAL_PATH.finditer(text))})


def find_scripts(text: str) -> list[str]:
    """What in a card would be run or loaded by a careless page: tags, event handlers and links, however they are spelt.

    Comments are read like everything else, as browsers and parsers differ in where they end; so is what entities say.
    """
    found = [each for version in {text, html.unescape(text)} for each in _scripts(version)]
    return sorted({" ".join(each.lower().split()) for each in found})


def _scripts(text: str) -> Iterator[str]:
    yield from (match.group() for match in _ACTIVE.finditer(text))
    for tag in _TAG.finditer(text):
        for attribute in _ATTRIBUTE.finditer(tag["attributes"]):
            if _HANDLER.fullmatch(attribute["name"]):
                yield f"{attribute['name']}="
            if _LINK.match((attribute["value"] or "").strip("\"'")):
                yield attribute.group()


def _check_names(files: Mapping[str, Path]) -> Iterator[Problem]:
    if len(files) > _MAX_FILES:
        yield Problem(f"There are {len(files):,} files, and a repo holds at most {_MAX_FILES:,}", "pack some of them")
    for folder, count in Counter(name.rpartition("/")[0] for name in files).items():
        if count > _MAX_FILES_IN_FOLDER:
            yield Problem(
                f"holds {count:,} files; at most {_MAX_FILES_IN_FOLDER:,} may lie in one", "spread them", folder or "."
            )
    for lower, count in Counter(name.lower() for name in files).items():
        if count > 1:
            yield Problem("differs from another file by its case only", "rename one of them", lower)


def _check_file(name: str, path: Path) -> Iterator[Problem]:
    exclude = f"delete it, or leave it out by --exclude '{name}'"
    if not name.isprintable() or "\\" in name:
        yield Problem("has a name that not every system can hold", "rename it", repr(name))
    elif path.is_symlink():
        yield Problem("is a link", "put the file itself there, or leave it out by --exclude", name)
    elif not path.is_file():
        yield Problem("is no file", exclude, name)
    elif any(fnmatch(path.name.lower(), pattern) for pattern in _SECRET_FILES):
        yield Problem("is a file that holds secrets", exclude, name)
    elif path.suffix.lower() in _PICKLES:
        yield Problem("may hold code that runs when it is loaded", f"store tensors as safetensors, and {exclude}", name)
    elif not os.access(path, os.R_OK):
        yield Problem("cannot be read", "see who may read it", name)
    elif path.stat().st_size > _MAX_FILE_BYTES:
        yield Problem(f"has {path.stat().st_size:,} bytes", f"split it into files of {_MAX_FILE_BYTES:,} bytes", name)
    elif path.suffix.lower() in _TEXTS and path.stat().st_size <= _MAX_TEXT_BYTES:
        yield from _check_text(name, path.read_text("utf-8", errors="replace"))


def _check_text(name: str, text: str) -> Iterator[Problem]:
    for kind in find_secrets(text):
        yield Problem(f"holds {kind}", "take it out, and make it invalid: who saw the file has it", name)
    paths = [] if name.rpartition("/")[2] in _VOCABULARIES else find_local_paths(text)
    if paths:
        shown = ", ".join(paths[:_MOST_SHOWN]) + (f" and {len(paths) - _MOST_SHOWN} more" * (len(paths) > _MOST_SHOWN))
        yield Problem(f"tells where things lie on a machine: {shown}", _advise_on_path(name), name)


def _advise_on_path(name: str) -> str:
    base = name.rpartition("/")[2]
    if base in ("expert_patch.json", "config.json", "adapter_config.json"):
        return "say which repo that is by --base OWNER/NAME@COMMIT"
    if "evals/" in name:
        return "a record cannot be edited: run `hub-moe eval` again with paths relative to where you are"
    return "edit it, or make it again"
