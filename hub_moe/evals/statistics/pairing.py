"""Two models' scores on the same documents and prompts, joined by document; anything else is refused."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import EvaluationError
from .estimates import check_numbers


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """One model's scores on one task, one per document, in any order.

    Attributes:
        documents: Id of each document, the same for every model, such as the hash of its content.
        prompts: Hash of all that the model was shown for the document.
        scores: A score per document; where `sizes` are given, a sum over the document, such as its bits or nats.
        sizes: What the scores are divided by in total, such as bytes or tokens. None: the mean over documents.
        groups: What documents belong together, such as a passage or subject. None: each stands alone.
    """

    documents: Sequence[str]
    prompts: Sequence[str]
    scores: Sequence[float] | npt.NDArray[np.float64]
    sizes: Sequence[float] | npt.NDArray[np.float64] | None = None
    groups: Sequence[str] | None = None

    def __post_init__(self) -> None:
        columns = {"prompts": self.prompts, "scores": self.scores, "sizes": self.sizes, "groups": self.groups}
        for name, column in columns.items():
            if column is not None and len(column) != len(self.documents):
                raise EvaluationError(f"{len(self.documents)} documents have {len(column)} {name}; give one for each.")
        twice = [document for document, count in Counter(self.documents).items() if count > 1]
        if twice:
            raise EvaluationError(f"Each document must be scored once, but {_name_some(twice)} occur more often.")
        object.__setattr__(self, "scores", check_numbers(self.scores, "score"))
        if self.sizes is not None:
            object.__setattr__(self, "sizes", check_numbers(self.sizes, "size"))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Scores of a base and a candidate on the same documents, ordered by document id."""

    documents: tuple[str, ...]
    base: npt.NDArray[np.float64]
    candidate: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.float64] | None = None
    groups: tuple[str, ...] | None = None

    @property
    def differences(self) -> npt.NDArray[np.float64]:
        """Candidate minus base, by document."""
        return self.candidate - self.base


def pair_scores(base: DocumentScores, candidate: DocumentScores) -> Pairs:
    """Join by document id. The order of the documents does not matter.

    Raises:
        EvaluationError: If the two models saw different documents or prompts, or these are sized or grouped
            differently: their difference would then say something about the question, not the model.
    """
    _check_same_documents(set(base.documents), set(candidate.documents))
    rows, others = _order(base), _order(candidate)
    documents = tuple(base.documents[row] for row in rows)
    for name, advice in _ADVICE.items():
        where = _find_difference(documents, _column(base, name, rows), _column(candidate, name, others))
        if where:
            raise EvaluationError(f"The {name} differ for {where}; {advice}.")
    groups = None if base.groups is None else tuple(base.groups[row] for row in rows)
    sizes = None if base.sizes is None else np.asarray(base.sizes)[rows]
    return Pairs(documents, np.asarray(base.scores)[rows], np.asarray(candidate.scores)[others], sizes, groups)


_ADVICE = {
    "prompts": "run both models with the same few-shot examples, chat template and task version",
    "sizes": "compare models with different tokenizers in bits per byte, not per token",
    "groups": "take both from the same revision of the dataset",
}


def _order(scores: DocumentScores) -> list[int]:
    return sorted(range(len(scores.documents)), key=lambda row: scores.documents[row])


def _column(scores: DocumentScores, name: str, rows: Sequence[int]) -> list[object] | None:
    column = getattr(scores, name)
    return None if column is None else [column[row] for row in rows]


def _check_same_documents(base: set[str], candidate: set[str]) -> None:
    for ours, theirs, whose in ((base, candidate, "base"), (candidate, base, "candidate")):
        alone = sorted(ours - theirs)
        if alone:
            raise EvaluationError(
                f"{len(alone)} documents were scored for the {whose} only: {_name_some(alone)}; "
                f"the base has {len(base)} and the candidate {len(candidate)}, and they must be the same."
            )


def _find_difference(
    documents: Sequence[str], base: Sequence[object] | None, candidate: Sequence[object] | None
) -> str | None:
    """Where two columns differ, in words."""
    if base is None or candidate is None:
        return None if base is candidate else "all documents, as one of the models has none"
    differ = [document for document, one, other in zip(documents, base, candidate, strict=True) if one != other]
    return f"{len(differ)} of {len(documents)} documents, {_name_some(differ)}" if differ else None


def _name_some(names: Collection[str]) -> str:
    first = ", ".join(repr(name) for name in list(names)[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first
