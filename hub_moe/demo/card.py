"""The card of the demo's model, rendered from what the run measured."""

from collections.abc import Mapping

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [moe, hub_moe]
datasets: [{dataset}]
license: other
license_name: psf-2.0
---

# {model}: a small Mixture-of-Experts model of Python's standard library

{total:,} parameters, of which a token passes through {active:,}. Trained from nothing by `hub-moe demo` on
{tokens:,} tokens of [{dataset}](/datasets/{dataset}): a demonstration, not a useful model.

```python
import hub_moe.modeling
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{model}")
tokenizer = AutoTokenizer.from_pretrained("{model}")
```

## Bits per byte of held-out files

Self-reported; lower is better.

| | bits per byte |
| --- | ---: |
{rows}

![Training and held-out loss over tokens](loss_curve.png)

## Balance of the experts

No expert of a layer received more than {imbalance:.2f} times its share of the tokens in the last tenth of training.

![Tokens per expert in the first and the last tenth of training](expert_load.png)
"""


def render_card(
    *,
    model: str,
    dataset: str,
    parameters: Mapping[str, int],
    tokens: int,
    bits_per_byte: Mapping[str, float],
    imbalance: float,
) -> str:
    """README.md of the model: `parameters` has `total`, `active`; `imbalance` is the busiest expert over the mean."""
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in bits_per_byte.items())
    return _CARD.format(
        model=model,
        dataset=dataset,
        total=parameters["total"],
        active=parameters["active"],
        tokens=tokens,
        rows=rows,
        imbalance=imbalance,
    )
