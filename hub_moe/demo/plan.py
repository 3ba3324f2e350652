"""Every number of the demo."""

from dataclasses import dataclass, field
from typing import Any

from ..training import TrainingPlan

# Steps are fixed, so that a run can be repeated exactly. Two cores of a 2021 server make about this many in a minute.
_STEPS_PER_MINUTE = 460


@dataclass(frozen=True)
class DemoPlan:
    """Equal plans on the same Python and machine give equal models.

    Args:
        training: Steps, batches, learning rate.
        seed: Of the split, the weights and the sampling of the completion.
        vocab_size: Of the tokenizer.
        block_length: Tokens per training block, and the context in which held-out tokens are scored.
        held_out_share: Of the files.
        corpus_bytes: Read no more text than this; None reads all.
        model_changes: Fields in which the model differs from the preset `nano`.
        curve_blocks: Held-out blocks that the points of the loss curve are taken on.
        prompt: What the finished model completes.
        completion_tokens: How many tokens it adds.
        tuning_steps: Optimizer steps of the contributor, who trains chosen experts on Python's language reference.
        tuning_top_p: Share of a layer's tokens that the chosen experts get together.
        tuning_learning_rate: Peak.
        tuning_held_out: Share of that text.
        suite: By which base and patch are evaluated.
        suite_limit: Documents of each task.
        verified_documents: Which a stranger asks again.
    """

    training: TrainingPlan
    seed: int = 0
    vocab_size: int = 4096
    block_length: int = 128
    held_out_share: float = 0.05
    corpus_bytes: int | None = None
    model_changes: dict[str, Any] = field(default_factory=dict)
    curve_blocks: int = 160
    prompt: str = "def fibonacci(n):\n"
    completion_tokens: int = 60
    tuning_steps: int = 120
    tuning_top_p: float = 0.3
    tuning_learning_rate: float = 4e-3
    tuning_held_out: float = 0.1
    suite: str = "offline"
    suite_limit: int = 40
    verified_documents: int = 30


def plan_demo(*, minutes: float, seed: int) -> DemoPlan:
    """The plan whose training takes about `minutes` on two cores."""
    steps = max(1, round(minutes * _STEPS_PER_MINUTE))
    return DemoPlan(training=TrainingPlan(steps=steps, batch_size=8, learning_rate=4e-3, seed=seed), seed=seed)
