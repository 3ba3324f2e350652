"""Training with transformers' `Trainer`: balanced experts, checkpoints that survive, and what a person sees."""

from .balancing import BalancingCallback, LoadCounter, measure_imbalance, update_balancing_bias
from .checkpoints import find_checkpoint
from .train import TrainingPlan, TrainingRecord, TrainingSession, read_record, train_causal_lm

__all__ = [
    "BalancingCallback",
    "LoadCounter",
    "TrainingPlan",
    "TrainingRecord",
    "TrainingSession",
    "find_checkpoint",
    "measure_imbalance",
    "read_record",
    "train_causal_lm",
    "update_balancing_bias",
]
