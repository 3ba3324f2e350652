"""Measures the expert profile of a model on a sample of a task's own rows.

Shape letters: B batch, L sequence.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import ExpertProfile, record_routing
from ..data import LoadedRows, prepare

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """Rows to measure on: tokenized, in the order they are run, `batch_size` at once by `collator`.

    `dataset` says where they are from and how they were drawn, for the profile.
    """

    rows: Sequence[Mapping[str, Tensor]]
    collator: Callable[[Sequence[Any]], Batch]
    batch_size: int
    dataset: Mapping[str, Any]

    @property
    def num_batches(self) -> int:
        """Batches that `batches` gives."""
        return -(-len(self.rows) // self.batch_size)

    def batches(self) -> Iterator[Batch]:
        """The rows in batches, the last one smaller."""
        for start in range(0, len(self.rows), self.batch_size):
            yield self.collator(self.rows[start : start + self.batch_size])


def draw_sample(
    rows: LoadedRows,
    tokenizer: Any,
    *,
    num_rows: int,
    max_length: int,
    batch_size: int,
    seed: int = 0,
    allow_bad_rows: float = 0.0,
) -> Sample:
    """`num_rows` of the rows, or all there are, prepared as for training without packing.

    Which ones depends on `seed` and on the rows' content, not on their order. Duplicates are left out.

    Raises:
        DatasetError: If the rows do not fit, as `prepare` says.
    """
    prepared = prepare(rows, tokenizer, max_length=max_length, packing=False, seed=seed, allow_bad_rows=allow_bad_rows)
    chosen = [prepared.train[place] for place in range(min(num_rows, len(prepared.train)))]
    dataset = {**rows.provenance.to_dict(), "rows": len(chosen), "max_length": max_length, "seed": seed}
    return Sample(chosen, prepared.collator(), batch_size, dataset)


def profile_experts(
    model: Any,
    sample: Sample,
    *,
    name: str,
    domain: str,
    revision: str | None = None,
    output_norms: bool = False,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> ExpertProfile:
    """What the experts of a transformers model do on a sample, in evaluation mode and without gradients.

    The model's training mode is as before afterwards. `name` is the model's in the profile, `revision` the
    commit that it was loaded from. `on_batch` hears how many batches are done, and of how many. In distributed runs
    give each process its own rows, and call `reduce` on the profile.

    Raises:
        UnsupportedModelError: If the model has no experts that hub_moe finds.
        ConfigError: If the model's routing is not finite.
    """
    with eval_mode(model), torch.no_grad(), record_routing(model, output_norms=output_norms) as routing:
        for done, batch in enumerate(sample.batches()):
            on_batch(done, sample.num_batches)
            _run_decoder(model, batch)
    on_batch(sample.num_batches, sample.num_batches)
    return ExpertProfile.from_routing(
        routing,
        model=name,
        revision=revision,
        domain=domain,
        dataset=sample.dataset,
        num_sequences=len(sample.rows),
    )


def _run_decoder(model: Any, batch: Batch) -> None:
    """The model without its head: logits of a large vocabulary take more memory than all the rest, for nothing."""
    decoder: nn.Module = getattr(model, "base_model", model)
    device = model.get_input_embeddings().weight.device
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if device.type != "meta":  # else accelerate has offloaded the embedding and moves its inputs itself
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    decoder(**{**inputs, "use_cache": False})


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
