"""Rows from the Hub, a folder or files through `datasets`, always with the revision or the hashes recorded."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from .source import DataSource, FileRecord, LoadedRows, Provenance, record_file

# ending of a file -> builder of `datasets` and its options
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {"sample_by": "document"}),
}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def load_rows(source: DataSource) -> LoadedRows:
    """The rows that `source` names.

    A txt file is one row, its whole text. A streamed source is read anew in each pass, so a network is needed for as
    long as rows are read; slices of splits (`train[:100]`) cannot be streamed.

    Raises:
        DatasetError: If a name does not exist (the message lists those that do), a file cannot be parsed, there are no
            rows, or the dataset is a script.
        huggingface_hub.errors.RepositoryNotFoundError, OSError: If the Hub has no such dataset or cannot be reached.
    """
    paths = [Path(name).expanduser() for name in source.names]
    if any(path.exists() for path in paths) or not _is_hub_id(source):
        return _load_local(source, paths)
    return _load_hub(source)


def _is_hub_id(source: DataSource) -> bool:
    name = source.names[0]
    return len(source.names) == 1 and bool(_HUB_ID.fullmatch(name)) and Path(name).suffix not in _BUILDERS


def _load_hub(source: DataSource) -> LoadedRows:
    from datasets import get_dataset_config_names, load_dataset_builder

    name = source.names[0]
    commit = _resolve_revision(name, source.revision)
    with _explain(source):
        configs = get_dataset_config_names(name, revision=commit)
    if source.config is not None and source.config not in configs:
        raise DatasetError(f"{name} has no config {source.config!r}; it has {', '.join(configs)}.")
    if source.config is None and len(configs) > 1 and "default" not in configs:
        raise DatasetError(f"{name} has several configs; choose one of {', '.join(configs)}.")
    with _explain(source):
        builder = load_dataset_builder(name, source.config, revision=commit)
    return _read(source, builder, Provenance(name, "hub", commit, builder.config.name))


def _resolve_revision(repo_id: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    commit = HfApi().dataset_info(repo_id, revision=revision).sha
    if commit is None:
        raise DatasetError(f"The Hub names no commit for {repo_id}; give one as revision.")
    return commit


def _load_local(source: DataSource, paths: Sequence[Path]) -> LoadedRows:
    from datasets import load_dataset_builder

    _check_paths(source, paths)
    options: dict[str, Any]
    if paths[0].is_dir():
        builder_name, options = str(paths[0]), {}
        if any((paths[0] / f"{stem}.py").is_file() for stem in (paths[0].resolve().name, "dataset")):
            raise DatasetError(_script_sentence(source.names[0]))
    else:
        builder_name, options = _choose_builder(source, paths)
    with _explain(source):
        builder = load_dataset_builder(builder_name, **options)
    return _read(source, builder, Provenance(_public_name(source.names), "files"))


def _check_paths(source: DataSource, paths: Sequence[Path]) -> None:
    for name, path in zip(source.names, paths, strict=True):
        if not path.exists():
            hub = "" if _is_hub_id(source) else ", nor is it a Hub dataset (OWNER/NAME)"
            raise DatasetError(f"There is no file or folder {name}{hub}.")
        if path.is_file() and not path.stat().st_size:
            raise DatasetError(f"{name} is empty.")
    if len(paths) > 1 and any(path.is_dir() for path in paths):
        raise DatasetError("Give one folder, or files only.")
    for option in ("revision", "config"):
        if getattr(source, option) is not None:
            raise DatasetError(f"{source.names[0]} is on disk and has no {option}; leave {option} out.")


def _choose_builder(source: DataSource, paths: Sequence[Path]) -> tuple[str, dict[str, Any]]:
    endings = {path.suffix.lower() for path in paths}
    unknown = sorted(endings - set(_BUILDERS))
    if unknown:
        known = ", ".join(ending.lstrip(".") for ending in _BUILDERS)
        raise DatasetError(f"{source.names[0]} ends in {unknown[0] or 'nothing'}; rows are read from {known} files.")
    builders = {_BUILDERS[ending][0]: _BUILDERS[ending] for ending in endings}
    if len(builders) > 1 or len({str(options) for _, options in builders.values()}) > 1 or endings >= {".csv", ".tsv"}:
        raise DatasetError(f"The files are of different kinds ({', '.join(sorted(endings))}); give files of one kind.")
    builder, options = next(iter(builders.values()))
    return builder, {**options, "data_files": {"train": [str(path) for path in paths]}}


def _read(source: DataSource, builder: Any, provenance: Provenance) -> LoadedRows:
    split = _choose_split(source, builder)
    with _explain(source):
        if source.streaming:
            rows = builder.as_streaming_dataset(split=split)
            rows = rows if source.limit is None else rows.take(source.limit)
            first = next(iter(rows), None)
            columns = tuple(rows.column_names or first or ())
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
            rows = rows if source.limit is None else rows.take(min(source.limit, len(rows)))
            first, columns = (rows[0] if len(rows) else None), tuple(rows.column_names)
    if first is None:
        raise DatasetError(f"{provenance.source} holds no rows in its split {split}.")
    files = _record_files(source, builder, split) if provenance.kind == "files" else ()
    provenance = replace(provenance, split=split, limit=source.limit, streaming=source.streaming, files=files)
    return LoadedRows(rows, columns, provenance, source.format, dict(source.columns))


def _choose_split(source: DataSource, builder: Any) -> str:
    names = [str(name) for name in (builder.info.splits or builder.config.data_files or ())]
    if not names:
        raise DatasetError(f"{source.names[0]} holds no data files.")
    if source.split is None:
        if len(names) > 1 and "train" not in names:
            raise DatasetError(f"{source.names[0]} has the splits {', '.join(names)}; choose one.")
        return "train" if "train" in names else names[0]
    wanted = re.sub(r"\[[^\]]*\]$", "", source.split)
    if wanted not in names:
        raise DatasetError(f"{source.names[0]} has no split {wanted!r}; it has {', '.join(names)}.")
    if source.streaming and wanted != source.split:
        raise DatasetError(f"A slice ({source.split}) cannot be streamed; use limit, or streaming = false.")
    return source.split


def _record_files(source: DataSource, builder: Any, split: str) -> tuple[FileRecord, ...]:
    """The files of `split`, named as the person named them or their folder."""
    names = {Path(name).expanduser().resolve(): _public_name([name]) for name in source.names}
    folder = next(iter(names))
    records = []
    for file in builder.config.data_files[split.partition("[")[0]]:
        path = Path(file).resolve()
        name = names.get(path) or f"{names[folder]}/{path.relative_to(folder).as_posix()}"
        records.append(record_file(path, name))
    return tuple(records)


def _public_name(names: Sequence[str]) -> str:
    return ", ".join(
        path.name if path.is_absolute() or name.startswith("~") else path.as_posix()
        for name, path in ((name, Path(name)) for name in names)
    )


def _script_sentence(name: str) -> str:
    return f"{name} is a dataset script, which would run its author's code here; convert it to parquet or json first."


@contextmanager
def _explain(source: DataSource) -> Iterator[None]:
    """Errors of `datasets` about the data, as one sentence; those of the network and the Hub pass."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError

    name = _public_name(source.names)
    try:
        yield
    except DatasetNotFoundError:
        raise
    except DatasetError:
        raise
    except RuntimeError as error:
        if "Dataset scripts are no longer supported" not in str(error):
            raise
        raise DatasetError(_script_sentence(name)) from error
    except (DataFilesNotFoundError, FileNotFoundError) as error:
        raise DatasetError(f"{name} holds no data files that datasets can read.") from error
    except (DatasetGenerationError, ValueError, UnicodeDecodeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise DatasetError(f"{name} cannot be read: {reason}.") from error
