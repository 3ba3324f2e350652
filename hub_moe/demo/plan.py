"""Every number of the demo, and who is who."""

from dataclasses import asdict, dataclass, field
from typing import Any

OWNER, ALICE, BOB, MALLORY = "demo", "alice", "bob", "mallory"
CONTRIBUTORS = (ALICE, BOB, MALLORY)
PEOPLE = (OWNER, *CONTRIBUTORS)
DATASET = f"{OWNER}/python-stdlib"
MODEL = f"{OWNER}/nano"

# Steps are fixed, so that a run can be repeated exactly. Two cores of a 2021 server make about this many in a minute.
_STEPS_PER_MINUTE = 500


@dataclass(frozen=True)
class Domain:
    """What a contributor is good at.

    Args:
        name: Of the patch, the suite that shows what it gains, and the file of rows.
        about: In words, for the terminal.
        entry: The entry of the suite `offline` that is the domain's task.
        num_documents: Of that task that are asked; None asks all.
        rehearsal_share: Of the bytes of the rows that are the base's own text, so that it forgets less.
        steps: Optimizer steps.
        learning_rate: Peak.
    """

    name: str
    about: str
    entry: str
    num_documents: int | None = None
    rehearsal_share: float = 0.0
    steps: int = 80
    learning_rate: float = 2e-3


MODULES = Domain("modules", "small Python modules", "running_text")
SORTING = Domain("sorting", "sorted lists", "sorting", rehearsal_share=0.5, learning_rate=1e-3)


@dataclass(frozen=True)
class DemoPlan:
    """Equal plans on the same Python and machine give equal models.

    Args:
        steps: Optimizer steps of the base.
        batch_size: Rows of a step, everywhere.
        learning_rate: Peak, of the base.
        seed: Of the split, the weights and the order of the rows.
        vocab_size: Of the tokenizer.
        block_length: Tokens of a row, and the context in which held-out tokens are scored.
        held_out_share: Of the files.
        corpus_bytes: Read no more text than this; None reads all.
        model_changes: Fields in which the model differs from the preset `nano`.
        evaluations: How often the base's held-out loss is taken while training.
        domains: Of the two honest contributors.
        rows: Of a domain that a contributor makes up.
        top_p: Share of a layer's tokens that the chosen experts get together.
        general_limit: Documents of each task of the suite that the base is published with.
        reviewed_documents: Of each record that the reviewer asks again.
        tolerance: By what share a patch may cost the base elsewhere.
        method: What becomes of experts that both patches change.
        prompt: What the merged model completes.
        completion_tokens: How many tokens it adds.
    """

    steps: int
    batch_size: int = 8
    learning_rate: float = 4e-3
    seed: int = 0
    vocab_size: int = 4096
    block_length: int = 128
    held_out_share: float = 0.02
    corpus_bytes: int | None = None
    model_changes: dict[str, Any] = field(default_factory=dict)
    evaluations: int = 10
    domains: tuple[Domain, Domain] = (MODULES, SORTING)
    rows: int = 400
    top_p: float = 0.2
    general_limit: int = 40
    reviewed_documents: int = 30
    tolerance: float = 0.05
    method: str = "mean"
    prompt: str = "def fibonacci(n):\n"
    completion_tokens: int = 60

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "domains": [asdict(each) for each in self.domains]}


def plan_demo(*, minutes: float, seed: int) -> DemoPlan:
    """The plan whose base trains for about `minutes` on two cores."""
    return DemoPlan(steps=max(1, round(minutes * _STEPS_PER_MINUTE)), seed=seed)
