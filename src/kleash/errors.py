"""Every error that kleash raises on purpose, in one tree.

    KleashError
    |-- InputError (also a ValueError)      the caller can mend it; exit code 2
    |   |-- ShapeError                      tensors that do not fit together, or a mask that is no mask
    |   |-- ValueRangeError                 a number outside its range, or not finite
    |   |-- ConfigError                     the run's configuration
    |   |-- PromptError                     the prompts
    |   |-- ModelError                      policy, reference, value model or tokenizer
    |   |-- RewardError                     the reward model or reward function
    |   |-- RunDirectoryError               a run directory that is missing, taken, or damaged
    |   `-- CheckpointError                 a checkpoint cut short, or one that belongs to another run
    `-- RunStopped (also a RuntimeError)    the run stopped itself; exit code 1
        |-- PreflightError                  a check before the first update failed
        `-- NonFiniteError                  a loss, gradient or log-prob that is NaN or infinite

A message is one sentence: what was expected, what was found, what to do. What is worth knowing but stops nothing is
a KleashWarning.
"""


class KleashError(Exception):
    """Root of the tree."""


class InputError(KleashError, ValueError):
    """Something that the caller gave cannot be used."""


class ShapeError(InputError):
    """Tensor shapes or dtypes differ from the documented ones."""


class ValueRangeError(InputError):
    """A number lies outside its documented range, or is not finite."""


class ConfigError(InputError):
    """The configuration has an unknown key, or a value that cannot be used."""


class PromptError(InputError):
    """The prompts are missing, empty, without a `prompt` column, or too long."""


class ModelError(InputError):
    """A model or tokenizer cannot be loaded, or two of them do not fit together."""


class RewardError(InputError):
    """A reward failed, returned the wrong number of scores, or scores that are not finite."""


class RunDirectoryError(InputError):
    """A run directory is missing, damaged, or holds another run."""


class CheckpointError(InputError):
    """A checkpoint is incomplete, damaged, or made with another reference."""


class RunStopped(KleashError, RuntimeError):
    """The run stopped itself; what it had learnt is in its last checkpoint."""


class PreflightError(RunStopped):
    """A check before the first update failed: training would not have done what it says."""


class NonFiniteError(RunStopped):
    """A quantity of the update became NaN or infinite."""


class KleashWarning(UserWarning):
    """Something works in another way than one would expect; the run goes on."""


class DoubtWarning(KleashWarning):
    """The figures of a measurement say less than they seem to; they hold the same sentence."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
