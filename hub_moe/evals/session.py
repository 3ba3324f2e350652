"""From a model's name to its record, and to the comparison with its base: what `hub-moe eval` does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .compare import RecordComparison, compare_records
from .model_source import LocatedModel, locate_model
from .models import LoadedModel, ModelRequest, load_model, load_tokenizer
from .noise_floor import measure_noise_floor
from .preflight import Preflight, check_suite
from .records import StoredRecord, find_records
from .run import RunFacts, complete_execution, evaluate_suite
from .suites import Suite
from .tasks import BuiltSuite, build_suite


@dataclass(frozen=True)
class Plan:
    """What to ask, and where the evidence goes.

    Attributes:
        folder: Of the records.
        data_dir: Files in place of the Hub's datasets.
        noise_floor: Whether to measure what rounding does.
        command: The words of the command, for the record.
        allow_code: Whether code that the model writes may run here, for suites that need it.
    """

    suite: Suite
    folder: Path
    data_dir: Path | None = None
    noise_floor: bool = False
    command: Sequence[str] = ()
    allow_code: bool = False


@dataclass(frozen=True)
class Outcome:
    """The records of an evaluation; `base` and `comparison` where a base was asked for."""

    candidate: StoredRecord
    base: StoredRecord | None = None
    comparison: RecordComparison | None = None


def preview(plan: Plan, request: ModelRequest) -> Preflight:
    """What the evaluation takes, before any weights are loaded.

    Raises:
        DatasetError, ConfigError: If a dataset cannot be had, or the tokenizer lacks what the suite wants.
    """
    return _build(plan, _locate(request), request)[1]


def evaluate(
    request: ModelRequest, plan: Plan, *, base: ModelRequest | None = None, say: Callable[[str], None]
) -> Outcome:
    """Evaluate a model, and the base to compare it with; a base that has the very record already is not run again.

    Raises:
        HubMoeError: See `build_suite`, `load_model`, `evaluate_suite` and `compare_records`.
    """
    if base is None:
        return Outcome(_evaluate_one(request, plan, say=say, may_exist=False))
    of_base = _evaluate_one(base, plan, say=say, may_exist=True)
    of_candidate = _evaluate_one(request, plan, say=say, may_exist=False)
    return Outcome(of_candidate, of_base, compare_records(of_base, of_candidate))


def _evaluate_one(request: ModelRequest, plan: Plan, *, say: Callable[[str], None], may_exist: bool) -> StoredRecord:
    located = _locate(request)
    say(f"Preparing the suite {plan.suite.name} for {request.reference}")
    built, preflight = _build(plan, located, request)
    say(f"{len(built.requests):,} requests; the smallest difference that a comparison can detect: {preflight.smallest}")
    loaded = load_model(request, located)
    known = _find_known(plan, loaded, built) if may_exist else None
    if known is not None:
        say(f"{known.path} has this evaluation of {request.reference} already.")
        return known
    floor = None
    if plan.noise_floor:
        say("Measuring what rounding does to the answers")
        floor = measure_noise_floor(loaded, built)
    return evaluate_suite(loaded, built, plan.folder, RunFacts(plan.command, noise_floor=floor))


def _find_known(plan: Plan, loaded: LoadedModel, built: BuiltSuite) -> StoredRecord | None:
    """A whole record of the same files, run the same way on the same questions."""
    if not plan.folder.is_dir():
        return None
    prompts = [each.source.prompts_sha256 for each in built.tasks]
    execution = complete_execution(loaded, built)
    for stored in reversed(find_records(plan.folder)):
        record = stored.record
        asked = [task.prompts_sha256 for entry in record.entries for task in entry.tasks]
        is_same_run = (record.model.sha256, record.execution, asked) == (loaded.source.sha256, execution, prompts)
        if is_same_run and (record.noise_floor is not None) >= plan.noise_floor:
            return stored
    return None
