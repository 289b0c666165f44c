"""Branches that run as jobs of their own meet through files in a folder they share.

::

    round-00003/branch-1-rank-0000.safetensors   trunk of a branch; goes when the round is complete
                momentum-rank-0000.safetensors   of the outer optimizer; the newest round's is kept
                trunk-rank-0000.safetensors      what all have after the round
    branch-1.json                                how far a branch is

Round 0 is the start: the trunk of branch 0 becomes everyone's. Then, at each multiple of ``every`` steps, every branch
writes its trunk, branch 0 makes the outer step, and all take the result: so they are equal to the last bit whatever
computes them, and traffic grows with the number of branches, not with its square. Ranks keep to themselves: rank i of
a branch meets rank i of the others, which must have the same layout.

A branch that resumes from an older checkpoint finds the results of the rounds it goes through again, and is again
where it was; results are kept until no branch could resume before them. Each file has its final name when it is whole,
and a record with its size and hash beside it.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import orjson
import torch
from torch import Tensor

from lightbulb.folder import explained, write_atomically
from lightbulb.train.faults import fault_point
from lightbulb.train.outer import OuterConfig, average, outer_step
from lightbulb.train.tensor_file import TensorFile, TensorFileError, stream_tensors, sync_file


class ExchangeError(RuntimeError):
    """Branches that cannot meet; the message names them and the fix."""


class Exchange:
    """The folder, as one rank of one branch uses it. No communication but through files.

    Args:
        config: of this branch.
        rank: this process.
        layout: degrees and number of ranks, the same in every branch.
    """

    def __init__(self, config: OuterConfig, rank: int, layout: str):
        self.config, self.rank = config, rank
        self.folder = config.folder.expanduser()
        self._layout = layout
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, number: int, kind: str, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> int:
        """Write a file of this rank, whole or not at all; gives its bytes."""
        path = self._path(number, kind, self.rank)
        with explained(path):
            path.parent.mkdir(exist_ok=True)
        values = dict(tensors)
        partial = path.with_suffix(".partial")
        found = stream_tensors(partial, {name: value.shape for name, value in values.items()}, values.values())
        if kind in ("trunk", "momentum"):
            sync_file(partial)
        with explained(path):
            partial.replace(path)
        shapes = {name: list(value.shape) for name, value in values.items()}
        record = {"size": found.size, "hash": found.xxh3_128, "shapes": shapes, "layout": self._layout}
        write_atomically(path.with_suffix(".json"), orjson.dumps(record))
        return found.size

    def has(self, number: int, kind: str, rank: int | None = None) -> bool:
        """Whether a rank's file of a round is there (this rank's, if none is named)."""
        path = self._path(number, kind, self.rank if rank is None else rank)
        return path.with_suffix(".json").is_file() and path.is_file()

    def open(self, number: int, kind: str, shapes: Mapping[str, Sequence[int]], rank: int | None = None) -> TensorFile:
        """A file that is there, compared with its hash.

        Raises:
            ExchangeError: it is damaged, or of a branch with another layout, or without tensors of these shapes.
        """
        path = self._path(number, kind, self.rank if rank is None else rank)
        try:
            record = orjson.loads(path.with_suffix(".json").read_bytes())
            file = TensorFile(path)
            if file.hash(record["size"]) != record["hash"]:
                raise TensorFileError(f"{path}: damaged: its hash is not the one in {path.stem}.json")
        except (OSError, ValueError, KeyError) as error:
            raise ExchangeError(f"{error}; remove {path.parent} if every branch has a checkpoint before it") from None
        if record["layout"] != self._layout:
            raise ExchangeError(
                f"{path}: written by {record['layout']}, this branch is {self._layout}; give all branches one layout"
            )
        for name, shape in shapes.items():
            if record["shapes"].get(name) != list(shape):
                found = record["shapes"].get(name, "no tensor")
                raise ExchangeError(
                    f"{path}: {name!r} is {found} there and {list(shape)} here; give all branches one model and one "
                    "outer.local"
                )
        return file

    def present(self, number: int) -> list[int]:
        """Branches that have written their trunk of a round."""
        return [branch for branch in range(self.config.branches) if self.has(number, f"branch-{branch}")]

    def check_open(self, number: int) -> None:
        """Whether a round can still be held.

        Raises:
            ExchangeError: the others are past it, and its result is no longer there.
        """
        later = [int(path.parent.name.removeprefix("round-")) for path in self.folder.glob("round-*/trunk-*.json")]
        if any(found > number for found in later) and not self.has(number, "trunk"):
            raise ExchangeError(
                f"{self.folder}: round {number} is over and its result gone, as every branch had a checkpoint behind "
                "it; restore that checkpoint of this branch, or remove all branches and start them anew"
            )

    def bring_together(self, number: int, shapes: Mapping[str, Sequence[int]]) -> None:
        """Branch 0: the outer step from all trunks of a round."""
        values = [self.open(number, f"branch-{branch}", shapes) for branch in range(self.config.branches)]
        trunk = self.open(number - 1, "trunk", shapes)
        has_momentum = self.config.momentum > 0 and number > 1
        momentum = self.open(number - 1, "momentum", shapes) if has_momentum else None

        def steps() -> Iterator[tuple[str, Tensor, Tensor]]:
            for name, shape in shapes.items():
                shared = trunk.read(name, shape).clone()
                velocity = torch.zeros_like(shared) if momentum is None else momentum.read(name, shape).clone()
                outer_step([shared], [average([file.read(name, shape) for file in values])], [velocity], self.config)
                yield name, shared, velocity

        results = list(steps())
        if self.config.momentum:
            self.put(number, "momentum", [(name, velocity) for name, _, velocity in results])
        fault_point("outer.step", number)
        self.put(number, "trunk", [(name, shared) for name, shared, _ in results])

    def beat(self, content: Mapping[str, int]) -> None:
        """Say how far this branch is."""
        write_atomically(self.folder / f"branch-{self.config.branch}.json", orjson.dumps(content))

    def last_beat(self, branch: int) -> dict[str, int]:
        """What another branch said last; empty before it did."""
        try:
            return orjson.loads((self.folder / f"branch-{branch}.json").read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return {}

    def clean(self, number: int) -> None:
        """Remove what nobody needs when a round is complete: its branches, older momenta, results from before the
        oldest checkpoint that any branch has."""
        oldest = min(self.last_beat(branch).get("oldest", 0) for branch in range(self.config.branches))
        for folder in sorted(self.folder.glob("round-*")):
            round_of = int(folder.name.removeprefix("round-"))
            if round_of < min(oldest, number):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            unwanted = [*folder.glob("branch-*")] if round_of <= number else []
            unwanted += [*folder.glob("momentum-*")] if round_of < number else []
            for path in unwanted:
                path.unlink(missing_ok=True)

    def _path(self, number: int, kind: str, rank: int) -> Path:
        return self.folder / f"round-{number:05d}" / f"{kind}-rank-{rank:04d}.safetensors"
