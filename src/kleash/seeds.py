"""Every random number of a run follows from its seed and the update's number, never from what was drawn before.

So a resumed run needs no saved generator: update n draws the same numbers whether or not it was interrupted.
"""

import hashlib

import torch


def derived_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed for one purpose at one place of the run.

    >>> derived_seed(0, "sampling", 1) == derived_seed(0, "sampling", 1)
    True
    >>> derived_seed(0, "sampling", 1) == derived_seed(0, "sampling", 2)
    False
    """
    name = "/".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1


def generator_for(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU generator seeded with derived_seed; drawing on the CPU gives every device the same numbers."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, *indices))
