"""Which corpus a run reads and how."""

from pathlib import Path

from lightbulb.config import Config


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file (and row), what is wrong and the fix."""


class DataConfig(Config):
    """A corpus written by `lightbulb preprocess`."""

    path: Path
    """The corpus folder, the one that holds manifest.json."""

    shuffle: bool = True
    """Visit the training rows in a new order each epoch; without it, in the order they were written."""

    document_mask: bool = False
    """Give the model each token's document, so that no token sees another document of its row."""
