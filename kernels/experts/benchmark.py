"""A mixture of experts against its peers: ``python -m lightbulb.kernels.experts.benchmark``.

On the CPU: Hugging Face's Mixtral block, router and all, where transformers is installed; and experts merged for pieces
of 256 tokens against a dense layer of their active size, which has less to do. On a GPU: what is written
with ``torch._grouped_mm`` (gather, product, activation, product, scatter-add), in the shapes of Mixtral 8x7B and
Qwen3-30B-A3B, tokens routed as evenly as can be or naturally (experts drawn with Zipf's law).
The roof is a square matrix product in the same loop.
"""

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from lightbulb.kernels.experts import grouped_swiglu, merged_swiglu, mixture_swiglu
from lightbulb.kernels.timing import Run, arguments, interleaved, named, ratio, report, show

ROOF = "roof"
Mixture = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of tokens, gates, experts, gate_up and down."""


class Shape(NamedTuple):
    """Sizes of a layer."""

    name: str
    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int

    @property
    def flops(self) -> float:
        """Of a forward; with its backward three times as many."""
        return 6.0 * self.tokens * self.top_k * self.dim * self.hidden


CPU = (Shape("small", 2048, 256, 520, 8, 2), Shape("wide", 2048, 1024, 2048, 8, 2))
MERGED = Shape("merged", 4096, 512, 1376, 8, 1)
GPU = (Shape("Mixtral", 16384, 4096, 14336, 8, 2), Shape("Qwen3-30B-A3B", 16384, 2048, 768, 128, 8))


def route(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Gates and experts ``[T, k]`` as Mixtral's: softmax in float32, the largest k, divided by their sum."""
    values, experts = linear(x, router).float().softmax(-1).topk(top_k, dim=-1)
    return values / values.sum(-1, keepdim=True), experts


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the models multiply in on this CPU."""
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.float32 if dtype == torch.bfloat16 and not has_amx else dtype


def weights(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Tokens, router, gate_up and down."""
    torch.manual_seed(0)
    sizes = (
        (shape.tokens, shape.dim),
        (shape.experts, shape.dim),
        (shape.experts, 2, shape.hidden, shape.dim),
        (shape.experts, shape.dim, shape.hidden),
    )
    scales = (1.0, 1.0, shape.dim**-0.5, shape.hidden**-0.5)
    return [
        torch.randn(size, dtype=dtype, device=device).mul_(scale).requires_grad_()
        for size, scale in zip(sizes, scales, strict=True)
    ]


def roof(size: int, dtype: torch.dtype, device: str) -> tuple[Run, float]:
    """A square product and its FLOPs."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * size**3


def steps(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> dict[str, Run]:
    """A forward, and a forward with its backward."""

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    return {"forward": forward, "forward and backward": lambda: torch.autograd.grad(function(*leaves), leaves, grad)}


def huggingface(leaves: list[Tensor], shape: Shape) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Mixtral's block of transformers 4 with the same weights, and its own leaves."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = {"hidden_size": shape.dim, "intermediate_size": shape.hidden}
    config = MixtralConfig(**sizes, num_local_experts=shape.experts, num_experts_per_tok=shape.top_k)
    x, router, gate_up, down = (t.detach() for t in leaves)
    block = MixtralSparseMoeBlock(config).to(x.dtype)
    state = {"gate.weight": router}
    for e in range(shape.experts):
        state |= {f"experts.{e}.w1.weight": gate_up[e, 0], f"experts.{e}.w3.weight": gate_up[e, 1]}
        state[f"experts.{e}.w2.weight"] = down[e]
    block.load_state_dict(state)
    return lambda x, *_: block(x[None])[0][0], [x.clone().requires_grad_(), *block.parameters()]


def cpu_rows(rounds: int) -> list[dict[str, object]]:
    """The table of the CPU."""
    table = []
    for shape in CPU:
        for dtype in (torch.bfloat16, torch.float32):
            leaves = weights(shape, dtype, "cpu")
            grad = torch.randn(shape.tokens, shape.dim).to(dtype)

            def ours(x: Tensor, router: Tensor, *experts: Tensor, shape: Shape = shape) -> Tensor:
                return mixture_swiglu(x, *route(x, router, shape.top_k), *experts, product_dtype(x.dtype))

            contenders = {"ours": steps(ours, leaves, grad)}
            if importlib.util.find_spec("transformers") is None:
                print("skipped: Hugging Face's block, transformers is not installed")
            else:
                contenders["hf"] = steps(*huggingface(leaves, shape), grad)
            fewer = rounds if shape.dim < 512 else max(3, rounds // 3)
            table += measure(shape, str(dtype), contenders, roof(1024, torch.float32, "cpu"), fewer)
    return table


def merged_rows(rounds: int) -> list[dict[str, object]]:
    """The table of merged experts."""
    pieces, dtype = MERGED.tokens // 256, product_dtype(torch.bfloat16)
    x, _, gate_up, down = (t.detach() for t in weights(MERGED, torch.bfloat16, "cpu"))
    grad = torch.randn_like(x)
    shares = torch.randn(pieces, MERGED.experts).softmax(-1)

    def ours(x: Tensor, shares: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return merged_swiglu(x, shares, (gate, up, down), [256] * pieces, dtype)

    def dense(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return grouped_swiglu(x, gate_up, down, [len(x)], dtype)

    def leaves(*tensors: Tensor) -> list[Tensor]:
        return [t.clone().requires_grad_() for t in tensors]

    contenders = {
        "ours": steps(ours, leaves(x, shares, *gate_up.unbind(1), down), grad),
        "dense": steps(dense, leaves(x, gate_up[:1], down[:1]), grad),
    }
    return measure(MERGED, "bfloat16", contenders, roof(1024, torch.float32, "cpu"), rounds)


def natural(shape: Shape) -> Tensor:
    """``[T, k]`` experts drawn without replacement with probabilities 1 / (rank + 1) (Zipf's law)."""
    chances = 1.0 / torch.arange(2, shape.experts + 2, device="cuda")
    return torch.multinomial(chances.expand(shape.tokens, -1), shape.top_k)


def balanced(shape: Shape) -> Tensor:
    """``[T, k]`` experts in turn."""
    return torch.arange(shape.tokens * shape.top_k, device="cuda").view(-1, shape.top_k) % shape.experts


def grouped_mm(x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The peer: PyTorch's grouped product between a gather and a scatter-add."""
    pairs, order = experts.flatten().sort()
    ends = torch.searchsorted(pairs, torch.arange(len(down), device=x.device), right=True).int()
    tokens = order // experts.shape[1]
    inner = torch._grouped_mm(x[tokens], gate_up.flatten(1, 2).transpose(1, 2), offs=ends)
    gate, up = inner.chunk(2, dim=-1)
    rows = torch._grouped_mm(silu(gate) * up, down.transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add(0, tokens, rows * gates.flatten()[order].to(x.dtype)[:, None])


def gpu_rows(rounds: int) -> list[dict[str, object]]:
    """The table of the GPU."""
    table = []
    for shape in GPU:
        x, _, gate_up, down = weights(shape, torch.bfloat16, "cuda")
        gates = torch.rand(shape.tokens, shape.top_k, device="cuda", requires_grad=True)
        grad = torch.randn_like(x)
        for routing in (natural, balanced):
            experts, contenders = routing(shape), {}
            for name, function in (("ours", mixture_swiglu), ("grouped_mm", grouped_mm)):

                def run(
                    x: Tensor, gates: Tensor, *rest: Tensor, own: Tensor = experts, f: Mixture = function
                ) -> Tensor:
                    return f(x, gates, own, *rest)

                contenders[name] = steps(run, [x, gates, gate_up, down], grad)
            table += measure(shape, routing.__name__, contenders, roof(8192, torch.bfloat16, "cuda"), rounds)
    return table


def measure(
    shape: Shape, case: str, contenders: dict[str, dict[str, Run]], square: tuple[Run, float], rounds: int
) -> list[dict[str, object]]:
    """A row for the forward, and one for forward and backward."""
    table = []
    for factor, name in ((1, "forward"), (3, "forward and backward")):
        runs = {who: parts[name] for who, parts in contenders.items()}
        seconds = interleaved({**runs, ROOF: square[0]}, rounds, warmup=1)
        rate = factor * shape.flops / statistics.median(seconds["ours"])
        row: dict[str, object] = {"shape": shape.name, "case": case.removeprefix("torch."), "pass": name}
        row |= {"ms": statistics.median(seconds["ours"]) * 1e3, "TFLOP/s": rate / 1e12}
        row["of roof"] = rate * statistics.median(seconds[ROOF]) / square[1]
        row |= {f"vs {peer}": ratio(seconds, peer) for peer in runs if peer != "ours"}
        table.append(row)
    return table


def main() -> None:
    """Measure, print tables and a line of JSON."""
    options = arguments(__doc__, 7)
    if not torch.cuda.is_available():
        print("skipped: Triton against torch._grouped_mm, there is no GPU")
        tables = {"Mixture of experts": cpu_rows(options.rounds), "Merged experts": merged_rows(options.rounds)}
    else:
        tables = {"Mixture of experts": gpu_rows(options.rounds)}
    result: dict[str, Any] = {"op": "experts"}
    for title, table in tables.items():
        show(title, table)
        for row in table:
            result |= named(f"{row['shape']} {row['case']} {row['pass']}", row)
    report("", [], result)


if __name__ == "__main__":
    main()
