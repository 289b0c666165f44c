"""What `lightbulb recipe` reads: one mixture of experts, from its corpus to its last step.

A seed is trained with a constant learning rate, branched into one expert for each cluster of the corpus, mixed, tuned
and decayed: Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv:2403.07816) on clusters found without labels (c-BTM,
Gururangan et al. 2023, arXiv:2303.14177), forked from the stable phase of a warmup-stable-decay run, before its decay
(MiniCPM, Hu et al. 2024, arXiv:2404.06395).

Sections hold settings of the configs that the commands read (run file, corpus, upcycling); what a section leaves out is
the seed's. Lengths follow from shares of one budget of training FLOPs, so that every arm spends the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from lightbulb.config import Config, build_config, over, parse_override, read_values
from lightbulb.data.config import Mixture
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.evaluation.ensemble import EnsembleConfig
from lightbulb.experts.jobs import JobsConfig
from lightbulb.train.config import RunConfig
from lightbulb.train.outer import SyncConfig
from lightbulb.train.resume import Rule, rule_of

CORPUS, SEED = "corpus", "seed"
"""Sections that may be the path of a file, or have a `base:`; paths are seen from the recipe's folder."""

Share = float
"""A fraction of the budget."""


class Settings(Config):
    """Settings of a training, where they differ from the seed's."""

    optimizer: dict[str, Any] = {}
    """Keys of `optimizer` of a run file."""
    schedule: dict[str, Any] = {}
    """Keys of `schedule` of a run file, in fractions of this training's steps."""
    train: dict[str, Any] = {}
    """Keys of `train` of a run file; `steps` follows from the budget, and the batch is one for all of them."""
    parallel: dict[str, Any] = {}
    """Keys of `parallel` of a run file."""

    @model_validator(mode="after")
    def _steps_follow(self) -> "Settings":
        if "steps" in self.train:
            raise ValueError("train.steps follows from the budget; set the recipe's `budget` and `share`s")
        if "batch_stages" in self.train:
            raise ValueError("train.batch_stages: steps follow from one batch; set train.global_batch_size")
        return self

    def values(self) -> dict[str, Any]:
        """The settings as parts of a run file."""
        return {name: getattr(self, name) for name in ("optimizer", "schedule", "train", "parallel")}


class TuneSection(Settings):
    """All of the mixture, with a constant learning rate, on what the other shares leave."""

    @model_validator(mode="after")
    def _rate_is_constant(self) -> "TuneSection":
        if self.schedule.get("decay"):
            raise ValueError(f"schedule.decay {self.schedule['decay']}: the decay is a stage of its own; leave it out")
        return self


class BranchSection(Settings):
    """One run for each cluster, from the seed's last step."""

    share: Share = Field(gt=0, lt=1)
    """Of the budget, for all branches together."""
    sync: SyncConfig | None = None
    """Keep what is no expert together while the branches train; None trains them apart."""
    jobs: JobsConfig = JobsConfig()
    """How the branches are started."""


class DecaySection(Settings):
    """The end of the training: the learning rate falls, on better data if there is some. It goes on with the run before
    it, so of `train` only what a run may change on its way is taken; `global_batch_size` holds from its first step."""

    share: Share = Field(gt=0, lt=1)
    """Of the budget. The continued dense model spends the same share of its own on its decay."""
    mixture: Mixture | None = None
    """What is drawn meanwhile; None goes on as before."""

    @model_validator(mode="after")
    def _can_go_on(self) -> "DecaySection":
        for name in ("warmup", "decay"):
            if name in self.schedule:
                raise ValueError(f"schedule.{name} follows from the share; leave it out")
        for name in self.train:
            if name != "global_batch_size" and rule_of(f"train.{name}") is Rule.FIXED:
                raise ValueError(f"train.{name} stays what it was while the mixture was tuned; set it in `tune`")
        return self


class BaselinesSection(Config):
    """What the mixture is compared with."""

    dense: bool = True
    """Train the seed on, spending what branches, tuning and decay spend together, with a decay of its own."""
    ensemble: EnsembleConfig | None = EnsembleConfig(weights="likelihood")
    """How the branches predict together (c-BTM); null leaves that out."""


class RecipeConfig(Config):
    """From a corpus to a mixture of experts."""

    run: Path
    """Folder of everything that is written."""
    corpus: CorpusConfig
    """As for `lightbulb preprocess`, in clusters; without `output` it is written into the run's folder."""
    seed: RunConfig
    """A run file without `run` and `data.path`: the dense model, its warmup and its constant learning rate."""
    budget: float = Field(gt=0)
    """Training FLOPs of every arm after the seed, in multiples of the seed's."""
    branch: BranchSection
    mix: dict[str, Any] = {}
    """As for `lightbulb upcycle`, without `run`, `sources`, `seed_model`, `data` and `train`. With `moments: keep`
    tuning begins with the branches' moments."""
    tune: TuneSection = TuneSection()
    decay: DecaySection
    baselines: BaselinesSection = BaselinesSection()
    jobs: JobsConfig = JobsConfig()
    """How a run that has the machines for itself is started."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Fill in the folders that follow from ``run``."""
        if not (isinstance(values, dict) and isinstance(values.get("run"), str | Path)):
            return values
        run, values = Path(values["run"]), dict(values)
        if isinstance(corpus := values.get(CORPUS), dict):
            values[CORPUS] = corpus = {"output": str(run / "corpus")} | corpus
            if isinstance(seed := values.get(SEED), dict):
                data = {"path": corpus["output"]} | (seed.get("data") or {})
                values[SEED] = {"run": str(run / SEED)} | seed | {"data": data}
        return values

    @model_validator(mode="after")
    def _fits(self) -> "RecipeConfig":
        if self.corpus.cluster is None:
            raise ValueError("corpus.cluster: there is one branch for each cluster; add cluster: {num_clusters: 4}")
        if self.corpus.cluster.num_clusters < 2:
            raise ValueError(f"corpus.cluster.num_clusters {self.corpus.cluster.num_clusters}: a mixture needs 2")
        if self.corpus.context_length != self.seed.model.context_length:
            raise ValueError(
                f"seed.model.context_length {self.seed.model.context_length} is not the corpus's "
                f"{self.corpus.context_length}; make them equal"
            )
        tokenizer, model = self.corpus.tokenizer, self.seed.model
        if tokenizer.path is None and tokenizer.vocab_size > model.vocab_size:
            raise ValueError(
                f"corpus.tokenizer.vocab_size {tokenizer.vocab_size} exceeds seed.model.vocab_size {model.vocab_size}; "
                "make them equal"
            )
        if self.branch.share + self.decay.share >= 1:
            raise ValueError(
                f"branch.share {self.branch.share} + decay.share {self.decay.share} leave nothing for tune; lower one"
            )
        return self

    @model_validator(mode="after")
    def _goes_on_from_the_seed(self) -> "RecipeConfig":
        seed, steps = self.seed, self.seed.train.steps
        if seed.schedule.decay:
            raise ValueError(f"seed.schedule.decay {seed.schedule.decay}: branches start before the decay; set 0")
        for name, stages in (("data.stages", seed.data.stages), ("train.batch_stages", seed.train.batch_stages)):
            for number, stage in enumerate(stages):
                if not (isinstance(stage.start, int) and stage.start < steps):
                    raise ValueError(
                        f"seed.{name}.{number}.start {stage.start!r}: what goes on from the seed is longer; say after "
                        f"how many of the seed's {steps} steps"
                    )
        for name in ("run", "data"):
            wanted = {"run": str(self.run / SEED), "data": str(self.corpus.output)}[name]
            found = seed.run if name == "run" else str(seed.data.path)
            if found != wanted:
                raise ValueError(f"seed.{name} {found!r} follows from the recipe ({wanted!r}); leave it out")
        return self

    @property
    def num_clusters(self) -> int:
        """Branches, and sources of the mixture."""
        assert self.corpus.cluster is not None
        return self.corpus.cluster.num_clusters


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RecipeConfig:
    """Read a recipe with ``a.b=c`` overrides.

    Raises:
        ConfigError: naming field, value and fix.
    """
    path = Path(path)
    values = read_values(path)
    for section in (CORPUS, SEED):
        values[section] = _section(values.get(section), section, path)
    for override in overrides:
        values = over(values, parse_override(override))
    return build_config(RecipeConfig, values, str(path))


def _section(value: Any, name: str, recipe: Path) -> Any:
    """A section written in place, or in a file (``base:``) whose settings it may change."""
    if isinstance(value, str):
        value = {"base": value}
    if not isinstance(value, dict) or "base" not in value:
        return value
    inherited = read_values(recipe.parent / str(value["base"]))
    if name == SEED:
        inherited = {key: item for key, item in inherited.items() if key not in ("run", "prompts")}
        inherited["data"] = {key: item for key, item in (inherited.get("data") or {}).items() if key != "path"}
    else:
        inherited.pop("output", None)
    own = {key: item for key, item in value.items() if key != "base"}
    return over(inherited, own)
