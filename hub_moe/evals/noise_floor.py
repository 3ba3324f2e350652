"""What rounding alone does to a sparse model's answers.

Two ways of summing the same numbers differ in the last bits; in a Mixture-of-Experts model that can send a token to
another expert, and an answer flips. The same questions asked at batch size 1 and by another implementation of the
experts show how often: differences of two models below this floor say nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from ..errors import EvaluationError
from .models import LoadedModel, running_experts, running_one_at_a_time
from .records import NoiseFloor
from .run import answer_instances
from .tasks import BuiltSuite

_IMPLEMENTATIONS = ("eager", "grouped_mm")  # one of them is not the one that runs
_KINDS = ("loglikelihood", "multiple_choice", "loglikelihood_rolling")


def measure_noise_floor(loaded: LoadedModel, built: BuiltSuite, *, num_documents: int = 64) -> NoiseFloor:
    """Ask a probe set, spread over the suite's log-likelihood tasks, in each way of running.

    Raises:
        EvaluationError: If the model is an endpoint, which cannot be told how to run, or no task asks for
            log-likelihoods.
    """
    if loaded.request.endpoint is not None:
        raise EvaluationError("The noise floor of an endpoint cannot be measured: its server decides how it runs.")
    documents = choose_probes(built, num_documents)
    if not documents:
        raise EvaluationError("The noise floor needs a task with log-likelihoods; this suite has none.")
    expected = _ask(loaded.lm, documents)
    variations = {}
    for name, running in _variations(loaded):
        with running:
            variations[name] = _describe(documents, expected, _ask(loaded.lm, documents))
    return NoiseFloor(len(documents), variations)


def choose_probes(built: BuiltSuite, num_documents: int) -> list[list[Any]]:
    """The requests of documents, in turn from each task, evenly over its documents."""
    tasks = []
    for each in built.tasks:
        documents = [found for found in each.instances_by_document() if found[0].request_type in _KINDS]
        if documents:
            tasks.append(documents)
    if not tasks:
        return []
    share = max(1, num_documents // len(tasks))
    return [document for documents in tasks for document in _spread(documents, share)][:num_documents]


def _spread(documents: Sequence[Any], number: int) -> list[Any]:
    places = np.linspace(0, len(documents) - 1, min(number, len(documents))).round().astype(int)
    return [documents[place] for place in places]


def _variations(loaded: LoadedModel) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
    if loaded.execution.batch_size > 1:
        yield "batch size 1", running_one_at_a_time(loaded)
    other = next(name for name in _IMPLEMENTATIONS if name != loaded.execution.experts)
    if loaded.execution.experts is not None:
        yield f"experts {other}", running_experts(loaded, other)
    if loaded.execution.reuses_prefix:
        yield "no reuse of prefixes", _without_reuse(loaded.lm)


@contextmanager
def _without_reuse(lm: Any) -> Iterator[None]:
    before, lm.reuse_reason = lm.reuse_reason, "the noise floor is measured"
    try:
        yield
    finally:
        lm.reuse_reason = before


def _ask(lm: Any, documents: Sequence[Sequence[Any]]) -> list[list[tuple[float, bool]]]:
    """(log-likelihood, is greedy) of each request of each document."""
    answer_instances(lm, [instance for document in documents for instance in document])
    return [[_pair(instance.resps[0]) for instance in document] for document in documents]


def _pair(answer: Any) -> tuple[float, bool]:
    return (float(answer[0]), bool(answer[1])) if isinstance(answer, tuple | list) else (float(answer), False)


def _describe(
    documents: Sequence[Sequence[Any]],
    expected: Sequence[Sequence[tuple[float, bool]]],
    found: Sequence[Sequence[tuple[float, bool]]],
) -> dict[str, float]:
    flips = sum(_choice(one) != _choice(other) for one, other in zip(expected, found, strict=True))
    differences = [
        abs(one[0] - other[0])
        for answers, others in zip(expected, found, strict=True)
        for one, other in zip(answers, others, strict=True)
    ]
    return {"flips": float(flips), "max_difference": float(max(differences))}


def _choice(answers: Sequence[tuple[float, bool]]) -> tuple[int, tuple[bool, ...]]:
    """What a model says to a document: the likeliest choice, and which are what greedy decoding gives."""
    return int(np.argmax([answer[0] for answer in answers])), tuple(bool(answer[1]) for answer in answers)
