"""Training with transformers' `Trainer`: balanced experts, checkpoints that survive, and what a person sees."""

from .aux_loss import AuxLossOnce
from .balancing import BalancingCallback, update_balancing_bias
from .checkpoints import find_checkpoint
from .load import LoadCounter, measure_imbalance
from .metrics import RunMetrics
from .metrics_file import read_metrics
from .train import TrainingPlan, TrainingRecord, TrainingSession, read_record, train_causal_lm

__all__ = [
    "AuxLossOnce",
    "BalancingCallback",
    "LoadCounter",
    "RunMetrics",
    "TrainingPlan",
    "TrainingRecord",
    "TrainingSession",
    "find_checkpoint",
    "measure_imbalance",
    "read_metrics",
    "read_record",
    "train_causal_lm",
    "update_balancing_bias",
]
