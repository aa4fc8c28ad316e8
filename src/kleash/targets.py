"""From scores and drift to what the steps of an update aim at."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kleash.advantages import generalized_advantages
from kleash.batch import Rollout
from kleash.control import control_shares, control_variate
from kleash.estimators import kl_policy_ref_per_token_k1, kl_policy_ref_per_token_k3
from kleash.kl_form import KLForm
from kleash.masking import Reduce
from kleash.ppo import PPOConfig, Targets, whitened_advantages
from kleash.rewards import adjusted_rewards, adjusted_rewards_exact, missing_eos_penalised
from kleash.scoring import Scored


@dataclass(frozen=True, kw_only=True)
class Aim:
    """The targets of an update's steps, and two figures of how they came about.

    scale:       what the advantages were divided by.
    share_of_k1: how much of a blended leash is k1's, mean over responses; 0 for other forms.
    """

    targets: Targets
    scale: float
    share_of_k1: float


def targets_of(
    rollout: Rollout,
    scored: Scored,
    scores: Tensor,
    config: PPOConfig,
    *,
    form: KLForm,
    beta: float,
    reduce: Reduce,
) -> Aim:
    """Adjusted rewards, advantages and returns of a rollout, and the weight of the KL in the loss.

    Args:
      rollout: what the policy sampled.
      scored: what the models say of it.
      scores: [batch] of the reward model.
      config: gamma, lambda, whitening and the penalty for a missing EOS.
      form: how the KL enters training.
      beta: KL coefficient, score units per nat.
      reduce: adds a tensor over processes.
    """
    mask = rollout.response_mask
    penalised = missing_eos_penalised(scores, rollout.finished, penalty=config.missing_eos_penalty)
    rewards = _rewards(form, scored, penalised, mask, beta=beta, gamma=config.gamma)
    advantages, returns = generalized_advantages(
        rewards, scored.values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda
    )
    shares = torch.zeros(len(scores), dtype=torch.float64, device=advantages.device)
    if form.blended and beta:
        k1 = kl_policy_ref_per_token_k1(scored.policy_logprobs, scored.ref_logprobs, mask)
        control = control_variate(
            k1, scored.kl_policy_ref_per_token, mask, beta=beta, gamma=config.gamma, gae_lambda=config.gae_lambda
        )
        shares = control_shares(advantages, control, mask, reduce=reduce)
        counted = shares.to(control.dtype).unsqueeze(1) * control
        advantages, returns = advantages + counted, returns + counted
    whitened, scale = whitened_advantages(advantages, mask, config, reduce=reduce)
    targets = Targets(
        old_logprobs=scored.policy_logprobs,
        old_values=scored.values,
        advantages=whitened,
        returns=returns,
        kl_weight=(beta / scale * (1 - shares.unsqueeze(1))).to(advantages.dtype).expand(mask.shape),
        kl_in_loss=form.in_loss if beta else None,
        ref_logprobs=scored.ref_logprobs,
        ref_states=scored.ref_states,
    )
    share = float(reduce(shares.mean()) / reduce(shares.new_ones(())))
    return Aim(targets=targets, scale=scale, share_of_k1=share)


def _rewards(form: KLForm, scored: Scored, scores: Tensor, mask: Tensor, *, beta: float, gamma: float) -> Tensor:
    """[batch, time] scores less what the form of the KL takes off the reward."""
    estimates = (scored.policy_logprobs, scored.ref_logprobs, mask)
    match form.in_reward:
        case "exact":
            return adjusted_rewards_exact(scores, scored.kl_policy_ref_per_token, mask, beta=beta, gamma=gamma)
        case "k1":
            return adjusted_rewards(scores, kl_policy_ref_per_token_k1(*estimates), mask, beta=beta)
        case "k3":
            return adjusted_rewards(scores, kl_policy_ref_per_token_k3(*estimates), mask, beta=beta)
        case None:
            return adjusted_rewards(scores, scored.kl_policy_ref_per_token, mask, beta=0.0)
