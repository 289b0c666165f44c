"""What `lightbulb upcycle` reads with ``method: fuse``: several models teach one, through targets beside its corpus.

FuseLLM (Wan et al. 2024, arXiv:2401.10491). Unlike the other methods the sources may be of any shapes, and have
tokenizers of their own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from lightbulb.config import Config, read_yaml
from lightbulb.data.config import DataConfig
from lightbulb.experts.upcycle_config import SourceConfig
from lightbulb.train.config import TrainConfig

FUSE = "fuse"


class FuseConfig(Config):
    """Several models to one, which learns from their distributions."""

    method: Literal["fuse"]
    run: Path
    """Folder to write: a run of the student with a checkpoint of step 0, whose config names the targets."""
    targets: Path
    """Folder of the targets. It is written shard by shard: started again, the command goes on."""
    sources: list[SourceConfig] = Field(min_length=1)
    """The teachers: LightBulb runs or Hugging Face folders."""
    student: Path | None = None
    """The model that learns; None for the first source."""
    data: DataConfig | None = None
    """Corpus, in the student's tokens, whose training rows get targets; None for the student's."""
    train: TrainConfig | None = None
    """Training settings of the run; None for the student's."""
    fusion: Literal["min_ce", "avg_ce"] = "min_ce"
    """``min_ce``: of each row the distributions of the source that predicts it best. ``avg_ce``: the sources' average,
    each weighted by exp(-its cross-entropy on the row)."""
    top_k: int = Field(10, ge=1)
    """Tokens kept of a distribution; all others count as one."""
    language_share: float = Field(0.9, ge=0, le=1)
    """Weight of the language-modelling loss in the run's training; the divergence from the targets has the rest."""
    batch: int = Field(4, ge=1)
    """Rows that a source reads at a time."""


def is_fuse(path: str | Path, overrides: Sequence[str] = ()) -> bool:
    """Whether a config file of `lightbulb upcycle` is one of these.

    Raises:
        ConfigError: it cannot be read.
    """
    given = [override.partition("=")[2] for override in overrides if override.startswith("method=")]
    return (given[-1] if given else read_yaml(Path(path)).get("method")) == FUSE
