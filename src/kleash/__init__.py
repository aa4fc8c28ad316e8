"""Post-train a language model against a reward model, on a KL leash.

prompts -> rollout -> log-probs (policy, reference) -> KL -> adjusted rewards -> advantages -> PPO update
-> leash -> drift -> report
"""

from importlib import import_module

from kleash.version import VERSION

__version__ = VERSION

_NAMES_OF = {
    "advantages": ("generalized_advantages",),
    "config": (
        "CheckpointConfig",
        "LeashConfig",
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
    "fused.stats": (
        "TokenStats",
        "token_stats",
    ),
    "leash": (
        "FixedLeash",
        "Leash",
        "ZieglerLeash",
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
    "ppo": ("PPOConfig",),
    "report": ("write_report",),
    "rewards": (
        "adjusted_rewards",
        "adjusted_rewards_exact",
        "missing_eos_penalised",
    ),
    "rollout": ("RolloutConfig",),
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
