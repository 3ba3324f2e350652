"""Some documents of a record, asked again: are the answers this model's?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .models import LoadedModel, running_one_at_a_time
from .records import Sample
from .run import answer_instances
from .tasks import BuiltSuite

# rounding of a log-likelihood in nats, and as a share of it: other machines and kernels sum in another order
_TOLERANCES = {"float64": (1e-6, 1e-8), "float32": (1e-3, 1e-4)}
_TOLERANCE_OF_HALF = (0.1, 0.02)

Answer = Any


@dataclass(frozen=True)
class Replay:
    """What asking again gave.

    Attributes:
        is_equal: Whether every answer is the claimed one, bit for bit.
        max_difference: Largest difference of a log-likelihood in nats; None where there was none to compare.
        failed: Documents whose answers are not the model's, as `task document 17: why`.
        num_second_tries: Documents that gave another text or greedy choice, and were asked once more one at a time.
    """

    is_equal: bool
    max_difference: float | None
    failed: tuple[str, ...]
    num_second_tries: int


def replay_documents(
    loaded: LoadedModel, built: BuiltSuite, samples: Sequence[Sample], places: Sequence[int]
) -> Replay:
    """Ask for the documents at `places` of the suite's documents in order, and compare with `samples` in that order.

    A log-likelihood may differ by what rounding explains in the model's dtype. A text, or whether a continuation is the
    greedy one, has no tolerance: where it differs, the document is asked again one at a time, and must then be equal,
    or near a tie is no excuse.
    """
    documents = list(_documents(built))
    chosen = [documents[place] for place in places]
    claimed = [_claimed(samples[place]) for place in places]
    found = _ask(loaded, chosen)
    unequal = [number for number in range(len(chosen)) if _discrete(found[number]) != _discrete(claimed[number])]
    second = dict(zip(unequal, _ask_alone(loaded, [chosen[n] for n in unequal]), strict=True)) if unequal else {}
    failed, differences = [], []
    for number, (answers, claims) in enumerate(zip(found, claimed, strict=True)):
        differences += [abs(a - c) for a, c in zip(_numbers(answers), _numbers(claims), strict=True)]
        reason = _find_fault(answers, claims, second.get(number), str(loaded.execution.dtype))
        if reason:
            sample = samples[places[number]]
            failed.append(f"{sample.task} document {sample.index}: {reason}")
    is_equal = all(answers == claims for answers, claims in zip(found, claimed, strict=True))
    return Replay(is_equal, max(differences, default=None), tuple(failed), len(unequal))


def _documents(built: BuiltSuite) -> Iterator[list[Any]]:
    for each in built.tasks:
        yield from each.instances_by_document()


def _claimed(sample: Sample) -> list[Answer]:
    if sample.texts:
        return list(sample.texts)
    if sample.is_greedy:
        return list(zip(sample.log_likelihoods, sample.is_greedy, strict=True))
    return list(sample.log_likelihoods)


def _ask(loaded: LoadedModel, documents: Sequence[Sequence[Any]]) -> list[list[Answer]]:
    answer_instances(loaded.lm, [instance for document in documents for instance in document])
    return [[_plain(answer) for instance in document for answer in instance.resps] for document in documents]


def _ask_alone(loaded: LoadedModel, documents: Sequence[Sequence[Any]]) -> list[list[Answer]]:
    with running_one_at_a_time(loaded):
        return _ask(loaded, documents)


def _plain(answer: Answer) -> Answer:
    return (float(answer[0]), bool(answer[1])) if isinstance(answer, tuple | list) else answer


def _discrete(answers: Sequence[Answer]) -> list[Any]:
    return [answer[1] if isinstance(answer, tuple) else answer for answer in answers if not isinstance(answer, float)]


def _numbers(answers: Sequence[Answer]) -> list[float]:
    return [a[0] if isinstance(a, tuple) else a for a in answers if not isinstance(a, str)]


def _find_fault(
    answers: Sequence[Answer], claims: Sequence[Answer], second: Sequence[Answer] | None, dtype: str
) -> str:
    if len(answers) != len(claims):
        return f"{len(claims)} answers are claimed, {len(answers)} were given"
    absolute, relative = _TOLERANCES.get(dtype, _TOLERANCE_OF_HALF)
    for answer, claim in zip(_numbers(answers), _numbers(claims), strict=True):
        if abs(answer - claim) > absolute + relative * abs(answer):
            return f"the log-likelihood is {answer:.6g}, {claim:.6g} was claimed"
    if second is not None and _discrete(second) != _discrete(claims):
        differ = next((a, c) for a, c in zip(_discrete(second), _discrete(claims), strict=True) if a != c)
        return f"the answer is {_shorten(differ[0])}, {_shorten(differ[1])} was claimed"
    return ""


def _shorten(answer: Any) -> str:
    text = repr(answer)
    return text if len(text) <= 60 else f"{text[:57]}..."
