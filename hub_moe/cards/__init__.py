"""Model cards: facts, the README and metadata rendered from them, and the check that every number has its record.

Imports neither torch nor transformers: sizes, profiles and comparisons are handed in as plain mappings.
"""

from .collect import Evidence, ModelFolder, collect_facts, find_evidence, open_model, read_facts
from .facts import FACTS_FILE, Facts
from .lint import Finding, lint_card
from .readme import read_readme
from .render import Card, read_eval_results, render_card, render_form
from .training_run import TrainingRun

__all__ = [
    "FACTS_FILE",
    "Card",
    "Evidence",
    "Facts",
    "Finding",
    "ModelFolder",
    "TrainingRun",
    "collect_facts",
    "find_evidence",
    "lint_card",
    "open_model",
    "read_eval_results",
    "read_facts",
    "read_readme",
    "render_card",
    "render_form",
]
