"""Conditions under which other libraries train here: silence, and one thread."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from transformers.utils import logging as transformers_logging

_switches: Any = transformers_logging  # its functions carry no types


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers, datasets and trl from writing to the terminal; errors still raise.

    Their own switches are put back as they were found.
    """
    verbosity = _switches.get_verbosity()
    bars = _switches.is_progress_bar_enabled()
    dataset_bars = not datasets.are_progress_bars_disabled()
    _switches.set_verbosity_error()
    _switches.disable_progress_bar()
    datasets.disable_progress_bars()
    trl_logger = logging.getLogger("trl")
    trl_level = trl_logger.level
    trl_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _switches.set_verbosity(verbosity)
        trl_logger.setLevel(trl_level)
        if bars:
            _switches.enable_progress_bar()
        if dataset_bars:
            datasets.enable_progress_bars()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: models this small gain nothing from a second, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
