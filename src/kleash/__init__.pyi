"""Post-train a language model against a reward model, on a KL leash.

prompts -> rollout -> log-probs (policy, reference) -> KL -> adjusted rewards -> advantages -> PPO update
-> leash -> drift -> report
"""

from kleash.advantages import generalized_advantages
from kleash.alarms import Alarm, AlarmContext, AlarmsConfig, AlarmWatch, alarms_at
from kleash.best_of_n import (
    BestOfN,
    best_of_n_from_samples,
    best_of_n_kl,
    best_of_n_kl_bound,
    best_of_n_kl_estimate,
    best_of_n_logprobs,
    best_of_n_weights,
)
from kleash.config import CheckpointConfig, LeashConfig, ReferenceConfig, RunConfig, read_config
from kleash.divergence import entropy, js_divergence, kl_divergence, kl_policy_ref_per_token
from kleash.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    KleashError,
    KleashWarning,
    ModelError,
    NonFiniteError,
    PreflightError,
    PromptError,
    RewardError,
    RunDirectoryError,
    RunStopped,
    ShapeError,
    ValueRangeError,
)
from kleash.estimators import (
    Interval,
    kl_policy_ref_per_token_k1,
    kl_policy_ref_per_token_k2,
    kl_policy_ref_per_token_k3,
    mean_with_interval,
    per_sequence,
)
from kleash.frontier import Frontier
from kleash.fused.stats import TokenStats, token_stats
from kleash.leash import BudgetLeash, FixedLeash, Leash, Measurement, ScheduledLeash, ZieglerLeash, beta_for_budget
from kleash.logprobs import full_log_probs, token_logprobs
from kleash.losses import clipped_policy_loss_per_token, clipped_value_loss_per_token
from kleash.masking import masked_mean, whiten
from kleash.measure_page import write_measure_page
from kleash.measured import MeasuredDrift
from kleash.measurement import MeasureConfig, measure
from kleash.overoptimisation import OveroptimisationCurve, Peak, overoptimisation_curve
from kleash.ppo import PPOConfig
from kleash.repetition import distinct_n_over_batch, distinct_n_per_sequence
from kleash.report import write_report, write_sweep_report
from kleash.rewards import adjusted_rewards, adjusted_rewards_exact, missing_eos_penalised
from kleash.rollout import RolloutConfig
from kleash.tail import tail_gap, tail_index
from kleash.token_class import token_classes
from kleash.training import RunResult, train

__version__: str

__all__ = [
    "Alarm",
    "AlarmContext",
    "AlarmWatch",
    "AlarmsConfig",
    "BestOfN",
    "BudgetLeash",
    "CheckpointConfig",
    "CheckpointError",
    "ConfigError",
    "FixedLeash",
    "Frontier",
    "InputError",
    "Interval",
    "KleashError",
    "KleashWarning",
    "Leash",
    "LeashConfig",
    "MeasureConfig",
    "MeasuredDrift",
    "Measurement",
    "ModelError",
    "NonFiniteError",
    "OveroptimisationCurve",
    "PPOConfig",
    "Peak",
    "PreflightError",
    "PromptError",
    "ReferenceConfig",
    "RewardError",
    "RolloutConfig",
    "RunConfig",
    "RunDirectoryError",
    "RunResult",
    "RunStopped",
    "ScheduledLeash",
    "ShapeError",
    "TokenStats",
    "ValueRangeError",
    "ZieglerLeash",
    "__version__",
    "adjusted_rewards",
    "adjusted_rewards_exact",
    "alarms_at",
    "best_of_n_from_samples",
    "best_of_n_kl",
    "best_of_n_kl_bound",
    "best_of_n_kl_estimate",
    "best_of_n_logprobs",
    "best_of_n_weights",
    "beta_for_budget",
    "clipped_policy_loss_per_token",
    "clipped_value_loss_per_token",
    "distinct_n_over_batch",
    "distinct_n_per_sequence",
    "entropy",
    "full_log_probs",
    "generalized_advantages",
    "js_divergence",
    "kl_divergence",
    "kl_policy_ref_per_token",
    "kl_policy_ref_per_token_k1",
    "kl_policy_ref_per_token_k2",
    "kl_policy_ref_per_token_k3",
    "masked_mean",
    "mean_with_interval",
    "measure",
    "missing_eos_penalised",
    "overoptimisation_curve",
    "per_sequence",
    "read_config",
    "tail_gap",
    "tail_index",
    "token_classes",
    "token_logprobs",
    "token_stats",
    "train",
    "whiten",
    "write_measure_page",
    "write_report",
    "write_sweep_report",
]
