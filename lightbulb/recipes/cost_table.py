"""What a recipe would cost, before anything runs."""

from typing import NamedTuple

from rich.table import Table

from lightbulb.recipes.plan import ADAM_BYTES, MASTER_BYTES, Plan, Training

HOUR = 3600.0


class Machine(NamedTuple):
    """What computes.

    Attributes:
        mfu: share of the peak that training reaches.
        peak: FLOP/s of one device.
    """

    mfu: float
    peak: float

    def hours(self, flops: float) -> float:
        """Device hours of so many FLOPs."""
        return flops / (self.mfu * self.peak) / HOUR


def cost_table(plan: Plan, machine: Machine) -> Table:
    """Stages with their tokens, FLOPs, parameters, sizes of their last checkpoints, and device hours."""
    about = f"{plan.recipe.run}: at {machine.mfu:.0%} of a device's {machine.peak / 1e12:g} TFLOP/s"
    sizes = ("parameters", "active", "checkpoints")
    table = Table("stage", "runs × steps", "tokens", "FLOPs per token", "FLOPs", *sizes, "device hours", title=about)
    for column in table.columns[1:]:
        column.justify = "right"
    for training in plan.trainings:
        table.add_row(*_row(training, machine))
        if training.name == plan.branch.name:
            table.add_row(*_mixture(plan))
    table.add_section()
    total = sum(training.flops for training in (plan.seed, plan.branch, plan.tune, plan.decay))
    table.add_row("mixture's arm", "", "", "", f"{total:.4g}", "", "", "", hours(machine, total))
    if plan.recipe.baselines.dense:
        total = plan.seed.flops + plan.dense.flops
        table.add_row("dense arm", "", "", "", f"{total:.4g}", "", "", "", hours(machine, total))
    return table


def _row(training: Training, machine: Machine) -> list[str]:
    cost = training.cost
    runs = f"{training.runs} × " if training.runs > 1 else ""
    return [
        training.name, f"{runs}{training.steps:,}", short(training.tokens), f"{training.flops_per_token:.3g}",
        f"{training.flops:.4g}", short(cost.params), short(cost.active_params), size(training.checkpoint_bytes),
        hours(machine, training.flops),
    ]  # fmt: skip


def _mixture(plan: Plan) -> list[str]:
    cost = plan.tune.cost
    bytes_ = size(cost.params * (ADAM_BYTES if plan.upcycle.moments == "keep" else MASTER_BYTES))
    return ["mix", "", "", "", "", short(cost.params), short(cost.active_params), bytes_, ""]


def hours(machine: Machine, flops: float) -> str:
    """Device hours: ``33,661``, ``0.05``."""
    found = machine.hours(flops)
    return f"{found:,.0f}" if found >= 1000 else f"{found:.4g}"


def short(count: float) -> str:
    """``1.25 B``."""
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count:g}"


def size(bytes_: float) -> str:
    """``1.25 TB``."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB")):
        if bytes_ >= factor:
            return f"{bytes_ / factor:.4g} {unit}"
    return f"{bytes_ / 1e6:.4g} MB"
