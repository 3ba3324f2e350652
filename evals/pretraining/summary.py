"""From the records of single runs to means, paired differences and what they say about the papers' claims."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import ARMS
from scipy import stats

CONFIDENCE = 0.95
MEASURES = {"held_out_loss": "held-out loss", "imbalance": "load imbalance"}
_DECIMALS = 4

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """`arm` against `against` by one measure; `claim` says who expects `arm` to be lower, None that nobody does."""

    arm: str
    against: str
    measure: str
    claim: str | None


_MOE = "experts beat a dense model of equal operations (arXiv:2401.06066)"
_FINE = "fine-grained and shared experts beat coarse ones of equal size (arXiv:2401.06066)"
_LOSS_FREE_LOSS = "loss-free balancing costs less quality than an aux loss (arXiv:2408.15664)"
_LOSS_FREE_LOAD = "loss-free balancing is more even than an aux loss (arXiv:2408.15664)"
_AUX_COSTS = "an aux loss costs quality (arXiv:2408.15664)"
_BALANCES = "balancing makes the load more even"

COMPARISONS = (
    Comparison("coarse-aux", "dense", "held_out_loss", _MOE),
    Comparison("fine-lossfree", "dense", "held_out_loss", _MOE),
    Comparison("fine-aux", "dense", "held_out_loss", _MOE),
    Comparison("fine-aux", "coarse-aux", "held_out_loss", _FINE),
    Comparison("fine-lossfree", "coarse-lossfree", "held_out_loss", _FINE),
    Comparison("fine-none", "coarse-none", "held_out_loss", _FINE),
    Comparison("fine-lossfree", "fine-aux", "held_out_loss", _LOSS_FREE_LOSS),
    Comparison("coarse-lossfree", "coarse-aux", "held_out_loss", _LOSS_FREE_LOSS),
    Comparison("fine-none", "fine-aux", "held_out_loss", _AUX_COSTS),
    Comparison("fine-lossfree", "fine-none", "held_out_loss", None),
    Comparison("fine-lossfree", "fine-aux", "imbalance", _LOSS_FREE_LOAD),
    Comparison("coarse-lossfree", "coarse-aux", "imbalance", _LOSS_FREE_LOAD),
    Comparison("fine-lossfree", "fine-none", "imbalance", _BALANCES),
    Comparison("fine-aux", "fine-none", "imbalance", _BALANCES),
)


def read_records(folder: Path) -> list[Record]:
    """All finished runs in `folder`, in the order of their names."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Per text: the arms in the order of `ARMS`, and every comparison whose two arms have a seed in common."""
    by_text: dict[str, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        by_text[record["text"]][record["arm"]][record["seed"]] = record
    return {text: _summarise_text(by_arm) for text, by_arm in sorted(by_text.items(), reverse=True)}


def compare_paired(values: Mapping[int, float], against: Mapping[int, float]) -> dict[str, Any]:
    """Mean over the common seeds of `values - against`, and its t interval; one seed has no interval."""
    seeds = sorted(values.keys() & against.keys())
    differences = [values[seed] - against[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    result: dict[str, Any] = {"seeds": seeds, "difference": round(mean, _DECIMALS), "interval": None, "is_clear": None}
    if len(seeds) > 1:
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, df=len(seeds) - 1))
        half_width = quantile * statistics.stdev(differences) / math.sqrt(len(seeds))
        result["interval"] = [round(mean - half_width, _DECIMALS), round(mean + half_width, _DECIMALS)]
        result["is_clear"] = abs(mean) > half_width
    return result


def judge(difference: float, is_clear: bool | None, claim: str | None) -> str:
    """What a difference says about a claim that it is below 0."""
    if is_clear is None:
        return "one seed only"
    if not is_clear:
        return "within seed noise"
    if claim is None:
        return "lower" if difference < 0 else "higher"
    return "agrees" if difference < 0 else "contradicts"


def _summarise_text(by_arm: Mapping[str, Mapping[int, Record]]) -> dict[str, Any]:
    present = [name for name in ARMS if name in by_arm]
    values = {name: {key: _by_seed(by_arm[name], key) for key in MEASURES} for name in present}
    any_record = next(iter(by_arm[present[0]].values()))
    return {
        "corpus": any_record["settings"]["corpus"],
        "tokens": any_record["tokens"],
        "arms": {name: _summarise_arm(list(by_arm[name].values()), values[name]) for name in present},
        "comparisons": [
            _compare(comparison, values)
            for comparison in COMPARISONS
            if comparison.arm in values
            and comparison.against in values
            and values[comparison.arm][comparison.measure].keys()
            & values[comparison.against][comparison.measure].keys()
        ],
    }


def _by_seed(runs: Mapping[int, Record], measure: str) -> dict[int, float]:
    """The last held-out loss, or the imbalance of the worst layer; nothing for a model without experts."""
    if measure == "held_out_loss":
        return {seed: run["held_out_losses"][-1]["loss"] for seed, run in runs.items()}
    return {seed: max(run["imbalance"]) for seed, run in runs.items() if run["imbalance"]}


def _summarise_arm(runs: Sequence[Record], values: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    cost = runs[0]["cost"]
    return {
        "title": ARMS[runs[0]["arm"]].title,
        "seeds": sorted(run["seed"] for run in runs),
        **cost,
        **{key: _describe(list(by_seed.values())) for key, by_seed in values.items()},
        "dead_experts": _describe([sum(run["dead_experts"]) for run in runs if run["layers"]]),
    }


def _describe(values: Sequence[float]) -> dict[str, float | None] | None:
    if not values:
        return None
    deviation = round(statistics.stdev(values), _DECIMALS) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), _DECIMALS), "deviation": deviation}


def _compare(comparison: Comparison, values: Mapping[str, Mapping[str, Mapping[int, float]]]) -> dict[str, Any]:
    measure = comparison.measure
    paired = compare_paired(values[comparison.arm][measure], values[comparison.against][measure])
    verdict = judge(paired["difference"], paired["is_clear"], comparison.claim)
    return {
        "arm": comparison.arm,
        "against": comparison.against,
        "measure": measure,
        "claim": comparison.claim,
        **paired,
        "verdict": verdict,
    }
