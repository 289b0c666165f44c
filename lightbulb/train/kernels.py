"""Which kernels a process computes with: the environment's word, else the config's."""

from lightbulb import ops
from lightbulb.config import ConfigError


def use_kernels(wanted: ops.Kernels) -> ops.Kernels:
    """Compute with these from now on, unless the environment says otherwise; gives what is in force.

    Raises:
        ConfigError: the environment variable has a value that is not a choice.
    """
    ops.choose(wanted)
    try:
        return ops.chosen()
    except ValueError as error:
        raise ConfigError(str(error)) from None
