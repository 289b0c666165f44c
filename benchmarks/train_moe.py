"""Training a small mixture of experts: our language model against Hugging Face's Mixtral of the same shape, on CPU.

Both models start from the same weights and see the same tokens, so their losses agree. They run in one process, turn
by turn with a matrix product (the roof) between them, on one thread; CPU time is compared round by round and the median
ratio reported, because rates of a shared machine drift far more than the two differ. Sections:

- forward and backward in bfloat16 and float32, glibc told to keep its memory (:func:`tune_allocator`) for both;
- the same in bfloat16 with glibc's defaults;
- full steps in bfloat16 with fused AdamW on float32 master weights, each model in a process of its own;
- how far the bfloat16 gradients are from float32's, with the same weights and the same experts chosen, ours over the
  peer's (``grad_error_vs_hf``): speed is not bought with precision.

The peer is taken at its best: the faster of SDPA and eager attention, no cache, no checkpointing, no router loss (ours
does compute its balance and z-losses). A ratio above 1 means that ours is faster. The last line printed is JSON.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import transformers
from mixtral import BATCH, LENGTH, Step, build_mixtral, build_ours, forward_backward, gradient_errors, language_config
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightbulb.parallel.host import tune_allocator

PROBE = 1024  # the roof: a square product of this size

Result = TypeVar("Result")


@dataclass
class Section:
    """CPU seconds of each round, by contender, and what else a child process found out.

    Attributes:
        seconds: contender (``ours``, ``hf``, ``probe``) to one time per round.
        losses: contender to the loss of its first step.
        attention: the implementation the peer ran with.
        profile: contender to milliseconds of its step by operator.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    attention: str = "sdpa"
    profile: dict[str, dict[str, float]] = field(default_factory=dict)

    def ratios(self) -> list[float]:
        """The peer's time over ours, round by round."""
        return [theirs / ours for theirs, ours in zip(self.seconds["hf"], self.seconds["ours"], strict=True)]

    def roof_shares(self, name: str) -> list[float]:
        """Active model FLOPs per second as a share of the probe's rate, round by round."""
        work = language_config().cost().train_flops * LENGTH * BATCH / (2 * PROBE**3)
        return [work * p / s for s, p in zip(self.seconds[name], self.seconds["probe"], strict=True)]


def full_step(name: str, model: nn.Module) -> Step:
    """A step of one contender with AdamW on float32 master weights."""
    inner = forward_backward(name, model)
    parameters = list(model.parameters())
    masters = [p.detach().float().clone().requires_grad_() for p in parameters]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        loss = inner()
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
        return loss

    return step


def cpu_seconds(step: Callable[[], Any]) -> float:
    """CPU time of one call in this process."""
    start = time.process_time()
    step()
    return time.process_time() - start


def gemm_probe(dtype: torch.dtype) -> Callable[[], float]:
    """CPU seconds of one square product, the mean over a burst long enough to time."""
    a, b = (torch.randn(PROBE, PROBE).to(dtype) for _ in range(2))
    out = a @ b
    repeats = max(1, round(0.05 / max(cpu_seconds(lambda: torch.mm(a, b, out=out)), 1e-4)))

    def burst() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=out)

    return lambda: cpu_seconds(burst) / repeats


def compare(dtype: torch.dtype, tuned: bool, attention: str | None, deadline: float) -> Section:
    """Forward and backward of both models turn by turn until the deadline (runs in a child process)."""
    if tuned:
        tune_allocator()
    ours = build_ours(dtype)
    peer = build_mixtral(dtype, ours, attention or "sdpa")
    steps = {"ours": forward_backward("ours", ours), "hf": forward_backward("hf", peer)}
    section = Section(losses={name: step() for name, step in steps.items()})
    section.attention = attention or faster_attention(peer, steps["hf"])
    peer.set_attn_implementation(section.attention)
    probe = gemm_probe(dtype)
    if attention is None and dtype == torch.bfloat16:
        section.profile = {name: profiled(step) for name, step in steps.items()}
    section.seconds = {"ours": [], "hf": [], "probe": []}
    for order in rounds(deadline):
        section.seconds["probe"].append(probe())
        for name in order:
            section.seconds[name].append(cpu_seconds(steps[name]))
    return section


def rounds(deadline: float) -> Any:
    """Yield the order of the contenders, changing every round, while a round still fits (three at least)."""
    done, start = 0, time.time()
    while done < 3 or time.time() + (time.time() - start) / done < deadline:
        yield ("ours", "hf") if done % 2 == 0 else ("hf", "ours")
        done += 1


def faster_attention(peer: nn.Module, step: Step) -> str:
    """Which attention implementation the peer is faster with here."""
    best = {"sdpa": float("inf"), "eager": float("inf")}
    for _ in range(2):
        for name in best:
            peer.set_attn_implementation(name)  # type: ignore[operator]
            best[name] = min(best[name], cpu_seconds(step))
    return min(best, key=lambda name: best[name])


def profiled(step: Step) -> dict[str, float]:
    """Milliseconds of one step by operator, without the operators it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    return {event.key: event.self_cpu_time_total / 1e3 for event in found.key_averages()}


def serve_full_steps(name: str, attention: str, pipe: Connection) -> None:
    """Run one full step for every message (a child process), answering with its CPU seconds; stop at None."""
    tune_allocator()
    model = build_ours(torch.bfloat16)
    if name == "hf":
        model = build_mixtral(torch.bfloat16, model, attention)
    step = full_step(name, model)
    pipe.send(step())
    while pipe.recv() is not None:
        pipe.send(cpu_seconds(step))


def compare_full_steps(attention: str, deadline: float) -> Section:
    """Full steps, one process per model, alternating."""
    context = multiprocessing.get_context("fork")
    pipes, children = {}, []
    section = Section(attention=attention, seconds={"ours": [], "hf": []})
    for name in section.seconds:
        pipes[name], theirs = context.Pipe()
        children.append(context.Process(target=serve_full_steps, args=(name, attention, theirs), daemon=True))
        children[-1].start()
        theirs.close()  # so that a child's death ends recv()
        section.losses[name] = pipes[name].recv()
    for order in rounds(deadline):
        for name in order:
            pipes[name].send("step")
            section.seconds[name].append(pipes[name].recv())
    for pipe, child in zip(pipes.values(), children, strict=True):
        pipe.send(None)
        child.join()
    return section


def in_child(target: Callable[..., Result], *args: Any) -> Result:
    """Run a section in a forked process: the imports are paid once, the allocator starts fresh."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    child = context.Process(target=lambda: theirs.send(target(*args)))
    child.start()
    theirs.close()
    result = mine.recv()  # EOFError when the child failed; its traceback is on stderr
    child.join()
    return result


def measure(deadline: float) -> dict[str, Section]:
    """All timed sections, the time left divided among them."""
    bf16, fp32 = torch.bfloat16, torch.float32

    def until(share: float) -> float:
        return time.time() + share * (deadline - time.time())

    sections = {"bf16": in_child(compare, bf16, True, None, until(0.36))}
    attention = sections["bf16"].attention
    sections["fp32"] = in_child(compare, fp32, True, None, until(0.42))
    sections["bf16, default allocator"] = in_child(compare, bf16, False, attention, until(0.45))
    sections["bf16, full step"] = compare_full_steps(attention, deadline)
    return sections


def quartiles(values: list[float]) -> list[float]:
    """First and third quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")[::2]


def summarise(sections: dict[str, Section], errors: dict[str, list[float]]) -> dict[str, Any]:
    """The JSON object: ratios, shares of the roof, errors of the gradients, and what they were measured on."""
    keys = ("vs_hf_mixtral_bf16", "vs_hf_mixtral_fp32", "default_allocator_bf16", "full_step_bf16")
    tokens = LENGTH * BATCH
    result: dict[str, Any] = {}
    for key, section in zip(keys, sections.values(), strict=True):
        ratios = section.ratios()
        result[f"ratio_{key}"] = round(statistics.median(ratios), 3)
        result[f"iqr_{key}"] = [round(value, 3) for value in quartiles(ratios)]
        result[f"rounds_{key}"] = len(ratios)
        for name in ("ours", "hf"):
            result[f"tokens_per_second_{key}_{name}"] = round(tokens / statistics.median(section.seconds[name]))
    for precision in ("bf16", "fp32"):
        section = sections[precision]
        result[f"mfu_vs_gemm_{precision}"] = round(statistics.median(section.roof_shares("ours")), 3)
        result[f"mfu_vs_gemm_{precision}_hf"] = round(statistics.median(section.roof_shares("hf")), 3)
        result[f"gemm_gflops_{precision}"] = round(2e-9 * PROBE**3 / statistics.median(section.seconds["probe"]), 1)
        result[f"loss_{precision}"] = section.losses
        result[f"hf_attention_{precision}"] = section.attention
    over_peer = [ours / peer for ours, peer in zip(errors["ours"], errors["hf"], strict=True)]
    result["grad_error_vs_hf"] = round(statistics.median(over_peer), 3)
    result["grad_error_vs_hf_by_seed"] = [round(value, 3) for value in over_peer]
    result |= {f"grad_error_{name}": [round(value, 5) for value in values] for name, values in errors.items()}
    return result | environment()


def environment() -> dict[str, Any]:
    """Sizes, machine and versions."""
    ours = language_config()
    with torch.device("meta"):
        counts = {"parameters_ours": sum(p.numel() for p in ours.build().parameters())}
    return counts | {
        "active_parameters": ours.cost().active_params,
        "train_flops_per_token": ours.cost().train_flops,
        "cpu": cpu_name(),
        "amx": bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name() -> str:
    """The processor as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def show(sections: dict[str, Section], console: Console) -> None:
    """Print the comparison, and where the time of a bfloat16 step goes."""
    table = Table(
        title=f"MoE training, {LENGTH} x {BATCH} tokens, one thread, CPU time (medians; ratio > 1: ours faster)"
    )
    for column in (
        "section",
        "ours tok/s",
        "HF tok/s",
        "ours ms",
        "HF ms",
        "ratio",
        "quartiles",
        "ours/roof",
        "HF/roof",
    ):
        table.add_column(column, justify="left" if column == "section" else "right")
    for name, section in sections.items():
        ours, peer = (statistics.median(section.seconds[who]) for who in ("ours", "hf"))
        shares = ["", ""]
        if "probe" in section.seconds:
            shares = [f"{statistics.median(section.roof_shares(who)):.1%}" for who in ("ours", "hf")]
        table.add_row(
            f"{name} ({len(section.ratios())} rounds)",
            *(f"{LENGTH * BATCH / seconds:,.0f}" for seconds in (ours, peer)),
            *(f"{1e3 * seconds:,.0f}" for seconds in (ours, peer)),
            f"{statistics.median(section.ratios()):.2f}",
            "{:.2f} to {:.2f}".format(*quartiles(section.ratios())),
            *shares,
        )
    console.print(table)
    console.print(profile_table(sections["bf16"].profile))


def profile_table(found: dict[str, dict[str, float]]) -> Table:
    """The operators either model spends most time in."""
    table = Table(title="One bf16 step by operator, ms (self time)")
    for column in ("operator", "ours", "HF"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    names = sorted(
        set(found["ours"]) | set(found["hf"]), key=lambda n: -found["ours"].get(n, 0) - found["hf"].get(n, 0)
    )
    for name in names[:18]:
        table.add_row(name, *(f"{found[who].get(name, 0.0):,.1f}" for who in ("ours", "hf")))
    table.add_row("sum", *(f"{sum(found[who].values()):,.1f}" for who in ("ours", "hf")))
    return table


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180.0, help="time for everything, imports included")
    parser.add_argument("--json", type=Path, help="also write the JSON object here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    errors = in_child(gradient_errors)
    sections = measure(psutil.Process().create_time() + args.seconds)
    show(sections, Console(width=132))
    result = summarise(sections, errors)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
