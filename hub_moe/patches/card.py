"""The model card of a patch or of a merged checkpoint, rendered from the metadata and nothing else."""

import json
from pathlib import Path
from typing import Any

from .metadata import Combination, PatchMetadata

_PARTS = {
    "shared_experts": "shared experts",
    "non_expert_modules": "non-expert modules",
    "balancing_bias": "balancing bias",
}


def render_card(metadata: PatchMetadata) -> str:
    """README.md of a patch, with the front matter by which the Hub lists it under its base."""
    return "\n".join(
        [
            _front_matter(metadata, "adapter", "expert-patch"),
            "# Expert patch",
            "",
            f"Changes {describe_extent(metadata)} of {_describe_base(metadata)}.",
            "Loading it loads the base first, and checks each tensor before it is replaced.",
            "",
            "```python",
            "import hub_moe.modeling",
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("OWNER/THIS-REPO")',
            "```",
            "",
            *_details(metadata),
        ]
    )


def render_merged_card(metadata: PatchMetadata) -> str:
    """README.md of a full checkpoint with the patch merged in."""
    return "\n".join(
        [
            _front_matter(metadata, "finetune", "expert-patch-merged"),
            "# Model with a merged expert patch",
            "",
            f"{_describe_base(metadata).capitalize()}, with {describe_extent(metadata)} changed by an expert patch.",
            "The hashes of all other tensors were compared and are those of the base.",
            "",
            *_details(metadata),
        ]
    )


def describe_extent(metadata: PatchMetadata) -> str:
    """`12 routed experts in 3 layers and the shared experts (1,234,567 numbers)`."""
    layers = len(metadata.experts)
    parts = [f"{metadata.num_experts} routed experts in {layers} layer{'s' * (layers != 1)}"] if layers else []
    parts += [f"the {label}" for field, label in _PARTS.items() if getattr(metadata, field)]
    return f"{' and '.join(parts)} ({metadata.num_parameters:,} numbers)"


def _front_matter(metadata: PatchMetadata, relation: str, tag: str) -> str:
    fields: dict[str, Any] = {}
    if metadata.base.commit:  # the Hub knows no folders
        fields |= {"base_model": metadata.base.repo, "base_model_relation": relation}
    fields |= {"library_name": "hub_moe", "pipeline_tag": "text-generation", "tags": [tag, "mixture-of-experts"]}
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def _describe_base(metadata: PatchMetadata) -> str:
    base = metadata.base
    if base.commit is None:  # of a folder only the last name: where it lies is nobody's business
        return f"the base {_code(Path(base.repo).name)} (a folder, whose commit is not known)"
    return f"the base {_code(base.repo)} at commit `{base.commit}`"


def _details(metadata: PatchMetadata) -> list[str]:
    lines = ["| Layer | Experts |", "| ---: | --- |"] if metadata.experts else []
    lines += [f"| {layer} | {', '.join(map(str, chosen))} |" for layer, chosen in metadata.experts.items()]
    lines += _describe_combination(metadata.combination)
    if metadata.rebased_from:
        earlier = ", ".join(
            f"{_code(base.repo)} at commit `{base.commit}`" for base in metadata.rebased_from if base.commit
        )
        lines += ["", f"Made for {earlier or 'a folder'}; what it changes is the same in the base above."]
    if metadata.selection is not None:
        facts = {
            "method": metadata.selection.method,
            "score": metadata.selection.score,
            "top_p": metadata.selection.top_p,
            "share of all experts": metadata.selection.share,
            "expert profile (sha256)": metadata.selection.profile_sha256,
        }
        chosen_by = [f"{name} {_code(str(value))}" for name, value in facts.items() if value is not None]
        lines += ["", f"How the experts were chosen: {', '.join(chosen_by)}."]
    if metadata.training:
        facts_of_training = json.dumps(dict(metadata.training), indent=2, ensure_ascii=False)
        lines += ["", "## Training", "", "```json", facts_of_training, "```"]
    lines += [
        "",
        f"Made with hub_moe {metadata.hub_moe_version}; `expert_patch.json` has the hash of every tensor.",
        "",
    ]
    return lines


def _describe_combination(combination: Combination | None) -> list[str]:
    if combination is None:
        return []
    settings = {"density": combination.density, "seed": combination.seed}
    given = "".join(f", {name} {value}" for name, value in settings.items() if value is not None)
    how = "without a conflict" if combination.method == "refuse" else f"by {_code(combination.method)}{given}"
    return [
        "",
        "## Contributors",
        "",
        f"Combined from these patches {how}:",
        "",
        "| Patch | Commit | Weight | sha256 of its weights |",
        "| --- | --- | ---: | --- |",
        *_contributor_rows(combination, depth=0),
    ]


def _contributor_rows(combination: Combination, depth: int) -> list[str]:
    rows = []
    for each in combination.contributors:
        name = f"{'↳ ' * depth}{_code(each.name).replace('|', ' ')}"
        rows.append(f"| {name} | {each.revision or 'a folder'} | {each.weight:g} | `{each.weights_sha256}` |")
        rows += _contributor_rows(each.combination, depth + 1) if each.combination else []
    return rows


def _code(text: str) -> str:
    """Text from a file of somebody else, which no markup may leave."""
    return f"`{' '.join(text.split()).replace('`', ' ')}`"
