"""The demo's contributor: trains the few experts that prose uses most, and shares them as an expert patch.

The published base is fetched by its name, as a stranger would, in processes of their own.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..anatomy import ExpertProfile
from ..data import read_language_reference
from ..errors import CheckpointError
from ..patches import ExpertPatch, apply_patch, remove_patch
from ..plots import plot_expert_heat_map
from ..training import ExpertChoice, score_experts
from ..training.folder import remove
from ..training.run_config import RunConfig, parse_run_config
from .folder import RunFolder
from .local_hub import CONTRIBUTOR, MODEL, PATCH, LocalHub
from .plan import DemoPlan
from .visitor import hash_logits


@dataclass(frozen=True)
class Tuned:
    """An expert patch on disk and the report of the run that made it."""

    patch: Path
    report: dict[str, Any]


def tune_experts(hub: LocalHub, plan: DemoPlan, folder: RunFolder, *, base_revision: str) -> Tuned:
    """Fine-tune the published model's experts on Python's language reference, by `hub-moe train`; resumes by itself.

    Raises:
        HubError: If the run fails.
        KeyboardInterrupt: After Ctrl-C, with a checkpoint.
    """
    rows = [{"topic": topic.name, "text": topic.text} for topic in read_language_reference()]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    folder.write_atomically(folder.reference, lambda path: path.write_text(text, "utf-8"))
    settings = configure_tuning(plan, folder, base_revision=base_revision).to_toml()
    if not folder.tuning_settings.exists() or folder.tuning_settings.read_text("utf-8") != settings:
        remove(folder.tuning)  # of a base that was published under another commit
        folder.write_atomically(folder.tuning_settings, lambda path: path.write_text(settings, "utf-8"))
    hub.run_command(["train", str(folder.tuning_settings)], user=CONTRIBUTOR)
    return Tuned(folder.tuning / "patch", json.loads((folder.tuning / "report.json").read_text("utf-8")))


def configure_tuning(plan: DemoPlan, folder: RunFolder, *, base_revision: str) -> RunConfig:
    """The contributor's run."""
    return parse_run_config(
        {
            "model": {"name": MODEL, "revision": base_revision},
            "data": {
                "source": str(folder.reference),
                "format": "text",
                "max_length": plan.block_length,
                "held_out": plan.tuning_held_out,
            },
            "method": {"name": "experts", "score": "token", "top_p": plan.tuning_top_p},
            "training": {
                "steps": plan.tuning_steps,
                "batch_size": plan.training.batch_size,
                "learning_rate": plan.tuning_learning_rate,
                "evaluations": 2,
                "checkpoints": 2,
                "seed": plan.seed,
                "num_threads": torch.get_num_threads(),
            },
            "output": {"folder": str(folder.tuning)},
        }
    )


def draw_choice(folder: RunFolder) -> None:
    """The share of the tokens that each expert gets of the prose, the chosen ones outlined."""
    profile = ExpertProfile.load(folder.tuning / "expert_profile.json")
    choice = ExpertChoice.load(folder.tuning / "expert_config.json")
    picture = plot_expert_heat_map(
        score_experts(profile, score="token").layers,
        choice=choice.experts,
        title="Experts that Python's language reference uses; the outlined ones are trained",
        label="share of the tokens",
    )
    folder.write_atomically(folder.chosen_experts, lambda path: picture.savefig(path, format="png"))


@contextmanager
def patched(model: PreTrainedModel, tuned: Tuned) -> Iterator[None]:
    """Inside, `model` carries the patch."""
    apply_patch(model, ExpertPatch.load(tuned.patch))
    try:
        yield
    finally:
        remove_patch(model)


def publish_patch(hub: LocalHub, tuned: Tuned, model: PreTrainedModel) -> dict[str, str]:
    """Publish the patch, and let somebody else load it by its name; its `repo` and `revision`.

    Raises:
        CheckpointError: If what they load computes other logits than `model`, which carries the patch.
    """
    published = hub.run_step("publish_model", user=CONTRIBUTOR, repo=PATCH, folder=str(tuned.patch))
    trial = hub.run_step(
        "hash_model", user=None, repo=PATCH, revision=published["revision"], num_threads=torch.get_num_threads()
    )
    if trial["logits_sha256"] != hash_logits(model):
        raise CheckpointError(
            f"{PATCH}, loaded from the Hub by its name, computes other logits than the patched model."
        )
    return {"repo": PATCH, "revision": published["revision"]}


def describe_patch(tuned: Tuned, model_folder: Path) -> dict[str, Any]:
    """For the report: its size, and what it gains on the prose."""
    experts = ExpertChoice.load(tuned.patch.parent / "expert_config.json").experts
    return {
        "experts": {str(layer): list(chosen) for layer, chosen in experts.items()},
        "numbers": tuned.report["numbers"]["trained"],
        "size_bytes": _weight_bytes(tuned.patch),
        "checkpoint_bytes": _weight_bytes(model_folder),
        "steps": tuned.report["steps"],
        "held_out_loss": tuned.report["held_out_loss"],
    }


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
