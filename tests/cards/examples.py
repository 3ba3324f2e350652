"""A model's folder with records, and facts made by hand."""

import hashlib
import statistics
from dataclasses import replace

from hub_moe.cards import (
    Evidence,
    collect_facts,
    find_evidence,
    open_model,
    read_eval_results,
    read_readme,
    render_card,
)
from hub_moe.cards.facts import (
    Ancestor,
    Architecture,
    ChangedKind,
    DatasetFacts,
    Energy,
    ExpertLoad,
    Facts,
    LayerLoad,
    ModelFacts,
    PatchFacts,
    Training,
)
from hub_moe.evals.records import DatasetSource, ModelSource, write_record

from ..evals.records.examples import make_record, make_samples

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RIGHT_AND_WRONG = (1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0)
FRONT_MATTER = "---\nlicense: mit\n---\n"

SIZES = Architecture(
    model_type="hub_moe",
    layers=3,
    moe_layers=2,
    experts=8,
    experts_per_token=2,
    has_shared_experts=True,
    total=53904,
    active=31376,
    active_with_embeddings=35472,
    per_expert=1536,
    context=256,
    forward_flops=185_000,
    training_flops=555_000,
    kv_bytes_per_token=120,
    max_context=256,
)

WHOLE = Facts(
    model=ModelFacts("alice/law"),
    architecture=SIZES,
    expert_load=(
        ExpertLoad("law", "alice/laws at 0123", "expert profile", (LayerLoad(1, 2, 3.5, experts=8, entropy=0.8),), 500),
        ExpertLoad("last logged steps", "alice/laws", "training run", (LayerLoad(1, 0, 1.5),)),
    ),
    lineage=(Ancestor("alice/base", "finetune", COMMIT, "mit"), Ancestor("bob/root", "finetune")),
    datasets=(DatasetFacts("alice/laws", True, COMMIT, "default", "train", 40, 1200, license="cc-by-4.0"),),
    training=Training(
        method="experts",
        steps=8,
        tokens=1724,
        hyperparameters={"training.learning_rate": 0.01},
        loss_before=4.9119,
        loss_after=4.5588,
        wall_s=75.0,
        processes=1,
        changes=(ChangedKind("routed_experts", 48, 18, 18, "a" * 64, "b" * 64),),
        versions={"python": "3.13.0"},
    ),
    patch=PatchFacts({"1": (0, 2, 3), "2": (1, 6, 7)}, 9216, ("shared experts",), {"method": "esft"}),
    weights={"expert_patch.safetensors": "c" * 64},
    energy=(Energy("training", "estimate", 3600.0, "estimate for cpu", {"co2_g": 0.4, "usd": 0.02}),),
    hub_moe_version="0.1.0",
)


def make_model(folder, weights=b"weights", *, readme=FRONT_MATTER):
    """A folder that looks like a model to cards: a file of weights and a README."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    if readme is not None:
        (folder / "README.md").write_text(readme, "utf-8")
    return folder


def write_evidence(
    folder, weights=b"weights", scores=RIGHT_AND_WRONG, *, limit=None, dataset="openai/gsm8k", **changes
):
    """A record of one entry with these scores, made of the model with these weights."""
    files = {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    record = make_record(**{"model": ModelSource("law", "checkpoint", files=files), **changes})
    entry = record.entries[0]
    value, error = statistics.fmean(scores), statistics.stdev(scores) / len(scores) ** 0.5
    metric = replace(
        entry.metrics[0],
        value=value,
        standard_error=error,
        low=value - 2 * error,
        high=value + 2 * error,
        num_documents=len(scores),
    )
    source = DatasetSource(dataset, "test", len(scores), "1" * 64, name="main", revision=COMMIT)
    task = replace(entry.tasks[0], dataset=source, num_documents=len(scores), num_fewshot=5)
    entries = (replace(entry, metrics=(metric,), tasks=(task,), limit=limit),)
    return write_record(folder, replace(record, entries=entries), make_samples(scores))


def render(folder, *, say=lambda text: None, **evidence):
    """Write the card of a model's folder from the records in it, as `hub-moe card` does; its facts."""
    model = open_model(str(folder))
    records = find_evidence(folder)
    facts = collect_facts(model, Evidence(records=records, **evidence), say=say)
    readme = read_readme(folder / "README.md")
    render_card(facts, readme, eval_results=read_eval_results(folder)).write(folder / "README.md")
    return facts
