"""Post-train a language model against a reward model, on a KL leash.

prompts -> rollout -> log-probs (policy, reference) -> KL -> adjusted rewards -> advantages -> PPO update
-> leash -> drift -> report
"""

from importlib import import_module

from kleash.version import VERSION

__version__ = VERSION

_NAMES_OF = {
    "advantages": ("generalized_advantages",),
    "alarms": (
        "Alarm",
        "AlarmContext",
        "AlarmWatch",
        "AlarmsConfig",
        "alarms_at",
    ),
    "best_of_n": (
        "BestOfN",
        "best_of_n_from_samples",
        "best_of_n_kl",
        "best_of_n_kl_bound",
        "best_of_n_kl_estimate",
        "best_of_n_logprobs",
        "best_of_n_weights",
    ),
    "config": (
        "CheckpointConfig",
        "LeashConfig",
        "ReferenceConfig",
        "RunConfig",
        "read_config",
    ),
    "divergence": (
        "entropy",
        "js_divergence",
        "kl_divergence",
        "kl_policy_ref_per_token",
    ),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "InputError",
        "KleashError",
        "KleashWarning",
        "ModelError",
        "NonFiniteError",
        "PreflightError",
        "PromptError",
        "RewardError",
        "RunDirectoryError",
        "RunStopped",
        "ShapeError",
        "ValueRangeError",
    ),
    "estimators": (
        "Interval",
        "kl_policy_ref_per_token_k1",
        "kl_policy_ref_per_token_k2",
        "kl_policy_ref_per_token_k3",
        "mean_with_interval",
        "per_sequence",
    ),
    "frontier": ("Frontier",),
    "fused.stats": (
        "TokenStats",
        "token_stats",
    ),
    "leash": (
        "BudgetLeash",
        "FixedLeash",
        "Leash",
        "Measurement",
        "ScheduledLeash",
        "ZieglerLeash",
        "beta_for_budget",
    ),
    "logprobs": (
        "full_log_probs",
        "token_logprobs",
    ),
    "losses": (
        "clipped_policy_loss_per_token",
        "clipped_value_loss_per_token",
    ),
    "masking": (
        "masked_mean",
        "whiten",
    ),
    "overoptimisation": (
        "OveroptimisationCurve",
        "Peak",
        "overoptimisation_curve",
    ),
    "measurement": (
        "MeasureConfig",
        "measure",
    ),
    "measure_page": ("write_measure_page",),
    "measured": ("MeasuredDrift",),
    "ppo": ("PPOConfig",),
    "repetition": (
        "distinct_n_over_batch",
        "distinct_n_per_sequence",
    ),
    "report": (
        "write_report",
        "write_sweep_report",
    ),
    "rewards": (
        "adjusted_rewards",
        "adjusted_rewards_exact",
        "missing_eos_penalised",
    ),
    "rollout": ("RolloutConfig",),
    "tail": (
        "tail_gap",
        "tail_index",
    ),
    "token_class": ("token_classes",),
    "training": (
        "RunResult",
        "train",
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}

__all__ = sorted([*_MODULE_OF, "__version__"])  # type checkers read __init__.pyi


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: the functions on tensors need torch alone, `--help` not even that."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kleash' has no attribute {name!r}")
    value = getattr(import_module(f"kleash.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
