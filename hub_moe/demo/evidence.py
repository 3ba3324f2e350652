"""The demo's evidence: base and patch asked by a suite, cards from the records, the claims checked by a stranger."""

import json
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from .folder import RunFolder
from .local_hub import CONTRIBUTOR, MODEL, OWNER, PATCH, LocalHub
from .plan import DemoPlan


def evaluate_base(hub: LocalHub, plan: DemoPlan, folder: RunFolder) -> Path:
    """Evaluate the model that will be published as the base, and put the numbers on its card; the record.

    Raises:
        HubError: If a command fails.
        KeyboardInterrupt: After Ctrl-C; the same call goes on where it stopped.
    """
    command = ["eval", str(folder.model), "--as", MODEL, *_suite(plan, folder)]
    record = _record_path(folder, json.loads(hub.run_command(command, user=OWNER))["record"])
    hub.run_command(["card", str(folder.model), "--as", MODEL, "--records", str(folder.evals)], user=OWNER)
    return record


def evaluate_patch(
    hub: LocalHub, plan: DemoPlan, folder: RunFolder, *, base_record: Path, base_revision: str
) -> dict[str, Any]:
    """Evaluate the contributor's patch against its base, and put the comparison on its card; the comparison as JSON.

    Raises:
        HubError: If a command fails.
    """
    patch = str(folder.tuning / "patch")
    base = f"{MODEL}@{base_revision}"
    command = ["eval", patch, "--as", PATCH, "--base", base, *_suite(plan, folder)]
    comparison: dict[str, Any] = json.loads(hub.run_command(command, user=CONTRIBUTOR))["comparison"]
    evidence = ["--records", str(folder.evals), "--base-record", str(base_record), "--run", str(folder.tuning)]
    hub.run_command(["card", patch, "--as", PATCH, *evidence], user=CONTRIBUTOR)
    return comparison


def verify_patch(hub: LocalHub, plan: DemoPlan) -> dict[str, Any]:
    """A stranger without a token checks the claims of the published patch; the findings as JSON.

    Raises:
        EvaluationError: If a claim does not hold.
        HubError: If the command fails.
    """
    command = ["verify", PATCH, "--documents", str(plan.verified_documents), "--nonce", f"demo {plan.seed}", "--json"]
    found: dict[str, Any] = json.loads(hub.run_command(command, user=None))
    failed = [name for name, verification in found.items() if verification["outcome"] == "failed"]
    if failed or not found:
        raise EvaluationError(f"{PATCH} does not hold what it claims: {', '.join(failed) or 'it has no record'}.")
    return found


def _suite(plan: DemoPlan, folder: RunFolder) -> list[str]:
    return ["--suite", plan.suite, "--limit", str(plan.suite_limit), "--out", str(folder.evals), "--json"]


def _record_path(folder: RunFolder, record: dict[str, Any]) -> Path:
    return folder.evals / f"{record['suite']['name']}-{record['id'][:16]}.json"
