"""A card from facts: README blocks, front matter, `.eval_results`, the facts' own file and the documentation form."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ConfigError
from ..files.json_files import write_json
from .facts import FACTS_FILE, Facts
from .licences import NOT_LEGAL_ADVICE
from .markdown import Markdown, fill_template
from .metadata import RESULTS_FOLDER, build_eval_results, build_metadata, merge_metadata
from .readme import Part, Readme, make_block, parse_readme

_TEMPLATE = "README.md.jinja"
_FORM = "model_documentation_form.md.jinja"
_RELATIONS = {
    "finetune": "Fine-tuned from",
    "adapter": "An adapter for",
    "merge": "Merged from",
    "quantized": "Quantised from",
}
_HEADING = re.compile(r"^#{1,6}[ \t]+(.+)$", re.MULTILINE)
_USES = re.compile(r"\buses?\b|\busage\b|intended", re.IGNORECASE)
_LIMITS = re.compile(r"limit|bias|risk", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """What is written for a model: its README, and the texts of `.eval_results` by file name."""

    readme: Readme
    eval_results: Mapping[str, str]
    facts: Facts

    def write(self, readme_path: Path) -> None:
        """Write the README, and beside it the facts and `.eval_results`.

        Raises:
            OSError: If the folder cannot be written.
        """
        folder = readme_path.parent
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FACTS_FILE, self.facts.to_dict())
        for name, text in self.eval_results.items():
            (folder / RESULTS_FOLDER).mkdir(exist_ok=True)
            (folder / RESULTS_FOLDER / name).write_text(text, "utf-8")
        readme_path.write_bytes(str(self.readme).encode())


def render_card(
    facts: Facts, readme: Readme, *, previous: Facts | None = None, eval_results: Mapping[str, str] | None = None
) -> Card:
    """A card for `facts` in the place of `readme`, whose prose and own metadata stay.

    Args:
        facts: What the card says.
        readme: The one that is there, or an empty one.
        previous: The facts that it was rendered from, where it was.
        eval_results: The files of `.eval_results` that are there, by name.

    Raises:
        ConfigError: If metadata or a file of `.eval_results` are not of the Hub's form.
    """
    metadata = merge_metadata(
        readme.metadata, build_metadata(facts), previous=build_metadata(previous) if previous else {}
    )
    results = build_eval_results(facts, eval_results or {})
    return Card(_fill(facts, readme).with_metadata(metadata), results, facts)


def render_blocks(facts: Facts, prose: str) -> dict[str, str]:
    """The generated blocks of a README by name, markers included; those with nothing to say are left out."""
    return {part.name: part.text for part in _render(facts, prose).parts if part.name is not None}


def render_form(facts: Facts) -> str:
    """The General-Purpose AI Code of Practice's model documentation form, as far as the facts fill it."""
    return fill_template(_FORM, {"facts": facts, "training_compute": _training_flops(facts)}).strip() + "\n"


def read_eval_results(folder: Path) -> dict[str, str]:
    """The files of `.eval_results` in a model's folder, by name.

    Raises:
        ConfigError: If one is not UTF-8.
        OSError: If one cannot be read.
    """
    texts = {}
    for path in sorted((folder / RESULTS_FOLDER).glob("*.yaml")):
        try:
            texts[path.name] = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text ({error.reason}).") from error
    return texts


def find_undocumented(facts: Facts, prose: str) -> list[str]:
    """What the card does not say, once for each; people's own headings count for what no record can tell."""
    headings = " ".join(_HEADING.findall(prose))
    is_shape = facts.model.kind == "architecture"
    return list(dict.fromkeys(_missing(facts, headings, is_shape=is_shape)))


def _missing(facts: Facts, headings: str, *, is_shape: bool) -> Iterable[str]:
    of_any = {
        "intended uses": not _USES.search(headings),
        "limitations, biases and risks": not _LIMITS.search(headings),
        "licence": facts.license is None or facts.license.id is None,
        "parameters, operations and cache": facts.architecture is None,
        "training data": not facts.datasets,
        "training procedure and settings": facts.training is None,
    }
    measured = [energy for energy in facts.energy if energy.activity == "training" and energy.joules is not None]
    of_weights = {
        "hashes of the weights": not facts.weights,
        "evaluation results of these weights": not facts.evaluations,
        "comparison with the base": facts.base is not None and facts.comparison is None,
        "load of the experts": not facts.expert_load,
        "energy of training": not measured,
        "cost": all("usd" not in energy.details for energy in facts.energy),
    }
    yield from (name for name, is_missing in of_any.items() if is_missing)
    yield from (f"commit of {each.name}, which it was made from" for each in facts.lineage if not each.revision)
    for each in facts.datasets:
        if each.is_on_hub and not each.revision:
            yield f"revision of the dataset {each.name}"
        if each.tokens is None:
            yield f"tokens in the dataset {each.name}"
    yield from (name for name, is_missing in of_weights.items() if is_missing and not is_shape)


def _fill(facts: Facts, readme: Readme) -> Readme:
    if not "".join(part.text for part in readme.parts).strip():
        return replace(readme, parts=(Part("\n"), *_render(facts, "").parts))
    return readme.with_blocks(render_blocks(facts, readme.prose))


def _render(facts: Facts, prose: str) -> Readme:
    text = fill_template(
        _TEMPLATE,
        {
            "facts": facts,
            "relations": _RELATIONS,
            "snippet": Markdown(_write_snippet(facts)),
            "not_legal_advice": Markdown(NOT_LEGAL_ADVICE),
            "undocumented": find_undocumented(facts, prose),
        },
    )
    readme = parse_readme(text, where="The template")
    blocks = {part.name: _inside(part.text) for part in readme.parts if part.name is not None}
    title = readme.parts[0].text.strip()
    filled = [make_block(name, inside) for name, inside in blocks.items() if inside]
    return parse_readme("\n".join([f"{title}\n", *filled]), where="The template")


def _inside(block: str) -> str:
    return "\n".join(block.splitlines()[1:-1]).strip()


def _write_snippet(facts: Facts) -> str:
    owner, _, rest = facts.model.name.partition("/")
    repo, _, inside = rest.partition("/")  # a patch in its base's repo: OWNER/NAME/patches/law
    name = json.dumps(f"{owner}/{repo}" if inside else facts.model.name, ensure_ascii=False)
    name += f", subfolder={json.dumps(inside, ensure_ascii=False)}" if inside else ""
    if facts.model.kind == "adapter":
        return f"from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained({name})"
    is_ours = (
        facts.model.kind == "expert_patch" or (facts.architecture or facts).__dict__.get("model_type") == "hub_moe"
    )
    lines = ["import hub_moe.modeling"] if is_ours else []
    lines += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({name})",
        f"tokenizer = AutoTokenizer.from_pretrained({name})",
    ]
    return "\n".join(lines)


def _training_flops(facts: Facts) -> int | None:
    if facts.architecture is None or facts.training is None:
        return None
    return facts.architecture.training_flops * facts.training.tokens
