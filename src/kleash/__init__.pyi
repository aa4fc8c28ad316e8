"""Post-train a language model against a reward model, on a KL leash.

prompts -> rollout -> log-probs (policy, reference) -> KL -> adjusted rewards -> advantages -> PPO update
-> leash -> drift -> report
"""

from kleash.advantages import generalized_advantages
from kleash.config import CheckpointConfig, LeashConfig, RunConfig, read_config
from kleash.divergence import entropy, js_divergence, kl_divergence, kl_policy_ref_per_token
from kleash.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    KleashError,
    KleashWarning,
    ModelError,
    NonFiniteError,
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
from kleash.fused.stats import TokenStats, token_stats
from kleash.leash import FixedLeash, Leash, ZieglerLeash
from kleash.logprobs import full_log_probs, token_logprobs
from kleash.losses import clipped_policy_loss_per_token, clipped_value_loss_per_token
from kleash.masking import masked_mean, whiten
from kleash.ppo import PPOConfig
from kleash.report import write_report
from kleash.rewards import adjusted_rewards, adjusted_rewards_exact, missing_eos_penalised
from kleash.rollout import RolloutConfig
from kleash.training import RunResult, train

__version__: str

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "ConfigError",
    "FixedLeash",
    "InputError",
    "Interval",
    "KleashError",
    "KleashWarning",
    "Leash",
    "LeashConfig",
    "ModelError",
    "NonFiniteError",
    "PPOConfig",
    "PromptError",
    "RewardError",
    "RolloutConfig",
    "RunConfig",
    "RunDirectoryError",
    "RunResult",
    "RunStopped",
    "ShapeError",
    "TokenStats",
    "ValueRangeError",
    "ZieglerLeash",
    "__version__",
    "adjusted_rewards",
    "adjusted_rewards_exact",
    "clipped_policy_loss_per_token",
    "clipped_value_loss_per_token",
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
    "missing_eos_penalised",
    "per_sequence",
    "read_config",
    "token_logprobs",
    "token_stats",
    "train",
    "whiten",
    "write_report",
]
