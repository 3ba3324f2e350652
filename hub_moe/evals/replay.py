"""Some documents of a record, asked again: are the answers this model's?

Shape letters: L tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch

from .claim_checks import answers_of
from .models import LoadedModel, running_one_at_a_time
from .records import Sample
from .run import answer_instances
from .scoring import score_task
from .tasks import BuiltSuite, BuiltTask

# Rounding of a log-likelihood in nats, as a part that does not grow and a share: other machines and kernels sum in
# another order, and a token that goes to another expert changes more than the last bits. Tiny models of four families
# differ by 1e-7 of a log-likelihood among kernels and batch sizes in float32, and by 0.6 % from float32 in bfloat16.
_TOLERANCES = {"float64": (1e-6, 1e-9), "float32": (1e-3, 1e-5)}
_TOLERANCE_OF_HALF = (0.1, 0.01)
# a one-sided share of changed scores that rounding, which knows no sides, gives once in a thousand records
_SUSPICIOUS = 1e-3

Answer = Any


@dataclass(frozen=True)
class Replay:
    """What asking again gave.

    Attributes:
        is_equal: Whether every answer is the claimed one, bit for bit.
        max_difference: Largest difference of a log-likelihood in nats; None where there was none to compare.
        failed: Documents whose answers are not the model's, as `task document 17: why`.
        num_near_ties: Documents with another text or greedy choice that rounding explains.
        num_lower, num_higher: Documents that were right or wrong by the record, and are the other by what rounding
            allows: worse than claimed, and better.
        is_one_sided: Whether so many of these lie on the side that flatters the claim that rounding is no excuse.
    """

    is_equal: bool
    max_difference: float | None
    failed: tuple[str, ...]
    num_near_ties: int = 0
    num_lower: int = 0
    num_higher: int = 0
    is_one_sided: bool = False


def replay_documents(
    loaded: LoadedModel, built: BuiltSuite, samples: Sequence[Sample], places: Sequence[int]
) -> Replay:
    """Ask for the documents at `places` of the suite's documents in order, and compare with `samples` in that order.

    A log-likelihood may differ by what rounding explains in the model's dtype. Another text or greedy choice passes
    only where each token of it was within rounding of the likeliest one.
    """
    documents = [instances for each in built.tasks for instances in each.instances_by_document()]
    chosen = [documents[place] for place in places]
    claimed = [answers_of(samples[place]) for place in places]
    found = _ask(loaded, chosen)
    second = _ask_again_alone(loaded, chosen, found, claimed)
    failed, differences, num_near_ties = [], [], 0
    for number, (answers, claims) in enumerate(zip(found, claimed, strict=True)):
        differences += [abs(a - c) for a, c in zip(_numbers(answers), _numbers(claims), strict=True)]
        fault = _find_number_fault(answers, claims, loaded)
        if not fault and number in second:
            fault = _find_choice_fault(loaded, chosen[number], second[number], claims)
            num_near_ties += not fault
        if fault:
            sample = samples[places[number]]
            failed.append(f"{sample.task} document {sample.index}: {fault}")
    lower, higher = _count_other_scores(built, samples, set(places))
    return Replay(
        is_equal=found == claimed,
        max_difference=max(differences, default=None),
        failed=tuple(failed),
        num_near_ties=num_near_ties,
        num_lower=lower,
        num_higher=higher,
        is_one_sided=_chance_of_sides(lower, higher) < _SUSPICIOUS,
    )


def _ask(loaded: LoadedModel, documents: Sequence[Sequence[Any]]) -> list[list[Answer]]:
    answer_instances(loaded.lm, [instance for document in documents for instance in document])
    return [[_plain(answer) for instance in document for answer in instance.resps] for document in documents]


def _ask_again_alone(
    loaded: LoadedModel,
    documents: Sequence[Sequence[Any]],
    found: Sequence[Sequence[Answer]],
    claimed: Sequence[Sequence[Answer]],
) -> dict[int, list[Answer]]:
    """Answers at batch size 1 to the documents with another text or greedy choice, by place."""
    unequal = [n for n in range(len(documents)) if _choices(found[n]) != _choices(claimed[n])]
    if not unequal:
        return {}
    with running_one_at_a_time(loaded):
        return dict(zip(unequal, _ask(loaded, [documents[n] for n in unequal]), strict=True))


def _plain(answer: Answer) -> Answer:
    return (float(answer[0]), bool(answer[1])) if isinstance(answer, tuple | list) else answer


def _choices(answers: Sequence[Answer]) -> list[Any]:
    return [answer[1] if isinstance(answer, tuple) else answer for answer in answers if not isinstance(answer, float)]


def _numbers(answers: Sequence[Answer]) -> list[float]:
    return [a[0] if isinstance(a, tuple) else a for a in answers if not isinstance(a, str)]


def _tolerance(loaded: LoadedModel) -> tuple[float, float]:
    return _TOLERANCES.get(str(loaded.execution.dtype), _TOLERANCE_OF_HALF)


def _find_number_fault(answers: Sequence[Answer], claims: Sequence[Answer], loaded: LoadedModel) -> str:
    absolute, relative = _tolerance(loaded)
    for answer, claim in zip(_numbers(answers), _numbers(claims), strict=True):
        if not abs(answer - claim) <= absolute + relative * abs(answer):  # NaN is within nothing
            return f"the log-likelihood is {answer:.6g}, {claim:.6g} was claimed"
    return ""


def _find_choice_fault(
    loaded: LoadedModel, instances: Sequence[Any], answers: Sequence[Answer], claims: Sequence[Answer]
) -> str:
    asked = [instance for instance in instances for _ in range(instance.repeats or 1)]
    for instance, answer, claim in zip(asked, _choices(answers), _choices(claims), strict=True):
        if answer != claim and not _is_near_tie(loaded, instance, claim):
            return f"the answer is {_shorten(answer)}, {_shorten(claim)} was claimed"
    return ""


def _is_near_tie(loaded: LoadedModel, instance: Any, claim: Any) -> bool:
    """Whether rounding can have chosen what was claimed: no token lies further from the likeliest one than that."""
    absolute, _ = _tolerance(loaded)
    context, rest = instance.args
    if isinstance(claim, str):
        ends = _possible_ends(loaded, claim, rest)
        return any(max(_measure_gaps(loaded, context, claim + end), default=0.0) <= absolute for end in ends)
    gaps = _measure_gaps(loaded, context, rest)
    return max(gaps) <= absolute if claim else max(gaps) > 0 or min(map(abs, gaps)) <= absolute


def _possible_ends(loaded: LoadedModel, text: str, settings: Any) -> list[str]:
    """What the model said next for the text to stop there; nothing where it was stopped by its length."""
    lm = loaded.lm
    until = settings.get("until") or []
    ends = [
        *([until] if isinstance(until, str) else until),
        lm.tok_decode([lm.eot_token_id], skip_special_tokens=False),
    ]
    longest = int(settings.get("max_gen_toks", lm.max_gen_toks))
    is_cut = len(lm.tok_encode(text, add_special_tokens=False)) >= longest - 1  # cut where two tokens may have been one
    return [*ends, ""] if is_cut else ends


def _measure_gaps(loaded: LoadedModel, context: str, continuation: str) -> list[float]:
    """For each token of the continuation, by how many nats the likeliest other token is ahead of it; 0 or less where
    it is the likeliest itself."""
    lm = loaded.lm
    if context:
        before, after = lm._encode_pair(context, continuation)
    else:
        before, after = [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)
    tokens = (before + after)[-(lm.max_length + 1) :]
    logits_LV = lm._model_call(torch.tensor([tokens[:-1]], device=lm.device))[0, -len(after) :].float()
    chosen_L1 = torch.tensor(after, device=logits_LV.device)[:, None]
    own_L = logits_LV.gather(1, chosen_L1)[:, 0]
    others_L = logits_LV.scatter(1, chosen_L1, float("-inf")).amax(dim=1)
    return [float(gap) for gap in others_L - own_L]


def _count_other_scores(built: BuiltSuite, samples: Sequence[Sample], places: set[int]) -> tuple[int, int]:
    """How many documents at `places` are worse, and better, by the answers in the instances than was claimed."""
    lower = higher = place = 0
    for each in built.tasks:
        metric = each.main_metric
        sign = 1 if _is_higher_better(each) else -1
        for sample in score_task(each).samples:
            if place in places and metric in sample.scores:
                now, claimed = sample.scores[metric], samples[place].scores[metric]
                if {now, claimed} == {0, 1}:  # sums of log-likelihoods may round to one side
                    lower += sign * now < sign * claimed
                    higher += sign * now > sign * claimed
            place += 1
    return lower, higher


def _is_higher_better(built: BuiltTask) -> bool:
    return next(metric.higher_is_better for metric in built.metrics if metric.name == built.main_metric)


def _chance_of_sides(lower: int, higher: int) -> float:
    """The chance of at least `lower` of all on one side, where both are alike."""
    total = lower + higher
    return float(sum(comb(total, number) for number in range(lower, total + 1)) / 2**total)


def _shorten(answer: Any) -> str:
    text = repr(answer)
    return text if len(text) <= 60 else f"{text[:57]}..."
