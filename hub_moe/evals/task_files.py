"""Task files of lm_eval and our own: found in one folder, checked before their code runs, hashed with all of it."""

import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DatasetError, MissingExtraError
from .records.record import hash_json
from .suites import DECLARATIONS, LM_EVAL, OWN, Suite, SuiteEntry, name_nearest

_GOES_ONLINE = re.compile(r"^\s*(?:import|from)\s+evaluate\b", re.MULTILINE)


@dataclass(frozen=True)
class TaskFile:
    """One task's YAML. `settings` are those of the file and all that it includes, functions as text."""

    name: str
    path: Path
    settings: Mapping[str, Any]

    def read(self) -> dict[str, Any]:
        """The settings with functions; this imports the modules beside the file, so check it first.

        Raises:
            ConfigError: If a function is not there.
            DatasetError: If a metric of evaluate, which was allowed, cannot be fetched.
        """
        from lm_eval.tasks._yaml_loader import load_yaml

        try:
            return dict(load_yaml(self.path, resolve_func=True))
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{self.name} names a function that is not there: {error}.") from error
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise DatasetError(f"{self.name} fetches its metric from the public Hub, which failed: {reason}") from error

    @property
    def sha256(self) -> str:
        """Over the YAML, every file that it includes and every module whose functions it names."""
        hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.files.items()}
        return hash_json(sorted(hashes.items()))

    @cached_property
    def files(self) -> dict[str, Path]:
        """Those files, by their path from the YAML's folder."""
        found: dict[str, Path] = {}
        _collect_files(self.path.resolve(), self.path.resolve().parent, found)
        return found

    @property
    def modules(self) -> list[Path]:
        """The Python files among them."""
        return [path for path in self.files.values() if path.suffix == ".py"]

    def check(self, *, run_code: bool) -> None:
        """Refuse what would run a model's code, or would go online for a metric, before any of it is imported.

        Raises:
            ConfigError: Naming the metric or module.
        """
        if self.settings.get("unsafe_code") and not run_code:
            raise ConfigError(
                f"{self.name} runs code that the model writes; allow that only inside a sandbox, or use the suite code."
            )
        if self.settings.get("unsafe_code") and os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise ConfigError(
                f"{self.name} needs HF_ALLOW_CODE_EVAL=1 in the environment: evaluate's code_eval asks so."
            )
        if run_code:
            return
        for metric in self.settings.get("metric_list") or ():
            self._check_metric(metric)
        for module in self.modules:
            if _GOES_ONLINE.search(module.read_text("utf-8")):
                raise ConfigError(
                    f"{self.name} imports evaluate in {module.name}, which fetches its metric from the public Hub and "
                    "runs it; choose a task whose metric lm_eval holds itself."
                )

    def _check_metric(self, metric: Mapping[str, Any]) -> None:
        import lm_eval.api.metrics  # noqa: F401  registers the metrics
        from lm_eval.api.registry import metric_registry

        name = metric.get("metric")
        if self.settings.get("process_results") or not isinstance(name, str) or os.sep in name:
            return
        if metric.get("hf_evaluate") or name not in metric_registry:
            near = name_nearest(name, list(metric_registry), what="lm_eval's own metrics")
            raise ConfigError(
                f"{self.name} asks for the metric {name!r}, for which lm_eval would go online to evaluate's metrics; "
                f"{near}"
            )


def find_task_files(suite: Suite, entry: SuiteEntry) -> list[TaskFile]:
    """The tasks of an entry, groups and tags taken apart, in lm_eval's order.

    Raises:
        ConfigError: If the folder or a task is not there, or a group holds what cannot be taken apart.
    """
    folder = _find_folder(suite, entry)
    index = _index_folder(folder)
    names = [name for wanted in entry.tasks for name in _expand(wanted, index, entry)]
    return [
        TaskFile(name, index[name].yaml_path, _read_settings(index[name].yaml_path)) for name in dict.fromkeys(names)
    ]


def require_lm_eval() -> None:
    """Raises MissingExtraError if lm_eval is not installed."""
    if find_spec("lm_eval") is None:
        raise MissingExtraError("Suites are run by lm_eval, which is not installed: pip install 'hub_moe[eval]'")


def _show_nothing(bar: Any, *arguments: Any, **settings: Any) -> Any:
    return bar(*arguments, **{**settings, "disable": True})


_MODULES_WITH_BARS = (
    "lm_eval.api.task",
    "lm_eval.api.model",
    "lm_eval.models.huggingface",
    "lm_eval.models.api_models",
    "hub_moe.evals.prefix_lm",
)


@contextmanager
def hush_lm_eval() -> Iterator[None]:
    """lm_eval and datasets without remarks and progress bars inside the block; what they raise still comes out."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, no_bars = logger.level, datasets.utils.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    modules = [sys.modules[name] for name in _MODULES_WITH_BARS if name in sys.modules]
    bars = [module.tqdm for module in modules]
    logger.setLevel(max(level, logging.CRITICAL))
    for module, bar in zip(modules, bars, strict=True):
        module.tqdm = partial(_show_nothing, bar)  # type: ignore[attr-defined]
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        logger.setLevel(level)
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar  # type: ignore[attr-defined]
        datasets.logging.set_verbosity(verbosity)
        if not no_bars:
            datasets.enable_progress_bars()


def _find_folder(suite: Suite, entry: SuiteEntry) -> Path:
    require_lm_eval()
    import lm_eval.tasks

    roots = {LM_EVAL: Path(lm_eval.tasks.__file__).parent, OWN: DECLARATIONS / "tasks", ".": Path(suite.folder)}
    root, _, inner = entry.source.partition("/")
    folder = roots[root] / inner
    if not folder.is_dir() or ".." in Path(inner).parts or Path(inner).is_absolute():
        known = [path.name for path in roots[root].iterdir() if path.is_dir()] if roots[root].is_dir() else []
        near = name_nearest(inner, known, what="folders")
        raise ConfigError(f"The source {entry.source!r} of {entry.name} is no folder of tasks; {near}")
    return folder


def _index_folder(folder: Path) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    with hush_lm_eval():
        return dict(TaskManager(include_path=str(folder), include_defaults=False).task_index)


def _read_settings(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(path, resolve_func=False))


def _expand(name: str, index: Mapping[str, Any], entry: SuiteEntry) -> Iterator[str]:
    from lm_eval.tasks._index import Kind

    found = index.get(name)
    if found is None:
        near = name_nearest(name, list(index), what="its tasks")
        raise ConfigError(f"There is no task {name!r} in {entry.source}; {near}")
    if found.kind is Kind.TAG:
        for member in sorted(found.tags):
            yield from _expand(member, index, entry)
    elif found.kind is Kind.GROUP:
        for member in found.cfg.get("task") or ():
            if not isinstance(member, str):
                raise ConfigError(
                    f"The group {name} changes the settings of its tasks; name its tasks one by one in the suite."
                )
            yield from _expand(member, index, entry)
    else:
        yield name


def _collect_files(path: Path, root: Path, found: dict[str, Path]) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    found[Path(os.path.relpath(path, root)).as_posix()] = path
    settings = load_yaml(path, resolve_func=False, recursive=False)
    for module in _function_modules(settings, path.parent):
        found[module.name if OWN in module.parts else Path(os.path.relpath(module, root)).as_posix()] = module
    includes = settings.get("include") or []
    for included in includes if isinstance(includes, list) else [includes]:
        _collect_files((path.parent / included).resolve(), root, found)


def _function_modules(value: Any, folder: Path) -> Iterator[Path]:
    """Python files behind `!function`, which lm_eval writes as FOLDER/module.function when it does not resolve it."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _function_modules(item, folder)
    elif isinstance(value, str) and value.startswith(f"{folder}{os.sep}"):
        module = value.removeprefix(f"{folder}{os.sep}").rpartition(".")[0]
        beside = folder / f"{module.replace('.', os.sep)}.py"
        if beside.is_file():
            yield beside
        elif find_spec(module.partition(".")[0]) and (spec := find_spec(module)) and spec.origin:
            yield Path(spec.origin)
