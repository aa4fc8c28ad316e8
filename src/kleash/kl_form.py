"""The forms in which the KL can enter PPO, and what each does to the gradient.

A part in the reward is paid to the token before; a part in the loss is differentiated through the policy. Of the
gradient of KL(policy || reference), summed over every response of a small world (tests/test_leash_gradient.py), the
biased forms are this far off: norm and cosine

    exact_in_loss, k2_in_loss  0.82  0.952        k3_in_loss  0.79  0.933        k3_in_reward  0.39  0.680
"""

from dataclasses import dataclass
from typing import Literal

KLName = Literal["exact", "k1", "blend", "exact_in_loss", "k2_in_loss", "k3_in_loss", "k3_in_reward"]


@dataclass(frozen=True, kw_only=True)
class KLForm:
    """Where the KL enters training.

    in_reward: exact = that of later positions; k1, k3 = the token's own estimate.
    in_loss:   exact = of each position over the vocabulary; k2, k3 = estimates differentiated as they are.
    blended:   k1 is a control variate of the exact form: see kleash.control.
    bias:      what is wrong with its gradient, in words that end a sentence; None = nothing.
    """

    in_reward: Literal["exact", "k1", "k3"] | None = None
    in_loss: Literal["exact", "k2", "k3"] | None = None
    blended: bool = False
    bias: str | None = None


FORMS: dict[KLName, KLForm] = {
    "exact": KLForm(in_reward="exact", in_loss="exact"),
    "k1": KLForm(in_reward="k1"),
    "blend": KLForm(in_reward="exact", in_loss="exact", blended=True),
    "exact_in_loss": KLForm(
        in_loss="exact",
        bias="a token does not answer for the drift after it",
    ),
    "k2_in_loss": KLForm(in_loss="k2", bias="a token does not answer for the drift after it"),
    "k3_in_loss": KLForm(in_loss="k3", bias="its gradient is that of KL(reference || policy)"),
    "k3_in_reward": KLForm(
        in_reward="k3", bias="its gradient is that of KL(policy || reference) - KL(reference || policy)"
    ),
}

NO_LEASH = {
    "exact_in_reward": "the exact KL of a position does not depend on the token drawn there, so as its reward it "
    "pulls nowhere",
    "k1_in_loss": "the expected gradient of log pi(y) - log rho(y) is 0",
}
