"""What `lightbulb branch` reads: a seed run, a clustered corpus, and how each cluster's branch is trained.

Branches of clusters found without labels are those of c-BTM (Gururangan et al. 2023, arXiv:2303.14177); random parts of
the corpus are its control.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lightbulb.config import Config
from lightbulb.experts.jobs import JobsConfig
from lightbulb.train.outer import SyncConfig

Folder = Annotated[Path, AfterValidator(Path.expanduser)]


class BranchConfig(Config):
    """One run for each cluster of a corpus, from one checkpoint of a seed run."""

    run: Folder
    """Folder to write: `branch-N/`, the run of cluster N, with its run file `branch-N.yaml` beside it."""
    seed_run: Folder
    """The run that all branches start from."""
    at_step: int | None = Field(None, ge=0)
    """Its checkpoint; None for the newest. A started set of branches keeps the one it began with."""
    corpus: Folder | None = None
    """A corpus in clusters, tokenised as the seed's; None for the seed's own."""
    clusters: Literal["all", "random"] | list[int] = "all"
    """Which clusters get a branch. `random`: as many branches, each with a random part of the corpus that no other
    branch reads, as a control."""
    parts: int | None = Field(None, ge=2)
    """Branches of `clusters: random`; None for as many as the corpus has clusters."""
    moments: Literal["keep", "reset"] = "keep"
    """Whether branches begin with the seed's moments of the optimizer or with zeros."""
    train: dict[str, Any] = {}
    """Settings of each branch's `train`, where they differ from the seed's; `steps` are the branch's own."""
    optimizer: dict[str, Any] = {}
    """The same of `optimizer`."""
    schedule: dict[str, Any] = {}
    """The same of `schedule`, over a short warmup and a constant learning rate: `{warmup: 0.02, decay: 0}`."""
    parallel: dict[str, Any] = {}
    """The same of `parallel`."""
    sync: SyncConfig | None = None
    """Bring what is no expert together every so many steps; None trains each branch by itself."""
    jobs: JobsConfig = JobsConfig()
    """How the runs are started. With `sync` all run at once, whatever `at_once` says."""
    eval_contexts: int = Field(64, ge=0)
    """Held-out contexts of its cluster on which seed and branch are compared at the end; 0 compares nothing."""

    @model_validator(mode="after")
    def _clusters_differ(self) -> "BranchConfig":
        if isinstance(self.clusters, list):
            if not self.clusters:
                raise ValueError("clusters: an empty list; name some, or all")
            if len(set(self.clusters)) < len(self.clusters):
                raise ValueError(f"clusters: {self.clusters} names one twice; a cluster has one branch")
        if self.parts is not None and self.clusters != "random":
            raise ValueError("parts: only clusters: random has parts; leave it out")
        return self

    def folder(self, cluster: int) -> Path:
        """The run folder of a cluster's branch, or of a random part's."""
        return self.run / f"branch-{cluster}"
