"""A few training steps, once in plain PyTorch and once on a layout, compared tensor by tensor.

The reference uses neither Megatron-core nor process groups: the whole model in one process, the whole global batch in
one pass, ``torch.optim.AdamW`` (on float32 masters when the model is float64). Both train on the same synthetic
batches, made to bring out what usually breaks: token ids are skewed, so that experts get unequal loads; rows predict
unequal numbers of tokens, so that a mean of means is not the mean; and the gradient is clipped at least once.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightbulb.models.language import LanguageConfig, LanguageModel
from lightbulb.models.scaling import LR_SCALE
from lightbulb.models.trainable import Trainable, freeze, trained_names
from lightbulb.nn.cross_entropy import IGNORE
from lightbulb.nn.noise import Noise
from lightbulb.nn.parameter import initialise, logical_of, set_values, values_of
from lightbulb.parallel.engine import Engine, StepResult, router_label
from lightbulb.parallel.host import Precision
from lightbulb.parallel.optimizer import MOMENTS, OptimizerConfig
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.routing.balance import summarise
from lightbulb.routing.router import Router

_MEAN_DOCUMENTS = 3.0  # per context
_NOTICED = 1e-2  # a parameter whose gradient is below this share of the model's largest is compared with the share


@dataclass(frozen=True)
class Trial:
    """One short training.

    Attributes:
        model: the model.
        optimizer: AdamW settings; the learning rate is constant.
        seed: seeds weights and batches.
        steps: optimizer steps.
        global_batch_size: contexts per step over all ranks.
        with_documents: give the model document ids.
        parallel: the layout; the reference ignores this and what follows.
        micro_batch_size: contexts per forward pass of one rank.
        precision: of weights and activations; the reference computes in float32, or in float64 if this is fp64.
        variant: which of a proof's models this is; empty when there is one.
        trainable: which parameters are trained, in the reference too.
    """

    model: LanguageConfig
    optimizer: OptimizerConfig
    seed: int
    steps: int
    global_batch_size: int
    with_documents: bool = False
    parallel: ParallelConfig = ParallelConfig(data=1)
    micro_batch_size: int = 1
    precision: Precision = "fp32"
    variant: str = ""
    trainable: Trainable = "all"

    def label(self) -> str:
        """Model, layout and micro-batch size."""
        prefix = f"{self.variant}: " if self.variant else ""
        return f"{prefix}{self.parallel.label()} micro-batch {self.micro_batch_size}"


class SyntheticBatch(NamedTuple):
    """``[batch, length]`` each and ``sample_ids [batch]``, as the engine expects."""

    tokens: Tensor
    labels: Tensor
    document_ids: Tensor | None
    sample_ids: Tensor


@dataclass(frozen=True)
class Reference:
    """What the plain training gave; its tensors are in files (see :func:`train_reference`).

    Attributes:
        results: of each step.
        clip_grad: the clipping norm that was used: the config's, lowered where that would never have clipped.
        shapes: every parameter's logical shape.
        largest: the model's largest element of each step's gradient (``gradient/0``) and of each moment.
    """

    results: list[StepResult]
    clip_grad: float
    shapes: dict[str, tuple[int, ...]]
    largest: dict[str, float] = field(default_factory=dict)


class Difference(NamedTuple):
    """How far a layout is from the reference, at the worst place."""

    value: float
    where: str
    ours: float
    expected: float


@dataclass
class RankReport:
    """What one rank found.

    Attributes:
        found: the largest difference of each quantity in each step (counted from 1). Steps are kept apart because the
            first one that is wrong names the culprit: after it, everything differs.
        held: for each parameter on this rank, the bounds of its part of the logical tensor.
    """

    found: dict[tuple[str, int], Difference] = field(default_factory=dict)
    held: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    def note(self, quantity: str, step: int, found: Difference) -> None:
        """Keep the larger difference; one that is not a number is the largest."""
        if math.isnan(found.value):
            found = found._replace(value=math.inf)
        key = quantity, step
        if key not in self.found or found.value > self.found[key].value:
            self.found[key] = found

    def worst(self) -> dict[str, Difference]:
        """The largest difference of each quantity over all steps."""
        worst: dict[str, Difference] = {}
        for (quantity, _), found in self.found.items():
            if quantity not in worst or found.value > worst[quantity].value:
                worst[quantity] = found
        return worst

    def compare(self, quantity: str, step: int, where: str, ours: Tensor, expected: Tensor, scale: float = 1.0) -> None:
        """Note the largest element-wise difference, in units of ``scale``."""
        ours, expected = ours.double().flatten(), expected.double().flatten()
        error = (ours - expected).abs().nan_to_num(math.inf)
        worst = int(error.argmax())
        # An expected tensor of zeros leaves no scale: then only equality is no difference.
        value = float(error[worst]) / scale if scale else (math.inf if error[worst] else 0.0)
        self.note(quantity, step, Difference(value, where, float(ours[worst]), float(expected[worst])))


def global_batch(trial: Trial, step: int) -> SyntheticBatch:
    """All contexts of one step, the same on every rank."""
    generator = torch.Generator().manual_seed(trial.seed * 1_000_003 + step)
    rows, length = trial.global_batch_size, trial.model.context_length
    uniform = torch.rand(rows, length + 1, generator=generator)
    ids = (uniform.pow(3) * trial.model.vocab_size).long().clamp(max=trial.model.vocab_size - 1)
    predicted = length - torch.arange(rows) * length // (2 * rows)
    labels = ids[:, 1:].masked_fill(torch.arange(length) >= predicted[:, None], IGNORE)
    documents = None
    if trial.with_documents:
        documents = (torch.rand(rows, length, generator=generator) < _MEAN_DOCUMENTS / length).cumsum(1)
    return SyntheticBatch(ids[:, :-1], labels, documents, torch.arange(step * rows, (step + 1) * rows))


def train_reference(rank: int, trial: Trial, folder: Path) -> Reference:
    """Train in plain PyTorch; tensors go to ``step-N.safetensors`` (gradients) and ``end.safetensors``.

    The ``rank`` is there because :meth:`RankPool.run` passes one; call with 0.
    """
    model = trial.model.build()
    freeze(model, trained_names(trial.model, trial.trainable))
    initialise(model, trial.seed)
    if trial.precision == "fp64":
        model.double()
    parameters = dict(model.named_parameters())
    trained = {name: parameter.detach().float() for name, parameter in parameters.items() if parameter.requires_grad}
    masters = [(tensor, parameters[name]) for name, tensor in trained.items()]
    optimizer = _plain_adamw(trial.optimizer, masters, trial.precision == "fp64")
    results: list[StepResult] = []
    largest: dict[str, float] = {}
    clip_grad = trial.optimizer.clip_grad
    for step in range(trial.steps):
        result, gradients = _plain_gradients(model, global_batch(trial, step), trial.seed)
        save_file(gradients, _gradient_file(folder, step))
        largest[f"gradient/{step}"] = _largest(gradients.values())
        if step == 0:
            clip_grad = min(clip_grad, result.grad_norm / 2)
        result.clip_coefficient = min(1.0, clip_grad / (result.grad_norm + 1e-6))
        for name, master in trained.items():
            master.grad = gradients[name].float() * result.clip_coefficient
        optimizer.step()
        for name, master in trained.items():
            set_values(parameters[name], master)
        results.append(result)
    end = {f"weight/{name}": values_of(p).detach() for name, p in parameters.items()}
    end |= {f"{moment}/{name}": optimizer.state[p][moment] for name, p in trained.items() for moment in MOMENTS}
    end |= {f"router/{name}.{key}": value for name, router in _routers(model) for key, value in router.named_buffers()}
    save_file(end, _end_file(folder))
    for moment in MOMENTS:
        largest[moment] = _largest(optimizer.state[p][moment] for p in trained.values())
    return Reference(results, clip_grad, {name: logical_of(p).shape for name, p in parameters.items()}, largest)


def train_layout(rank: int, trial: Trial, reference: Reference, folder: Path) -> RankReport:
    """Train on a layout and compare everything this rank holds with the reference (a job of a rank pool)."""
    optimizer = trial.optimizer.model_copy(update={"clip_grad": reference.clip_grad})
    cpu = torch.device("cpu")
    engine = Engine(trial.model, trial.parallel, optimizer, trial.precision, trial.seed, cpu, trial.trainable)
    # Also the second copy of a tied table, which engine.named_parameters() leaves out.
    parameters = dict(engine.all_parameters())
    report = RankReport()
    report.held = {n: tuple((s.start, s.stop) for s in logical_of(p).slices()) for n, p in parameters.items()}
    for step, expected in enumerate(reference.results):
        engine.forward_backward(_my_batches(engine, trial, step))
        with safe_open(_gradient_file(folder, step), "pt") as tensors:
            for name, parameter in parameters.items():
                if not _is_trained(parameter, name in tensors.keys()):  # noqa: SIM118  (an open file, no mapping)
                    continue
                whole = tensors.get_tensor(name)
                ours, part = engine.gradient(parameter), whole[logical_of(parameter).slices()]
                scale = _scale(whole, reference.largest[f"gradient/{step}"] * _NOTICED)
                report.compare("gradient", step + 1, f"{name} at step {step + 1}", ours, part, scale)
        _compare_step(report, step, engine.update(optimizer.lr), expected)
    with safe_open(_end_file(folder), "pt") as tensors:
        for name, parameter in parameters.items():
            _compare_end(report, trial.steps, engine, name, parameter, tensors, reference.largest)
        for name, router in engine.routers():
            for key, value in router.named_buffers():
                expected_value = tensors.get_tensor(f"router/{name}.{key}")
                report.compare("router", trial.steps, f"{name}.{key}", value, expected_value)
    engine.close()
    return report


def _plain_adamw(config: OptimizerConfig, masters: list[tuple[Tensor, nn.Parameter]], fused: bool) -> torch.optim.AdamW:
    """Of master weights and the parameters they are of. Fused it rounds as the engine's does, step by step and operator
    by operator otherwise."""
    groups: list[dict[str, Any]] = [
        {
            "params": [master],
            "lr": config.lr * getattr(parameter, LR_SCALE, 1.0),
            "weight_decay": 0.0 if _is_vector(parameter) else config.weight_decay,
        }
        for master, parameter in masters
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, config.lr, betas, config.eps, config.weight_decay, foreach=False, fused=fused)


def _is_vector(parameter: nn.Parameter) -> bool:
    """Whether a parameter has one dimension, of an expert if it has experts."""
    return parameter.dim() - logical_of(parameter).is_expert < 2


def _plain_gradients(model: LanguageModel, batch: SyntheticBatch, seed: int) -> tuple[StepResult, dict[str, Tensor]]:
    """Backward over the whole global batch at once, divided by its tokens; the parameters' own ``grad`` tensors."""
    model.zero_grad()
    noise = Noise(seed, batch.sample_ids, batch.tokens.shape[1])
    loss = model(batch.tokens, batch.labels, batch.document_ids, noise).sum()
    loss.backward()
    tokens = int((batch.labels != IGNORE).sum())
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not _is_trained(parameter, parameter.grad is not None):
            continue
        assert parameter.grad is not None
        gradients[name] = parameter.grad.div_(tokens)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
    result = StepResult(loss.item() / tokens, tokens, norm, 1.0, applied=True)
    for name, router in _routers(model):
        sums = router.statistics.take(loss.device)
        router.set_load(sums[: router.num_experts])
        result.routers[router_label(name)] = summarise(sums, router.num_experts)
    return result, gradients


def _my_batches(engine: Engine, trial: Trial, step: int) -> list[SyntheticBatch]:
    """This rank's rows of the global batch, cut into micro-batches."""
    rows = trial.global_batch_size // (trial.parallel.data or 1)
    whole = global_batch(trial, step)
    starts = range(engine.data_rank * rows, (engine.data_rank + 1) * rows, trial.micro_batch_size)
    cuts = [slice(start, start + trial.micro_batch_size) for start in starts]
    return [SyntheticBatch(*(None if t is None else t[cut] for t in whole)) for cut in cuts]  # type: ignore[arg-type]


def _compare_step(report: RankReport, step: int, ours: StepResult, expected: StepResult) -> None:
    def compare(quantity: str, what: str, mine: Any, theirs: Any, scale: float = 1.0) -> None:
        where = f"{what} at step {step + 1}"
        report.compare(quantity, step + 1, where, torch.tensor(mine).double(), torch.tensor(theirs).double(), scale)

    compare("loss", "loss", ours.loss, expected.loss)
    compare("grad_norm", "gradient norm", ours.grad_norm, expected.grad_norm, expected.grad_norm)
    compare("clip", "clip coefficient", ours.clip_coefficient, expected.clip_coefficient, expected.clip_coefficient)
    if ours.tokens != expected.tokens or ours.routers.keys() != expected.routers.keys() or not ours.applied:
        raise ValueError(f"step {step + 1}: {ours} does not match {expected}")
    for layer, statistics in expected.routers.items():
        for key, value in statistics.items():
            compare("router", f"layer {layer} {key}", ours.routers[layer][key], value)


def _compare_end(
    report: RankReport,
    step: int,
    engine: Engine,
    name: str,
    parameter: nn.Parameter,
    tensors: Any,
    largest: dict[str, float],
) -> None:
    """Weight, its master copy and moments after the last step."""
    slices = logical_of(parameter).slices()
    state = engine.read_parameter(parameter)
    weight = tensors.get_tensor(f"weight/{name}")[slices]
    report.compare("weight", step, f"{name} after the last step", values_of(parameter).detach(), weight)
    report.compare("weight", step, f"{name} (master) after the last step", state["master"], weight)
    if not parameter.requires_grad:
        return
    for moment in MOMENTS:
        whole = tensors.get_tensor(f"{moment}/{name}")
        where = f"{name} ({moment}) after the last step"
        noticed = _NOTICED**2 if moment == "exp_avg_sq" else _NOTICED
        report.compare("moment", step, where, state[moment], whole[slices], _scale(whole, largest[moment] * noticed))


def _is_trained(parameter: nn.Parameter, has_gradient: bool) -> bool:
    """Whether a parameter is not frozen; it has a gradient if so, and only then."""
    is_trained = parameter.requires_grad
    if is_trained != has_gradient or (not is_trained and parameter.grad is not None):
        raise ValueError(f"{logical_of(parameter)}: {'no' if is_trained else 'a frozen parameter with a'} gradient")
    return is_trained


def _scale(whole: Tensor, least: float) -> float:
    """What differences in a parameter's gradient or moment are measured by: its largest element, if that is not the
    remainder of a cancellation (the gradient along a direction that a norm takes out, say)."""
    return max(float(whole.abs().max()), least)


def _largest(tensors: Iterable[Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors)


def _routers(model: nn.Module) -> list[tuple[str, Router]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]


def _gradient_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step}.safetensors"


def _end_file(folder: Path) -> Path:
    return folder / "end.safetensors"
