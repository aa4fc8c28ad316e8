"""The forms in which the KL can enter PPO, and what each does to the gradient.

A part in the reward is paid to the token before; a part in the loss is differentiated through the policy. Relative
to the true gradient of KL(policy || reference), summed over every response of a small world, the biased ones were
measured at the norm and cosine that their reason gives; tests/test_oracles.py holds the order of all of them.
"""

from dataclasses import dataclass
from typing import Literal

KLName = Literal["exact", "k1", "exact_in_loss", "k2_in_loss", "k3_in_loss", "k3_in_reward"]


@dataclass(frozen=True, kw_only=True)
class KLForm:
    """Where the KL enters training.

    in_reward: exact = that of later positions; k1, k3 = the token's own estimate.
    in_loss:   exact = of each position over the vocabulary; k2, k3 = estimates differentiated as they are.
    bias:      what is wrong with its gradient, in words that end a sentence; None = nothing.
    """

    in_reward: Literal["exact", "k1", "k3"] | None = None
    in_loss: Literal["exact", "k2", "k3"] | None = None
    bias: str | None = None


FORMS: dict[KLName, KLForm] = {
    "exact": KLForm(in_reward="exact", in_loss="exact"),
    "k1": KLForm(in_reward="k1"),
    "exact_in_loss": KLForm(
        in_loss="exact",
        bias="a token does not answer for the drift after it (norm 0.96, cosine 0.999)",
    ),
    "k2_in_loss": KLForm(in_loss="k2", bias="a token does not answer for the drift after it (norm 0.96, cosine 0.999)"),
    "k3_in_loss": KLForm(in_loss="k3", bias="its gradient is that of KL(reference || policy) (norm 1.14, cosine 0.97)"),
    "k3_in_reward": KLForm(
        in_reward="k3", bias="its gradient points away from that of the KL (norm 0.31, cosine -0.34)"
    ),
}

NO_LEASH = {
    "exact_in_reward": "the exact KL of a position does not depend on the token drawn there, so as its reward it "
    "pulls nowhere",
    "k1_in_loss": "the expected gradient of log pi(y) - log rho(y) is 0",
}
