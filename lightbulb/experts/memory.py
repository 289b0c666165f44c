"""Whether a whole model fits into memory, asked before hours of work depend on it."""

import psutil

from lightbulb.config import ConfigError

GB = 1e9


def check_memory(parameters: int, what: str) -> None:
    """Refuse to load a model in float32 that this machine has no memory for.

    Args:
        parameters: of the model.
        what: needs it, for the message.

    Raises:
        ConfigError: with the memory needed and the memory there is.
    """
    needed, available = 4 * parameters, psutil.virtual_memory().available
    if needed > available:
        raise ConfigError(
            f"{what} needs {needed / GB:.1f} GB of memory for the model, {available / GB:.1f} GB are available; use a "
            "machine with more"
        )
