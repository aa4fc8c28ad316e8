"""The error tree: what a caller may catch, and what it means."""

import inspect

import pytest

from kleash import errors
from kleash.errors import InputError, KleashError, NonFiniteError, RunStopped, first_line

EVERY_ERROR = [
    error for _, error in inspect.getmembers(errors, inspect.isclass) if not issubclass(error, errors.KleashWarning)
]


@pytest.mark.parametrize("error", EVERY_ERROR)
def test_every_error_is_a_kleash_error_with_a_docstring_and_a_place_in_the_drawing(error):
    assert issubclass(error, KleashError)
    assert error.__doc__
    assert error.__name__ in errors.__doc__


@pytest.mark.parametrize("error", [error for error in EVERY_ERROR if error is not KleashError])
def test_every_error_is_either_the_callers_to_mend_or_a_run_that_stopped(error):
    assert issubclass(error, InputError) != issubclass(error, RunStopped)


def test_what_the_caller_can_mend_is_a_value_error_and_a_stop_is_a_runtime_error():
    assert issubclass(InputError, ValueError)
    assert issubclass(RunStopped, RuntimeError)
    assert issubclass(NonFiniteError, RunStopped)


def test_the_first_line_of_an_error_is_its_text_or_its_name_and_never_empty():
    assert first_line(OSError("  disk full\nerrno 28")) == "disk full"
    assert first_line(OSError("\n")) == "OSError"
    assert first_line(KeyError()) == "KeyError"
