"""The proof of equal layouts: train on every layout that fits, compare everything with one process, certify.

A layout passes when its losses, every parameter's gradients, the gradient norm, the clip coefficient, the router
statistics and the updated weights and moments agree with a plain PyTorch training of the whole model (see
:mod:`lightbulb.evaluation.trial`) within :data:`BOUNDS`, on every rank and for every copy of a parameter, and when the
ranks together hold every element of every parameter.
"""

import itertools
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightbulb.config import ConfigError, load_config
from lightbulb.evaluation.trial import Difference, RankReport, Reference, Trial, train_layout, train_reference
from lightbulb.parallel.topology import ParallelConfig, layouts
from lightbulb.parallel.workers import JobError, RankPool
from lightbulb.train.config import RunConfig

BOUNDS = {
    "loss": 1e-5,  # absolute, nats
    "gradient": 1e-4,  # of the parameter's largest gradient, or of a hundredth of the model's
    "grad_norm": 1e-4,  # relative
    "clip": 1e-4,  # relative
    "router": 1e-5,  # absolute: loads, balance loss, z-loss, entropy
    "weight": 1e-5,  # absolute
    "moment": 1e-4,  # of the parameter's largest moment, or as above
}
"""Largest differences that float32 rounding may cause; a wrong group, scale or sum is orders of magnitude above."""

OPTIONS: list[dict[str, Any]] = [
    {},
    {"sequence": True},
    {"interleave": 2},
    {"recompute": "full"},
    {"sequence": True, "expert_tensor": 1, "expert_factor": "tensor"},  # more experts: tensor ranks' tokens differ
    {"distributed_optimizer": False},
    {"recompute": "selective"},
]
"""Settings that layouts take turns with; one that a layout or model cannot have passes the turn on."""

_MAX_MICRO_BATCHES = 8  # of a rank: enough to fill any pipeline here, few enough to be quick

MIN_EPS, MAX_LR = 1e-5, 1e-3
"""Adam divides each element's moment by its own size plus epsilon. Where that is only rounding noise, a tiny epsilon
turns it into a step of the full learning rate, on one process as on many; the proof keeps away from that."""


@dataclass(frozen=True)
class LayoutResult:
    """One layout against the reference.

    Attributes:
        trial: what was trained.
        seconds: wall time.
        worst: the largest difference of each quantity over all ranks and steps.
        failures: one line per broken bound, naming the place and the numbers; empty when the layout passed.
    """

    trial: Trial
    seconds: float
    worst: dict[str, Difference]
    failures: list[str]

    @property
    def ok(self) -> bool:
        """Whether every bound held."""
        return not self.failures


@dataclass(frozen=True)
class Skipped:
    """A layout the model or the batch cannot do, and why."""

    label: str
    reason: str


@dataclass(frozen=True)
class Proof:
    """Everything a certificate says.

    Attributes:
        variants: what was trained, by name, without the layout.
        references: the plain training of each.
        results: one per layout.
        skipped: the layouts that were not tried.
        seconds: wall time.
    """

    variants: dict[str, Trial]
    references: dict[str, Reference]
    results: list[LayoutResult]
    skipped: list[Skipped]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether layouts were compared and all passed."""
        return bool(self.results) and all(result.ok for result in self.results)

    def worst(self, quantity: str) -> float:
        """The largest difference over all layouts; infinite where a layout did not get as far as comparing."""
        return max((_value(result, quantity) for result in self.results), default=math.inf)


class ProofConfig(RunConfig):
    """A run file that may name variants of the run, which a proof spreads over its layouts."""

    variants: dict[str, list[str]] = {}
    """Name to settings such as ``model.tie_embeddings=true``; none for the run as it stands."""
    proof_precision: Literal["fp32", "fp64"] = "fp32"
    """What the proof computes in. Where a model rounds by itself (8-bit inputs), float32's noise now and then takes a
    value over the edge, which no layout is to blame for; in float64 that is out of reach."""


def load_variants(path: str, overrides: Sequence[str] = ()) -> dict[str, ProofConfig]:
    """The run file once for each of its variants.

    Raises:
        ConfigError: the file, an override or a variant's setting is not valid.
    """
    config = load_config(ProofConfig, path, overrides)
    variants = config.variants or {"": []}
    return {name: load_config(ProofConfig, path, [*overrides, *settings]) for name, settings in variants.items()}


def trial_of(config: RunConfig, steps: int, variant: str = "") -> Trial:
    """What the proof of a run file trains.

    Raises:
        ConfigError: the model drops tokens by rank and micro-batch, so that layouts differ by design.
    """
    for place, block in config.model.written_blocks():
        if getattr(block.channel, "capacity_factor", None) is not None:
            raise ConfigError(
                f"model.{place}.channel.capacity_factor: which tokens are dropped depends on the layout, so layouts "
                f"cannot be equal; prove the dropless model: model.{place}.channel.capacity_factor=null"
            )
    settings = {"lr": min(config.optimizer.lr, MAX_LR), "eps": max(config.optimizer.eps, MIN_EPS)}
    return Trial(
        model=config.model,
        optimizer=config.optimizer.model_copy(update=settings),
        seed=config.seed,
        steps=steps,
        global_batch_size=config.train.global_batch_size,
        with_documents=config.data.document_mask,
        precision=getattr(config, "proof_precision", "fp32"),
        variant=variant,
        trainable=config.train.trainable,
    )


def plan(variants: list[Trial], ranks: int) -> tuple[list[Trial], list[Skipped]]:
    """A trial for every choice of degrees on ``ranks`` processes and on each divisor of them.

    The options of a layout (:data:`OPTIONS`), the variants of the model and the micro-batch sizes take turns, those
    first that were tried least: what few layouts can have is tried on these. Degrees that no variant can be split by
    are skipped.
    """
    trials: list[Trial] = []
    skipped: list[Skipped] = []
    used: Counter[int] = Counter()
    for degrees in _all_layouts(ranks):
        reason = ""
        options = sorted(range(len(OPTIONS)), key=lambda index: used[index])
        names = sorted(variants, key=lambda variant: sum(variant.variant == trial.variant for trial in trials))
        for index, variant in itertools.product(options, names):
            found = _fit(variant, degrees, OPTIONS[index], len(trials))
            if isinstance(found, Trial):
                trials.append(found)
                used[index] += 1
                break
            reason = reason if OPTIONS[index] else found
        else:
            skipped.append(Skipped(degrees.label(), reason))
    return trials, skipped


def prove(
    variants: list[Trial],
    trials: list[Trial],
    skipped: list[Skipped],
    pool: RankPool,
    progress: Callable[[LayoutResult], None],
) -> Proof:
    """Train the reference of each variant and every trial, and compare.

    Args:
        variants: what to train.
        trials: the same on each layout, as :func:`plan` gives them.
        skipped: for the record.
        pool: at least as many ranks as the largest layout.
        progress: called with each layout's result.
    """
    started = time.monotonic()
    results, references = [], {}
    with tempfile.TemporaryDirectory(prefix="lightbulb-proof-") as name:
        for index, variant in enumerate(variants):
            folder = Path(name, str(index))
            folder.mkdir()
            (references[variant.variant],) = pool.run(1, train_reference, variant, folder)
        folders = {variant.variant: Path(name, str(index)) for index, variant in enumerate(variants)}
        for trial in trials:
            results.append(compare_layout(trial, references[trial.variant], folders[trial.variant], pool))
            progress(results[-1])
    by_name = {variant.variant: variant for variant in variants}
    return Proof(by_name, references, results, skipped, time.monotonic() - started)


def compare_layout(
    trial: Trial,
    reference: Reference,
    folder: Path,
    pool: RankPool,
    job: Callable[..., RankReport] = train_layout,
) -> LayoutResult:
    """Train one layout and judge it; a rank that fails is a failure of the layout.

    Args:
        trial: what to train.
        reference: the plain training of the same.
        folder: its tensors.
        pool: at least as many ranks as the layout.
        job: what each rank runs; the tests plant bugs here.
    """
    started = time.monotonic()
    parallel = trial.parallel
    world_size = parallel.copies * (parallel.data or 1)
    try:
        reports: list[RankReport] = pool.run(world_size, job, trial, reference, folder)
    except JobError as error:
        return LayoutResult(trial, time.monotonic() - started, {}, [f"{trial.label()}: {error}"])
    total = RankReport()
    for report in reports:
        for (quantity, step), difference in report.found.items():
            total.note(quantity, step, difference)
    failures = [f"{trial.label()}: {line}" for line in [*_broken_bounds(total), *_missing(reports, reference)]]
    return LayoutResult(trial, time.monotonic() - started, total.worst(), failures)


def _fit(variant: Trial, degrees: ParallelConfig, option: dict[str, Any], turn: int) -> Trial | str:
    """The variant on these degrees with this option, or why it cannot be."""
    data = degrees.data or 1
    rows = variant.global_batch_size // data
    if variant.global_batch_size % data:
        return f"train.global_batch_size {variant.global_batch_size} is not a multiple of parallel.data {data}"
    world_size = degrees.copies * data
    changes = {name: value for name, value in option.items() if name != "expert_factor"}
    if option.get("expert_factor") == "tensor":
        changes["expert"] = degrees.expert * degrees.tensor
    try:
        parallel = ParallelConfig(**degrees.model_dump() | changes).resolve(world_size)
        variant.model.check_parallel(parallel.degrees())
    except ValueError as error:
        return str(error)
    sizes = [size for size in range(1, rows + 1) if rows % size == 0 and rows // size <= _MAX_MICRO_BATCHES]
    if parallel.interleave > 1:
        sizes = [size for size in sizes if (rows // size) % parallel.pipeline == 0]
    if not sizes:
        return f"train.global_batch_size {variant.global_batch_size} has too few rows for interleaved stages"
    return replace(variant, parallel=parallel, micro_batch_size=sizes[turn % len(sizes)])


def _all_layouts(ranks: int) -> Iterator[ParallelConfig]:
    for world_size in range(1, ranks + 1):
        if ranks % world_size == 0:
            yield from layouts(world_size)


def _broken_bounds(report: RankReport) -> Iterator[str]:
    """The first step of each quantity that is outside its bound."""
    for quantity, bound in BOUNDS.items():
        broken = [step for (name, step), found in report.found.items() if name == quantity and not found.value <= bound]
        if broken:
            found = report.found[quantity, min(broken)]
            yield (
                f"{quantity}: {found.where} is {found.ours:.8g} instead of {found.expected:.8g}, "
                f"a difference of {found.value:.3g} where {bound:g} is allowed"
            )


def _missing(reports: list[RankReport], reference: Reference) -> Iterator[str]:
    """Parameters that the ranks together do not hold whole."""
    for name, shape in reference.shapes.items():
        parts = {report.held[name] for report in reports if name in report.held}
        elements = sum(math.prod(stop - start for start, stop in part) for part in parts)
        if elements != math.prod(shape):
            yield f"{name}: the ranks hold {elements} of its {math.prod(shape)} elements"


def _value(result: LayoutResult, quantity: str) -> float:
    if quantity in result.worst:
        return result.worst[quantity].value
    return math.inf if not result.worst else 0.0  # a dense model has no routers
