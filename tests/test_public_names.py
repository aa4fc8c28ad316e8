"""The public names, frozen: adding or taking one away is a decision, made here."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import kleash

NAMES = """
Alarm AlarmContext AlarmWatch AlarmsConfig BestOfN BudgetLeash CheckpointConfig CheckpointError ConfigError FixedLeash
Frontier InputError Interval KleashError KleashWarning Leash LeashConfig MeasureConfig MeasuredDrift Measurement
ModelError NonFiniteError OveroptimisationCurve PPOConfig Peak PreflightError PromptError ReferenceConfig RewardError
RolloutConfig RunConfig RunDirectoryError RunResult RunStopped ScheduledLeash ShapeError TokenStats ValueRangeError
ZieglerLeash __version__ adjusted_rewards adjusted_rewards_exact alarms_at best_of_n_from_samples best_of_n_kl
best_of_n_kl_bound best_of_n_kl_estimate best_of_n_logprobs best_of_n_weights beta_for_budget
clipped_policy_loss_per_token clipped_value_loss_per_token distinct_n_over_batch distinct_n_per_sequence entropy
full_log_probs generalized_advantages js_divergence kl_divergence kl_policy_ref_per_token kl_policy_ref_per_token_k1
kl_policy_ref_per_token_k2 kl_policy_ref_per_token_k3 masked_mean mean_with_interval measure missing_eos_penalised
overoptimisation_curve per_sequence read_config tail_gap tail_index token_classes token_logprobs token_stats train
whiten write_measure_page write_report write_sweep_report
"""


def test_the_public_names_are_these() -> None:
    assert kleash.__all__ == NAMES.split()


def test_each_public_name_is_there_and_says_what_it_is() -> None:
    for name in set(kleash.__all__) - {"__version__"}:
        said = getattr(kleash, name).__doc__ or ""
        assert said.strip(), name
        assert not said.startswith(f"{name}("), f"{name} has no words of its own"
    assert kleash.__version__.count(".") == 2


def test_the_stub_for_type_checkers_names_the_same_homes() -> None:
    stub = ast.parse((Path(kleash.__file__).with_suffix(".pyi")).read_text(encoding="utf-8"))
    homes = {
        alias.asname or alias.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(homes) == set(kleash.__all__) - {"__version__"}
    for name in homes:
        assert getattr(import_module(homes[name]), name) is getattr(kleash, name), name


def test_the_functions_on_tensors_need_no_model_library() -> None:
    code = "import sys, kleash; kleash.kl_divergence; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
