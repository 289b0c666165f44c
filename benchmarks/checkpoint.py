"""Saving and loading a checkpoint against `torch.save`/`torch.load` and a plain file copy, on one process.

One engine's whole training state (float32 masters and both moments) is saved and loaded turn by turn with the peers,
and the median of the rounds' ratios reported: the rates of a shared machine drift more than the contenders differ.

- *save*: ours is what a run without `train.async_save` waits for: every file hashed, on disk, manifest, rename, removal
  of the previous one. `torch.save` writes the same tensors, the copy the same bytes; all three end with fsync and put
  the new in the place of the old, whose removal takes a quarter of the time.
- *load*: ours verifies every hash and fills the engine. `torch.load` (weights only) fills the same tensors; the copy
  is `shutil.copyfile` without fsync, from the page cache, as the loads are.
- *blocked*: the time training waits for a save in the background while steps go on, over the time the same save takes
  in the foreground. *Overhead* adds what those steps lose to the writing beside them.

The same is done in memory (`/dev/shm`), where no disk hides what the programs cost. The last line printed is JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightbulb.config import build_config
from lightbulb.evaluation.trial import SyntheticBatch
from lightbulb.models.language import LanguageConfig
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.host import process_group, tune_allocator
from lightbulb.parallel.optimizer import OptimizerConfig
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.train.boxes import owned_boxes
from lightbulb.train.checkpoint import load_into, newest_checkpoint
from lightbulb.train.manifest import TrainState, step_folder
from lightbulb.train.save import Saver

VOCAB, LENGTH = 8192, 16
MOE = {"type": "switch", "num_experts": 8, "hidden_dim": 1024, "router": {"top_k": 2}}
MEMORY = Path("/dev/shm")


def build_engine(layers: int) -> Engine:
    """A mixture of experts of about 14 M parameters a layer, with Adam's moments filled by one step."""
    block = {"token": {"type": "attention", "num_heads": 8}, "channel": MOE}
    values = {"vocab_size": VOCAB, "dim": 512, "num_layers": layers, "context_length": LENGTH, "block_pattern": [block]}
    parallel = ParallelConfig().resolve(1)
    model = build_config(LanguageConfig, values)
    engine = Engine(model, parallel, OptimizerConfig(), "fp32", 0, torch.device("cpu"))
    train_step(engine)
    return engine


def train_step(engine: Engine, saver: Saver | None = None) -> None:
    """One step on one short row: the point is that the weights change."""
    rows = torch.randint(0, VOCAB, (1, LENGTH + 1))
    engine.forward_backward([SyntheticBatch(rows[:, :-1], rows[:, 1:], None, torch.arange(1))])
    if saver is not None:
        saver.settle()
    engine.update(1e-4)


class Bench:
    """The contenders in one folder.

    Args:
        engine: what is saved.
        folder: where; emptied before and after.
    """

    def __init__(self, engine: Engine, folder: Path):
        self.engine, self.folder = engine, folder
        self.step = 0
        self.tensors: dict[str, Tensor] = {
            f"{box.kind}/{box.name}/{box.start}": box.values for box in owned_boxes(engine)
        }
        self.bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.foreground = Saver(folder / "run", engine, keep=1, background=False)
        self.background = Saver(folder / "run", engine, keep=1)

    def save(self, saver: Saver) -> None:
        """Save as a run does."""
        self.step += 1
        saver.save(TrainState(self.step, 0, self.engine.optimizer_step, 0, {}, {}, "one process"))

    def save_torch(self) -> None:
        """`torch.save` to the disk; like a checkpoint, the old file goes when the new one is complete."""
        with (self.folder / "new.pt").open("wb") as file:
            torch.save(self.tensors, file)
            file.flush()
            os.fsync(file.fileno())
        (self.folder / "new.pt").replace(self.folder / "torch.pt")

    def copy(self, sync: bool) -> None:
        """A plain copy of as many bytes, which replaces the last one when it is complete."""
        shutil.copyfile(self.folder / "torch.pt", self.folder / "new.pt")
        if sync:
            with (self.folder / "new.pt").open("rb") as file:
                os.fsync(file.fileno())
        (self.folder / "new.pt").replace(self.folder / "copy.pt")

    def load(self) -> None:
        """Verify and load as a run does."""
        checkpoint, problems = newest_checkpoint(self.folder / "run")
        assert checkpoint is not None, problems
        load_into(self.engine, checkpoint)

    @torch.no_grad()
    def load_torch(self) -> None:
        """`torch.load` into the same tensors."""
        for name, tensor in torch.load(self.folder / "torch.pt", weights_only=True).items():
            self.tensors[name].copy_(tensor)
        self.tensors = {f"{b.kind}/{b.name}/{b.start}": b.values for b in owned_boxes(self.engine)}

    def save_while_training(self) -> dict[str, float]:
        """Seconds training waits for a save in the background, that the save takes, and that its steps take longer."""
        steps, started = 0, time.perf_counter()
        self.save(self.background)
        while not step_folder(self.folder / "run", self.step).exists():
            train_step(self.engine, self.background)
            self.background.poll()
            steps += 1
        during = time.perf_counter() - started
        self.background.wait()
        alone = timed(lambda: [train_step(self.engine) for _ in range(steps)])
        saver = self.background
        return {"blocked": saver.blocked_seconds, "background": saver.written_seconds, "overhead": during - alone}

    def round(self, number: int) -> dict[str, float]:
        """Every contender once, each round in another order; seconds of each."""
        saves: dict[str, Callable[[], object]] = {
            "torch_save": self.save_torch,
            "save": lambda: self.save(self.foreground),
            "copy_sync": lambda: self.copy(sync=True),
        }
        loads: dict[str, Callable[[], object]] = {
            "load": self.load,
            "torch_load": self.load_torch,
            "copy": lambda: self.copy(sync=False),
        }
        times = {}
        for contenders in (saves, loads):
            names = list(contenders)
            for name in names[number % 3 :] + names[: number % 3]:
                if name == "copy":
                    (self.folder / "copy.pt").unlink()
                os.sync()  # nothing that others left to write
                times[name] = timed(contenders[name])
        return times | self.save_while_training()


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(engine: Engine, parent: Path, rounds: int) -> dict[str, Any]:
    """Median ratios and rates of one place."""
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=parent) as folder:
        bench = Bench(engine, Path(folder))
        bench.round(0)  # warms up: buffers, page cache
        found = [bench.round(number) for number in range(rounds)]

    def ratio(above: str, below: str) -> float:
        return round(statistics.median(times[above] / times[below] for times in found), 3)

    def rate(name: str) -> float:
        return round(bench.bytes / 1e6 / statistics.median(times[name] for times in found), 1)

    return {
        "save_vs_copy": ratio("copy_sync", "save"),
        "save_vs_torch": ratio("torch_save", "save"),
        "load_vs_copy": ratio("copy", "load"),
        "load_vs_torch": ratio("torch_load", "load"),
        "async_block_share": ratio("blocked", "save"),
        "async_block_share_of_background": ratio("blocked", "background"),
        "async_overhead_share": ratio("overhead", "save"),
        "mb_per_second": {name: rate(name) for name in found[0] if name not in ("blocked", "background", "overhead")},
        "blocked_seconds": round(statistics.median(times["blocked"] for times in found), 4),
    }


def main() -> None:
    """Measure on disk, then in memory."""
    parser = argparse.ArgumentParser(description="Checkpoints against torch.save, torch.load and a plain copy.")
    parser.add_argument("--folder", type=Path, default=Path("."), help="a folder on the disk to measure (default .)")
    parser.add_argument("--layers", type=int, default=3, help="size of the model, 14 M parameters each (default 3)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    tune_allocator()
    with process_group(torch.device("cpu")):
        engine = build_engine(arguments.layers)
        megabytes = sum(box.values.nbytes for box in owned_boxes(engine)) / 1e6
        result: dict[str, Any] = {"megabytes": round(megabytes, 1), "rounds": arguments.rounds}
        result |= measure(engine, arguments.folder, arguments.rounds)
        if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 5e6 * megabytes:
            result["in_memory"] = measure(engine, MEMORY, arguments.rounds)
        engine.close()
    for place, values in (("disk", result), ("memory", result.get("in_memory", {}))):
        for name, value in values.get("mb_per_second", {}).items():
            print(f"{place:>6}  {name:<10} {value:>8.0f} MB/s")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
