"""Branches that share their trunk every so many steps, all in one process.

Between synchronisations every branch trains by itself on its cluster; then the trunk (everything but channel mixers)
moves by an outer step along the branches' mean change, as in DiLoCo (Douillard et al. 2023, arXiv:2311.08105), while
channel mixers, the experts to be, stay where they are. Every step: a mixture routed by clusters with one trunk. Never:
branches as in Branch-Train-MiX.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from growth.corpora import CLUSTERS
from growth.plan import Settings, Task
from torch import Tensor

from lightbulb.config import save_config
from lightbulb.data.loader import TrainLoader
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.topology import destroy_groups
from lightbulb.train.checkpoint import newest_checkpoint, start_from
from lightbulb.train.config import RunConfig
from lightbulb.train.manifest import TrainState
from lightbulb.train.save import Saver
from lightbulb.train.schedule import learning_rate_factor

CPU = torch.device("cpu")


def is_trunk(name: str) -> bool:
    """Whether a parameter is shared: everything that does not become an expert."""
    return ".channel." not in name


class Branch:
    """One branch: its model, its data and where it is saved."""

    def __init__(self, config: RunConfig, seed: Path):
        destroy_groups()  # of the branch before: each engine makes its own, all of one process
        self.config, train = config, config.train
        self.engine = Engine(config.model, config.parallel, config.optimizer, "fp32", config.seed, CPU)
        checkpoint, problems = newest_checkpoint(seed)
        assert checkpoint is not None, problems
        start_from(self.engine, checkpoint)
        self.loader = TrainLoader(
            config.data, config.model.context_length, config.model.vocab_size, config.seed, train.global_batch_size,
            train.micro_batch_size, mixtures=config.mixtures(),
        )  # fmt: skip
        self.tokens = 0

    def step(self, number: int) -> None:
        """Train one step."""
        factor = learning_rate_factor(self.config.schedule, number, self.config.train.steps)
        self.tokens += self.engine.train_step(self.loader.next_step(), self.config.optimizer.lr * factor).tokens

    def trunk(self) -> Iterator[tuple[str, Tensor]]:
        """What is shared, by name; writing to it changes the model (float32 weights are their own masters)."""
        for name, parameter in self.engine.named_parameters():
            if is_trunk(name):
                yield name, parameter.data

    def save(self, tokenizer: Path) -> None:
        """Leave the run folder that `lightbulb upcycle` reads."""
        run, steps = Path(self.config.run), self.config.train.steps
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        save_config(self.config, run / "config.yaml")
        shutil.copyfile(tokenizer, run / "tokenizer.json")
        state = TrainState(
            step=steps, tokens=self.tokens, optimizer_step=steps, skipped_steps=0, loader=self.loader.state_dict(),
            config=self.config.model_dump(mode="json"), layout=self.config.parallel.label(),
        )  # fmt: skip
        saver = Saver(run, self.engine, keep=1, background=False)
        saver.save(state)
        saver.close()
        self.loader.close()


def train_synced(task: Task, config: RunConfig, folders: dict[str, Path]) -> Settings:
    """Train the branches of a task to their end and save each; gives what was sent."""
    seed, folder, settings = folders[task.needs[0]], folders[task.name], task.settings
    branches = [Branch(branch_config(config, folder, number), seed) for number in range(CLUSTERS)]
    shared = {name: values.clone() for name, values in branches[0].trunk()}
    momenta = {name: torch.zeros_like(values) for name, values in shared.items()}
    syncs = 0
    for number in range(config.train.steps):
        for branch in branches:
            branch.step(number)
        if (number + 1) % settings["every"] == 0 or number + 1 == config.train.steps:
            outer_step(branches, shared, momenta, settings["outer_lr"], settings["outer_momentum"])
            syncs += 1
    for branch in branches:
        branch.save(seed / "tokenizer.json")
    trunk = sum(values.numel() for values in shared.values())
    return {"syncs": syncs, "trunk_parameters": trunk, "tokens": sum(branch.tokens for branch in branches)}


@torch.no_grad()
def outer_step(
    branches: list[Branch], shared: dict[str, Tensor], momenta: dict[str, Tensor], lr: float, momentum: float
) -> None:
    """Nesterov's step of the shared trunk along the branches' mean change, given to all of them."""
    trunks = [dict(branch.trunk()) for branch in branches]
    for name, values in shared.items():
        change = torch.stack([values - trunk[name] for trunk in trunks]).mean(0)
        momenta[name].mul_(momentum).add_(change)
        values.sub_(lr * (change + momentum * momenta[name]))
        for trunk in trunks:
            trunk[name].copy_(values)


def branch_config(config: RunConfig, folder: Path, number: int) -> RunConfig:
    """The run of one branch."""
    data: dict[str, Any] = config.data.model_dump(mode="json")
    data["mixture"] = {"weights": {f"*/cluster-{number:02d}": 1.0}}
    values = config.model_dump(mode="json") | {"run": str(folder / str(number)), "data": data}
    return RunConfig.model_validate(values)
