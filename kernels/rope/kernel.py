"""The Triton kernel: a program turns some positions of one head of one sample; in float32."""

import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # pairs of features of a program


@triton.jit
def rotate_kernel(
    x,
    cos,
    sin,
    out,
    x_position,
    x_sample,
    x_head,
    out_position,
    out_sample,
    out_head,
    angle_position,
    angle_sample,
    angle_head,
    length,
    heads,
    half,
    BACKWARDS: tl.constexpr,
    POSITIONS: tl.constexpr,
    HALF: tl.constexpr,
):
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    feature = tl.arange(0, HALF)[None, :]
    inside = (position < length) & (feature < half)
    angle = position * angle_position + sample * angle_sample + head * angle_head + feature
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    if BACKWARDS:
        s = -s
    source = x + position * x_position + sample * x_sample + head * x_head + feature
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    target = out + position * out_position + sample * out_sample + head * out_head + feature
    tl.store(target, first * c - second * s, mask=inside)
    tl.store(target + half, second * c + first * s, mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, backwards: bool) -> None:
    """As :func:`lightbulb.kernels.rope.native.rotate`; the angles may be of any dtype."""
    length, batch, heads, width = x.shape
    if x.numel():
        positions, half = tile(width // 2)
        rotate_kernel[(triton.cdiv(length, positions), batch * heads)](
            x, cos, sin, out, *x.stride()[:3], *out.stride()[:3], *cos.stride()[:3], length, heads, width // 2,
            BACKWARDS=backwards, POSITIONS=positions, HALF=half,
        )  # fmt: skip


def tile(half: int) -> tuple[int, int]:
    """Positions of a program, and the pairs of each as a power of two."""
    width = triton.next_power_of_2(half)
    return max(1, _TILE // width), width
