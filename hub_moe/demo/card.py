"""The card of the demo's model, rendered by `hub_moe.cards` from what the run measured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from .. import __version__
from ..anatomy import Footprint
from ..cards import Facts, render_card
from ..cards.collect import describe_footprint, describe_license, hash_weights
from ..cards.facts import DatasetFacts, ExpertLoad, LayerLoad, ModelFacts, Picture, Training
from ..cards.readme import parse_readme
from ..training import measure_imbalance
from .plan import DemoPlan

_PROSE = """---
license: other
license_name: psf-2.0
---

# {model}: a small Mixture-of-Experts model of Python's standard library

## Intended use and limitations

A demonstration of `hub-moe demo`: trained from nothing in minutes, not a useful model.

## Bits per byte of held-out files

Self-reported; lower is better.

| | bits per byte |
| --- | ---: |
{rows}
"""


@dataclass(frozen=True)
class TrainedModel:
    """What the card is rendered from.

    Attributes:
        load: Tokens of each expert in the last tenth of training, by layer.
        bits_per_byte: Of the held-out files, under the model and each baseline.
    """

    name: str
    footprint: Footprint
    dataset: DatasetFacts
    steps: int
    load: Mapping[int, Tensor]
    bits_per_byte: Mapping[str, float]
    versions: Mapping[str, str]


def write_card(model: TrainedModel, plan: DemoPlan, *, folder: Path) -> None:
    """Write README.md and the facts into the model's folder, whose weights and pictures are there already."""
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in model.bits_per_byte.items())
    readme = parse_readme(_PROSE.format(model=model.name, rows=rows))
    facts = Facts(
        model=ModelFacts(model.name),
        architecture=describe_footprint(model.footprint.to_dict(context=plan.block_length)),
        expert_load=(_describe_load(model),),
        datasets=(model.dataset,),
        training=Training(
            method="pretrain",
            steps=model.steps,
            tokens=model.steps * plan.training.batch_size * plan.block_length,
            hyperparameters={**asdict(plan.training), "block_length": plan.block_length},
            versions=dict(model.versions),
        ),
        license=describe_license(readme.metadata, (), (model.dataset,)),
        weights=hash_weights(folder),
        pictures=(Picture("loss_curve.png", "training"), Picture("expert_load.png", "experts")),
        hub_moe_version=__version__,
    )
    render_card(facts, readme).write(folder / "README.md")


def _describe_load(model: TrainedModel) -> ExpertLoad:
    layers = tuple(
        LayerLoad(index, dead=int((load_E == 0).sum()), imbalance=float(measure_imbalance(load_E)), experts=len(load_E))
        for index, load_E in model.load.items()
    )
    return ExpertLoad("last tenth of the steps", model.dataset.name, "training run", layers)
