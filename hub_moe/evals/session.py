"""From a model's name to its record, and to the comparison with its base: what `hub-moe eval` does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..energy import prepare_metering
from .compare import RecordComparison, compare_records
from .model_source import LocatedModel, locate_model
from .models import LoadedModel, ModelRequest, check_endpoint, load_model, load_tokenizer
from .noise_floor import measure_noise_floor
from .preflight import Preflight, check_suite
from .records import StoredRecord, find_records
from .run import OnProgress, RunFacts, complete_execution, evaluate_suite
from .suites import Suite
from .tasks import BuiltSuite


@dataclass(frozen=True)
class Plan:
    """What to ask, and where the evidence goes.

    Attributes:
        folder: Of the records.
        data_dir: Files in place of the Hub's datasets.
        noise_floor: Whether to measure what rounding does.
        command: The words of the command, for the record.
        run_code: Whether code that the model writes may run here, for suites that need it.
        reuses: Whether a model that has the very record in `folder` already is not run again; a base never is.
    """

    suite: Suite
    folder: Path
    data_dir: Path | None = None
    noise_floor: bool = False
    command: Sequence[str] = ()
    run_code: bool = False
    reuses: bool = False


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
    return _check(plan, _find_writer(request, plan, _locate(request)))


def evaluate(
    request: ModelRequest,
    plan: Plan,
    *,
    base: ModelRequest | None = None,
    say: Callable[[str], None] = lambda text: None,
    on_progress: OnProgress = lambda done, total: None,
) -> Outcome:
    """Evaluate a model, and the base to compare it with; a base that has the very record already is not run again.

    Raises:
        HubMoeError: See `build_suite`, `load_model`, `evaluate_suite` and `compare_records`.
    """
    if base is None:
        return Outcome(_evaluate_one(request, plan, is_base=False, is_first=True, say=say, on_progress=on_progress))
    of_base = _evaluate_one(base, plan, is_base=True, is_first=True, say=say, on_progress=on_progress)
    of_candidate = _evaluate_one(request, plan, is_base=False, is_first=False, say=say, on_progress=on_progress)
    return Outcome(of_candidate, of_base, compare_records(of_base, of_candidate))


def _evaluate_one(
    request: ModelRequest,
    plan: Plan,
    *,
    is_base: bool,
    is_first: bool,
    say: Callable[[str], None],
    on_progress: OnProgress,
) -> StoredRecord:
    located = _locate(request)
    tokenizer = _find_writer(request, plan, located)
    say(f"Preparing the suite {plan.suite.name} for {located.source}")
    preflight = _check(plan, tokenizer)
    preflight.raise_if_blocked()
    assert preflight.built is not None
    built = preflight.built
    for line in preflight.to_lines() if is_first else ():
        say(f"  {line}")
    prepare_metering()
    loaded = load_model(request, located, say=say)
    known = _find_known(plan, loaded, built) if is_base or plan.reuses else None
    if known is not None:
        say(f"{known.path} has this evaluation of {located.source} already.")
        return known
    floor = None
    if plan.noise_floor:
        say("Measuring what rounding does to the answers")
        floor = measure_noise_floor(loaded, built)
    facts = RunFacts(plan.command, noise_floor=floor)
    return evaluate_suite(loaded, built, plan.folder, facts, on_progress=on_progress)


def _locate(request: ModelRequest) -> LocatedModel:
    """The files of the model, or of the tokenizer of an endpoint."""
    reference = request.tokenizer or request.reference if request.endpoint else request.reference
    located = locate_model(reference, revision=request.revision, subfolder=request.subfolder, base=request.base)
    return located if request.name is None else replace(located, source=replace(located.source, name=request.name))


def _find_writer(request: ModelRequest, plan: Plan, located: LocatedModel) -> Any:
    """What writes prompts: the tokenizer, or where a server applies the template the client that sends it chats."""
    check_endpoint(request, writes_chats=plan.suite.chat_template)
    if request.endpoint is not None and request.endpoint_kind == "chat":
        return load_model(request, located).lm
    return load_tokenizer(located, trust_remote_code=request.trust_remote_code)


def _check(plan: Plan, tokenizer: Any) -> Preflight:
    return check_suite(plan.suite, tokenizer=tokenizer, data_dir=plan.data_dir, run_code=plan.run_code)


def _find_known(plan: Plan, loaded: LoadedModel, built: BuiltSuite) -> StoredRecord | None:
    """A whole record of the same files, run the same way on the same questions."""
    if not plan.folder.is_dir():
        return None
    prompts = [each.source.prompts_sha256 for each in built.tasks]
    execution = complete_execution(loaded, built)
    for stored in reversed(find_records(plan.folder)):
        record = stored.record
        asked = [task.prompts_sha256 for entry in record.entries for task in entry.tasks]
        ran = replace(record.execution, reuses_prefix=execution.reuses_prefix)  # scores are the same with and without
        is_same_run = (record.model.sha256, ran, asked) == (loaded.source.sha256, execution, prompts)
        if is_same_run and (record.noise_floor is not None) >= plan.noise_floor:
            return stored
    return None
