"""Training with transformers' `Trainer`: balanced experts, checkpoints that survive, and what a person sees."""

from .balancing import BalancingCallback, LoadCounter, measure_imbalance, update_balancing_bias
from .checkpoints import find_checkpoint
from .profiling import Sample, draw_sample, profile_experts
from .routing_traces import read_traces
from .selection import ExpertChoice, Scores, score_experts, select_experts
from .train import TrainingPlan, TrainingRecord, TrainingSession, read_record, train_causal_lm

__all__ = [
    "BalancingCallback",
    "ExpertChoice",
    "LoadCounter",
    "Sample",
    "Scores",
    "TrainingPlan",
    "TrainingRecord",
    "TrainingSession",
    "draw_sample",
    "find_checkpoint",
    "measure_imbalance",
    "profile_experts",
    "read_record",
    "read_traces",
    "score_experts",
    "select_experts",
    "train_causal_lm",
    "update_balancing_bias",
]
