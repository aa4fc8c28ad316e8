"""What every figure of a record means: its formula, its unit, and the range that it has in a healthy run."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a figure in a record means."""

    meaning: str
    unit: str
    healthy: str


GLOSSARY: dict[str, Metric] = {
    "update": Metric(meaning="Number of the update; figures are measured before its steps", unit="-", healthy="-"),
    "score_mean": Metric(meaning="Mean score of the responses", unit="score", healthy="rises"),
    "score_low": Metric(meaning="Lower end of its 95 % interval over sequences", unit="score", healthy="-"),
    "score_high": Metric(meaning="Upper end of its 95 % interval over sequences", unit="score", healthy="-"),
    "score_std": Metric(meaning="Standard deviation of the scores over sequences", unit="score", healthy="above 0"),
    "score_tail_index": Metric(
        meaning="Tail index of the scores: (k - 1) / sum_{i <= k} log(x_i / x_{k+1}), x_i the excesses over the median "
        "from the largest down, k = ceil(sqrt(n)) (Hill)",
        unit="-",
        healthy="steady; of 64 scores about 2.7 if Gaussian, and below 1.5 points to a heavy tail",
    ),
    "score_tail_gap": Metric(
        meaning="(99th percentile - median) / (75th percentile - median) of the scores",
        unit="-",
        healthy="near 3.45, a Gaussian's; above 6 points to a heavy tail",
    ),
    "eval_score_mean": Metric(
        meaning="Mean score by the held-out judge, which trains nothing", unit="score", healthy="rises with the score"
    ),
    "eval_score_low": Metric(meaning="Lower end of its 95 % interval", unit="score", healthy="-"),
    "eval_score_high": Metric(meaning="Upper end of its 95 % interval", unit="score", healthy="-"),
    "kl_policy_ref_per_sequence": Metric(
        meaning="Exact KL(policy || reference): sum over response tokens of sum_v pi (log pi - log rho), mean",
        unit="nats per sequence",
        healthy="0 at update 1, then below the budget",
    ),
    "kl_policy_ref_per_sequence_low": Metric(
        meaning="Lower end of its 95 % interval over sequences", unit="nats per sequence", healthy="-"
    ),
    "kl_policy_ref_per_sequence_high": Metric(
        meaning="Upper end of its 95 % interval over sequences", unit="nats per sequence", healthy="-"
    ),
    "kl_policy_first_ref_per_sequence": Metric(
        meaning="Exact KL(policy || first reference), where the reference was at the start, mean; equal to "
        "kl_policy_ref_per_sequence unless the reference moves",
        unit="nats per sequence",
        healthy="below the ceiling; a moving reference cannot hide it",
    ),
    "kl_policy_first_ref_per_sequence_low": Metric(
        meaning="Lower end of its 95 % interval over sequences", unit="nats per sequence", healthy="-"
    ),
    "kl_policy_first_ref_per_sequence_high": Metric(
        meaning="Upper end of its 95 % interval over sequences", unit="nats per sequence", healthy="-"
    ),
    "kl_policy_ref_per_sequence_k1": Metric(
        meaning="One-token estimate: sum over response tokens of log pi(y) - log rho(y), mean",
        unit="nats per sequence",
        healthy="within its interval of the exact one; negative by chance only",
    ),
    "kl_policy_ref_per_sequence_k1_low": Metric(
        meaning="Lower end of its 95 % interval over sequences", unit="nats per sequence", healthy="-"
    ),
    "kl_policy_ref_per_sequence_k1_high": Metric(
        meaning="Upper end of its 95 % interval over sequences", unit="nats per sequence", healthy="-"
    ),
    "kl_policy_ref_per_sequence_k3": Metric(
        meaning="One-token estimate: sum over response tokens of expm1(-d) + d, d = log pi(y) - log rho(y), mean",
        unit="nats per sequence",
        healthy="near the exact one",
    ),
    "kl_policy_ref_per_token": Metric(
        meaning="Exact KL(policy || reference), sum over all response tokens / their number",
        unit="nats per token",
        healthy="well below 1",
    ),
    "kl_policy_ref_per_sequence_first_token": Metric(
        meaning="The part of the exact KL(policy || reference) at the first tokens, but for those of the next two rows",
        unit="nats per sequence",
        healthy="the four parts add up to kl_policy_ref_per_sequence",
    ),
    "kl_policy_ref_per_sequence_eos": Metric(
        meaning="The part where the policy drew an EOS token", unit="nats per sequence", healthy="a small part"
    ),
    "kl_policy_ref_per_sequence_special": Metric(
        meaning="The part where it drew another special or template token",
        unit="nats per sequence",
        healthy="near 0",
    ),
    "kl_policy_ref_per_sequence_other": Metric(
        meaning="The part of all other tokens", unit="nats per sequence", healthy="the largest part"
    ),
    "beta": Metric(meaning="KL coefficient of this update", unit="score per nat", healthy="-"),
    "rewards_per_sequence_mean": Metric(
        meaning="score - beta * exact KL(policy || reference) per sequence, less the penalty for a missing EOS, mean",
        unit="score",
        healthy="rises",
    ),
    "entropy_per_token": Metric(
        meaning="Entropy of the policy, -sum_v pi log pi, mean over response tokens",
        unit="nats per token",
        healthy="falls slowly; near 0 means collapse",
    ),
    "response_length_mean": Metric(
        meaning="Response tokens per sequence, EOS included", unit="tokens", healthy="steady"
    ),
    "eos_share": Metric(meaning="Share of responses that closed with EOS", unit="share", healthy="steady, near 1"),
    "truncated_share": Metric(
        meaning="Share of responses cut at max_new_tokens, 1 - eos_share", unit="share", healthy="steady, near 0"
    ),
    "distinct_1_per_sequence": Metric(
        meaning="Different tokens of a response / its tokens, mean", unit="share", healthy="steady; falls if it repeats"
    ),
    "distinct_2_per_sequence": Metric(
        meaning="Different bigrams of a response / its bigrams, mean over responses of two tokens or more",
        unit="share",
        healthy="steady; near 0 means loops",
    ),
    "distinct_2_over_batch": Metric(
        meaning="Different bigrams of all responses together / all their bigrams",
        unit="share",
        healthy="steady at one response length; falls as the responses become alike",
    ),
    "kl_rollout_policy_per_token_k3": Metric(
        meaning="Mismatch of sampler and scorer: k3 estimate of KL(rollout || policy) on unchanged weights",
        unit="nats per token",
        healthy="below 1e-6 in float32, below 1e-2 in bfloat16",
    ),
    "logprob_mismatch_max": Metric(
        meaning="Largest |log-prob at sampling - log-prob at scoring| of a token",
        unit="nats",
        healthy="below 1e-3 in float32",
    ),
    "policy_loss": Metric(meaning="max(-A r, -A clip(r)), mean over tokens and steps", unit="-", healthy="near 0"),
    "leash_loss": Metric(
        meaning="KL in the loss: (1 - share_of_k1) beta / advantage_std * KL(policy || reference), mean over tokens "
        "and steps; its estimate for k2_in_loss and k3_in_loss",
        unit="-",
        healthy="0 with k1; small beside 1",
    ),
    "value_loss": Metric(
        meaning="Clipped squared error of the value / 2, mean over tokens and steps", unit="score^2", healthy="falls"
    ),
    "clip_share": Metric(
        meaning="Share of tokens whose ratio left 1 +- clip_range", unit="share", healthy="0.01 to 0.3"
    ),
    "value_clip_share": Metric(
        meaning="Share of tokens whose value moved beyond value_clip_range", unit="share", healthy="below 0.5"
    ),
    "ratio_mean": Metric(meaning="Mean of r = pi_new(y) / pi_old(y)", unit="-", healthy="near 1"),
    "ratio_max": Metric(meaning="Largest ratio of the update", unit="-", healthy="below 10"),
    "ratio_max_first_step": Metric(
        meaning="Largest ratio before the first step of the update", unit="-", healthy="exactly 1"
    ),
    "kl_old_policy_per_token_k3": Metric(
        meaning="k3 estimate of KL(old policy || policy), mean over the tokens of all steps",
        unit="nats per token",
        healthy="below 0.02",
    ),
    "gradient_norm": Metric(
        meaning="Norm of the gradient of policy and value before clipping, mean over steps", unit="-", healthy="steady"
    ),
    "optimizer_steps": Metric(
        meaning="Optimizer steps that were taken; fewer than epochs x minibatches where the update ended early",
        unit="-",
        healthy="epochs x minibatches",
    ),
    "learning_rate": Metric(meaning="Learning rate of this update", unit="-", healthy="-"),
    "explained_variance": Metric(
        meaning="1 - var(returns - values) / var(returns) over response tokens", unit="share", healthy="rises to 1"
    ),
    "advantage_std": Metric(
        meaning="What the advantages were divided by (1 without whitening)", unit="score", healthy="above 0"
    ),
    "share_of_k1": Metric(
        meaning="kl: blend; how much of the leash is k1's, the rest is exact, mean over responses; 0 for other forms",
        unit="share",
        healthy="0 at first, rises towards 1 near the optimum",
    ),
}
