"""Checking a run folder: every file of every checkpoint, the sample ledger, and on request the corpus itself."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightbulb.config import ConfigError, build_config
from lightbulb.data.batches import BatchSizes
from lightbulb.data.config import DataError
from lightbulb.data.corpus import Corpus
from lightbulb.data.loader import TrainLoader
from lightbulb.train.config import RunConfig
from lightbulb.train.ledger import LedgerCheck, LedgerError, Line, check_ledger, read_ledger, tokens_hash
from lightbulb.train.manifest import (
    CheckpointError,
    TrainState,
    check_complete,
    check_files,
    complete_checkpoints,
    read_manifest,
    read_state,
)

MAX_MISMATCHES = 10


@dataclass
class CheckpointReport:
    """One checkpoint: its files and bytes, and what is wrong with it, every damaged file named."""

    folder: str
    step: int | None = None
    files: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class DataReport:
    """The corpus of the run: shards checked, ledger lines whose tokens were compared with them."""

    path: str
    shards: int = 0
    lines: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What was found in a run folder."""

    run: str
    checkpoints: list[CheckpointReport]
    ledger: LedgerCheck | None
    data: DataReport | None

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong."""
        found = [problem for checkpoint in self.checkpoints for problem in checkpoint.problems]
        found += self.ledger.problems if self.ledger else []
        return found + (self.data.problems if self.data else [])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"ok": not self.problems} | asdict(self)


def verify_run(run: Path, with_data: bool = False) -> Report:
    """Check a run folder; reads only, also while the run is training.

    Args:
        run: the folder.
        with_data: also check every shard of the corpus, and that the ledger's tokens are the corpus's.

    Raises:
        CheckpointError: there is nothing to check.
    """
    folders = complete_checkpoints(run)
    if not folders:
        raise CheckpointError(f"{run}: has no checkpoint; name the folder of a run that has saved one")
    reports, newest = [], None
    for folder in folders:
        report, state = _check_checkpoint(folder)
        if report.problems and not folder.exists():
            continue  # the run is training and has just removed it
        reports.append(report)
        newest = newest or state
    if newest is None:
        return Report(str(run), reports, None, None)
    ledger = _check_ledger(run, newest)
    return Report(str(run), reports, ledger, _check_data(run, newest) if with_data else None)


def _check_checkpoint(folder: Path) -> tuple[CheckpointReport, TrainState | None]:
    report = CheckpointReport(str(folder))
    try:
        manifest = read_manifest(folder)
        report.step, report.files = manifest.step, len(manifest.files)
        report.bytes = sum(file.size for file in manifest.files.values())
        report.problems = list(check_files(folder, manifest))
        if not report.problems:
            check_complete(folder, manifest.tensors)
            return report, read_state(folder)
    except CheckpointError as error:
        report.problems.append(str(error))
    return report, None


def _check_ledger(run: Path, state: TrainState) -> LedgerCheck:
    """Up to the newest good checkpoint; what was trained after it is not saved yet."""
    try:
        sizes = _batch_sizes(state)
        consumed = 0 if state.is_untrained else state.loader["samples_consumed"]
        check = check_ledger(
            run, state.step, sizes, state.loader.get("groups"), state.loader.get("plain_samples", consumed)
        )
    except (KeyError, TypeError) as error:
        return LedgerCheck(state.step, problems=[f"{run}: the checkpoint's state lacks {error}"])
    if consumed != (wanted := sizes.samples(state.step)):
        check.problems.append(f"{run}: {consumed} samples consumed after {state.step} steps of {wanted} together")
    return check


def _batch_sizes(state: TrainState) -> BatchSizes:
    """Those of the config that a checkpoint was written with."""
    train = state.config["train"]
    if not train.get("batch_stages"):  # as in every config from before there were any
        return BatchSizes(train["global_batch_size"])
    return build_config(RunConfig, state.config).batch_sizes()


def _check_data(run: Path, state: TrainState) -> DataReport:
    """Every shard against its hash, then every line of the ledger against the rows that stood at its places."""
    report = DataReport(str(state.config.get("data", {}).get("path")))
    try:
        config = build_config(RunConfig, state.config, str(run))
        model, path = config.model, config.data.path.expanduser()
        for split in ("train", "held_out"):
            for domain in Corpus(path, split, model.context_length, model.vocab_size).domains.values():
                report.problems += domain.problems()
                report.shards += domain.num_shards
        if not report.problems:
            _compare_tokens(run, state.step, open_loader(config, state), report)
    except (ConfigError, DataError, LedgerError) as error:
        report.problems.append(str(error))
    return report


def open_loader(config: RunConfig, state: TrainState) -> TrainLoader:
    """The loader of a run as its checkpoint left it, on one rank.

    Raises:
        DataError: the corpus is not the one that the run was trained on.
    """
    model, sizes = config.model, config.batch_sizes()
    loader = TrainLoader(
        config.data, model.context_length, model.vocab_size, config.seed, sizes, 1, mixtures=config.mixtures()
    )
    loader.load_state_dict(state.loader)
    return loader


def rows_of(line: Line, loader: TrainLoader) -> list[int]:
    """Rows of the corpus that a line of the ledger names, in the order its tokens are hashed in."""
    if line.groups is None:
        return [int(row) for start, stop in line.places for row in loader.row_numbers(start, stop)]
    names = loader.sequence.names
    unknown = line.groups.keys() - set(names)
    if unknown:
        raise LedgerError(f"step {line.step}: names the group {min(unknown)}, which the corpus does not have")
    return [
        int(row)
        for name in sorted(line.groups)
        for row in loader.sequence.group_rows(names.index(name), np.arange(*line.groups[name]))
    ]


def _compare_tokens(run: Path, steps: int, loader: TrainLoader, report: DataReport) -> None:
    for path, line in read_ledger(run, steps):
        found = tokens_hash(torch.from_numpy(loader.corpus[row].tokens[:-1]) for row in rows_of(line, loader))
        report.lines += 1
        if found != line.tokens:
            report.problems.append(f"{path}: step {line.step} was trained on other tokens than the corpus holds")
            if len(report.problems) >= MAX_MISMATCHES:
                return
