"""Branches whose trunk is brought together every so many steps, all in one process.

`lightbulb branch` with ``sync`` does the same with a process for each branch, which meet through files; here a meeting
costs no more than its arithmetic, and there are hundreds. Steps, data and outer optimizer are LightBulb's own.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growth.corpora import CLUSTERS
from growth.plan import Settings, Task
from lightbulb.config import save_config
from lightbulb.data.loader import TrainLoader
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.topology import destroy_groups
from lightbulb.train.checkpoint import newest_checkpoint, start_from
from lightbulb.train.config import RunConfig
from lightbulb.train.manifest import TrainState
from lightbulb.train.outer import SyncConfig, average, outer_step, trunk_names
from lightbulb.train.save import Saver
from lightbulb.train.schedule import learning_rate_factor

CPU = torch.device("cpu")


class Branch:
    """One branch: its model, its data and where it is saved.

    Args:
        config: of its run.
        seed: run whose weights and moments it starts with.
        local: patterns of what it keeps to itself.

    Attributes:
        trunk: what it shares. Writing to it changes the model: float32 weights are their own masters.
    """

    def __init__(self, config: RunConfig, seed: Path, local: list[str]):
        destroy_groups()  # of the branch before: each engine makes its own, of this one process
        self.config, train = config, config.train
        self.engine = Engine(config.model, config.parallel, config.optimizer, "fp32", config.seed, CPU)
        checkpoint, problems = newest_checkpoint(seed)
        assert checkpoint is not None, problems
        start_from(self.engine, checkpoint, with_moments=True)
        self.loader = TrainLoader(
            config.data, config.model.context_length, config.model.vocab_size, config.seed, train.global_batch_size,
            train.micro_batch_size, mixtures=config.mixtures(),
        )  # fmt: skip
        parameters = dict(self.engine.named_parameters())
        self.trunk: list[Tensor] = [parameters[name].data for name in trunk_names(parameters, local)]
        self.tokens = 0

    def step(self, number: int) -> None:
        """Train one step."""
        factor = learning_rate_factor(self.config.schedule, number, self.config.train.steps)
        self.tokens += self.engine.train_step(self.loader.next_step(), self.config.optimizer.lr * factor).tokens

    def save(self, tokenizer: Path) -> None:
        """Leave a run folder for `lightbulb upcycle`."""
        run, steps = Path(self.config.run), self.config.train.steps
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        save_config(self.config, run / "config.yaml")
        shutil.copyfile(tokenizer, run / "tokenizer.json")
        state = TrainState(
            step=steps, tokens=self.tokens, optimizer_step=self.engine.optimizer_step, skipped_steps=0,
            loader=self.loader.state_dict(), config=self.config.model_dump(mode="json"),
            layout=self.config.parallel.label(),
        )  # fmt: skip
        saver = Saver(run, self.engine, keep=1, background=False)
        saver.save(state)
        saver.close()
        self.loader.close()


def train_synced(task: Task, config: RunConfig, folders: dict[str, Path]) -> Settings:
    """Train the branches of a task to their end and save each; gives what they sent.

    Args:
        task: of kind ``sync``.
        config: of a branch, but for its cluster and folder.
        folders: of every task's run.
    """
    seed, folder, sync = folders[task.needs[0]], folders[task.name], SyncConfig(**task.settings["sync"])
    branches = [Branch(branch_config(config, folder, number), seed, sync.local) for number in range(CLUSTERS)]
    shared = [values.clone() for values in branches[0].trunk]
    momentum = [torch.zeros_like(values) for values in shared]
    for number in range(config.train.steps):
        for branch in branches:
            branch.step(number)
        if (number + 1) % sync.every == 0:
            means = [average(values) for values in zip(*(branch.trunk for branch in branches), strict=True)]
            outer_step(shared, means, momentum, sync)
            for branch in branches:
                for mine, values in zip(branch.trunk, shared, strict=True):
                    mine.copy_(values)
    for branch in branches:
        branch.save(seed / "tokenizer.json")
    trunk = sum(values.numel() for values in shared)
    meetings = config.train.steps // sync.every
    return {"meetings": meetings, "trunk_parameters": trunk, "tokens": sum(branch.tokens for branch in branches)}


def branch_config(config: RunConfig, folder: Path, number: int) -> RunConfig:
    """The run of one branch."""
    data: dict[str, Any] = config.data.model_dump(mode="json")
    data["mixture"] = {"weights": {f"*/cluster-{number:02d}": 1.0}}
    values = config.model_dump(mode="json") | {"run": str(folder / str(number)), "data": data}
    return RunConfig.model_validate(values)
