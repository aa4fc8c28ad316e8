"""The global generators of Python, numpy and torch, which belong to the trainer."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def untouched_generators(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, on the CPU or this device, the program draws afterwards what it would have drawn."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
