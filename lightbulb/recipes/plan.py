"""What a recipe will do, known from its config alone: the run files of its trainings, their lengths, and their costs.

Training FLOPs are tokens times the model's FLOPs per token (``config.cost()``, forward and backward; frozen weights
are discounted), so that arms of different models can be given the same. The forward passes that start routers, compare
conversions and evaluate are not counted: together a thousandth of the quick recipe's.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightbulb.config import ConfigError, Cost, build_config, over
from lightbulb.experts.branch_config import BranchConfig
from lightbulb.experts.mixture_model import mixture_config
from lightbulb.experts.upcycle_config import UpcycleConfig
from lightbulb.models.trainable import train_flops, trained_names
from lightbulb.recipes.config import SEED, RecipeConfig, Settings
from lightbulb.train.config import RunConfig
from lightbulb.train.schedule import decay_start

ADAM_BYTES, MASTER_BYTES = 12, 4
"""Of a parameter in a checkpoint: float32 master with both moments, and alone."""


@dataclass(frozen=True)
class Training:
    """One training of a recipe.

    Attributes:
        name: of its stage.
        config: its run file; of branches, the first one's.
        first_step: where it begins: behind the steps of the run it goes on from.
        runs: how many of them there are.
    """

    name: str
    config: RunConfig
    first_step: int = 0
    runs: int = 1

    @property
    def steps(self) -> int:
        """Optimizer steps of one run."""
        return self.config.train.steps - self.first_step

    @property
    def tokens(self) -> int:
        """Places that are predicted, of all runs."""
        return self.tokens_until(self.config.train.steps)

    def tokens_until(self, step: int) -> int:
        """The same of their steps up to this one."""
        sizes = self.config.batch_sizes()
        return self.runs * (sizes.samples(step) - sizes.samples(self.first_step)) * self.config.model.context_length

    @cached_property
    def flops_per_token(self) -> float:
        """Training FLOPs."""
        return flops_per_token(self.config)

    @property
    def flops(self) -> float:
        """Training FLOPs of all runs."""
        return self.tokens * self.flops_per_token

    @cached_property
    def cost(self) -> Cost:
        """Of the model."""
        return self.config.model.cost()

    @property
    def checkpoint_bytes(self) -> int:
        """Size of the last checkpoints of all runs."""
        return self.runs * self.cost.params * ADAM_BYTES


@dataclass(frozen=True)
class Plan:
    """The trainings of a recipe, in its folder."""

    recipe: RecipeConfig

    @cached_property
    def seed(self) -> Training:
        """The dense model up to where everything else begins."""
        return Training(SEED, self.recipe.seed)

    @cached_property
    def budget(self) -> float:
        """FLOPs of an arm after the seed."""
        return self.recipe.budget * self.seed.flops

    @cached_property
    def branch_config(self) -> BranchConfig:
        """What `lightbulb branch` would read."""
        section, seed = self.recipe.branch, self.recipe.seed
        trained = self._run("branches", seed.model, section, steps=1)
        flops = self.recipe.num_clusters * tokens_per_step(trained) * flops_per_token(trained)
        steps = _whole(section.share * self.budget / flops, "branch.share", "branches")
        values = {
            "run": str(self.recipe.run / "branches"),
            "seed_run": seed.run,
            "at_step": seed.train.steps,
            "corpus": str(self.recipe.corpus.output),
            "optimizer": section.optimizer,
            "schedule": section.schedule,
            "train": section.train | {"steps": steps},
            "parallel": section.parallel,
            "sync": section.sync,
            "jobs": section.jobs,
        }
        return build_config(BranchConfig, values, "branch")

    @cached_property
    def branch(self) -> Training:
        """One run for each cluster."""
        config = self._run("branches", self.recipe.seed.model, self.recipe.branch, self.branch_config.train["steps"])
        return Training("branch", config, runs=self.recipe.num_clusters)

    @cached_property
    def upcycle(self) -> UpcycleConfig:
        """What `lightbulb upcycle` would read."""
        values = {
            "method": "btx",
            "router": {"top_k": 2},
            "router_start": {"kind": "centroid"},
            **self.recipe.mix,
            "run": str(self.recipe.run / "mixture"),
            "seed_model": self.recipe.seed.run,
            "data": self.recipe.seed.data.model_dump(mode="json"),
            "sources": [{"path": str(run)} for run in self.branch_runs],
        }
        for name in ("run", "seed_model", "sources", "data", "train"):
            if name in self.recipe.mix:
                raise ConfigError(f"mix.{name} follows from the recipe; leave it out")
        return build_config(UpcycleConfig, values, "mix")

    @property
    def branch_runs(self) -> list[Path]:
        """Folders of the branches."""
        return [self.branch_config.folder(cluster) for cluster in range(self.recipe.num_clusters)]

    @cached_property
    def tune(self) -> Training:
        """The mixture with a constant learning rate."""
        model = mixture_config(self.recipe.seed.model, self.upcycle)
        one = self._run("tune", model, self.recipe.tune, steps=1)
        left = self.budget - self.branch.flops - self.recipe.decay.share * self.budget
        steps = _whole(left / tokens_per_step(one) / flops_per_token(one), "budget", "tune")
        config = self._run("tune", model, self.recipe.tune, steps)
        start = {"start_from": str(self.upcycle.run), "start_from_moments": self.upcycle.moments == "keep"}
        again = start | {"seed": config.seed + 1}  # not the seed's samples once more
        return Training("tune", config.model_copy(update=again))

    @cached_property
    def decay(self) -> Training:
        """The mixture's last steps."""
        share = self.recipe.decay.share * self.budget
        return self._decayed("decay", self.tune, stable=0, decay_flops=share)

    @cached_property
    def dense(self) -> Training:
        """The seed going on alone, with what the mixture's arm spends."""
        spent = self.branch.flops + self.tune.flops + self.decay.flops
        decay_flops = self.recipe.decay.share * spent
        per_step = tokens_per_step(self.recipe.seed) * self.seed.flops_per_token
        stable = _whole((spent - decay_flops) / per_step, "budget", "baselines.dense")
        return self._decayed("dense", self.seed, stable, spent - stable * per_step)

    def check(self) -> None:
        """Make all configs, so that what is wrong is said before anything runs.

        Raises:
            ConfigError: naming section, field, value and fix.
        """
        for training in self.trainings:
            training.config.mixtures()

    @property
    def trainings(self) -> list[Training]:
        """All of them, in their order."""
        found = [self.seed, self.branch, self.tune, self.decay]
        return found + ([self.dense] if self.recipe.baselines.dense else [])

    def _run(self, name: str, model: Any, section: Settings, steps: int) -> RunConfig:
        """A run file: the seed's settings as they are at its end, a section's over them."""
        config = self.recipe.seed
        seed = config.model_dump(mode="json", exclude={"start_from", "start_from_moments", "prompts"})
        mixtures = [mixture.model_dump(mode="json") for _, mixture in config.mixtures()]
        seed["data"] |= {"mixture": mixtures[-1] if mixtures else None, "stages": []}
        seed["train"] |= {"global_batch_size": last_batch(config), "batch_stages": []}
        own = {"run": str(self.recipe.run / name), "schedule": {"decay": 0.0}, "train": {"steps": steps}}
        values = over(over(seed, section.values()), own) | {"model": model}
        return build_config(RunConfig, values, name)

    def _decayed(self, name: str, parent: Training, stable: int, decay_flops: float) -> Training:
        """A run that goes on from another one's last step: so many steps as before, then its decay."""
        section, run = self.recipe.decay, parent.config
        before, start = run.train.steps, run.train.steps + stable
        batch = section.train.get("global_batch_size", last_batch(run))
        per_step = batch * run.model.context_length * parent.flops_per_token
        steps = start + _whole(decay_flops / per_step, "decay.share", name)
        values = over(run.model_dump(mode="json"), section.values())
        values |= {"run": str(self.recipe.run / name), "start_from": None, "start_from_moments": False}
        values["schedule"] |= {"warmup": round(run.schedule.warmup * before) / steps, "decay": (steps - start) / steps}
        values["train"] |= {"steps": steps, "global_batch_size": run.train.global_batch_size}
        if batch != last_batch(run):
            values["train"]["batch_stages"].append({"start": start, "global_batch_size": batch})
        if section.mixture is not None:
            values["data"]["stages"].append({"start": start, "mixture": section.mixture.model_dump()})
        config = build_config(RunConfig, values, name)
        assert decay_start(config.schedule, steps) == start
        return Training(name, config, first_step=before)


def last_batch(config: RunConfig) -> int:
    """Contexts of a run's last step."""
    return config.batch_sizes().of_step(config.train.steps - 1)


def tokens_per_step(config: RunConfig) -> int:
    """Places that a run's last step predicts."""
    return last_batch(config) * config.model.context_length


def flops_per_token(config: RunConfig) -> float:
    """FLOPs of one token's forward and backward pass, of what is trained."""
    trainable = config.train.trainable
    if trainable == "all":
        return config.model.cost().train_flops
    return train_flops(config.model, trained_names(config.model, trainable))


def _whole(steps: float, setting: str, name: str) -> int:
    """Steps, at least one."""
    if round(steps) < 1:
        raise ConfigError(f"{setting}: leaves {steps:.2f} steps for {name}; raise it, or make batches smaller")
    return round(steps)
