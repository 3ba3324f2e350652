"""Training with transformers' `Trainer`: balanced experts, checkpoints that survive, and what a person sees."""

from .balancing import AuxLossOnce, BalancingCallback, update_balancing_bias
from .checkpoints import find_checkpoint
from .load import LoadCounter, measure_imbalance
from .metrics import RunMetrics
from .metrics_file import read_metrics
from .profiling import Sample, draw_sample, profile_experts
from .routing_traces import read_traces
from .run import RunResult, run_training
from .run_config import RunConfig, parse_run_config, read_run_config
from .selection import ExpertChoice, Scores, score_experts, select_experts
from .trainer import MoeTrainer

__all__ = [
    "AuxLossOnce",
    "BalancingCallback",
    "ExpertChoice",
    "LoadCounter",
    "MoeTrainer",
    "RunConfig",
    "RunMetrics",
    "RunResult",
    "Sample",
    "Scores",
    "draw_sample",
    "find_checkpoint",
    "measure_imbalance",
    "parse_run_config",
    "read_metrics",
    "read_run_config",
    "run_training",
    "profile_experts",
    "read_traces",
    "score_experts",
    "select_experts",
    "update_balancing_bias",
]
