"""The global generators of Python, numpy and torch, which belong to the program around us."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def untouched_generators(*devices: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, on the CPU or these devices, the program draws afterwards what it would have drawn."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng({device for device in devices if device.type == "cuda"}):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
