"""The CPU adapter: every entry still has something to replace, and nothing outside Megatron-core changes."""

import importlib
import importlib.util
import inspect
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads

from lightbulb.parallel import megatron_cpu
from lightbulb.parallel.megatron_cpu import CONSTANTS, FUNCTIONS, MODULES, NORM, install, l2_norm, replace_constants

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the adapter does nothing where CUDA exists")


@pytest.mark.parametrize("path", FUNCTIONS)
def test_function_as_shipped_contains_a_constant_to_replace(path: str) -> None:
    module, _, qualified = path.partition(":")
    code = _code_as_shipped(module, qualified)
    found = set(_strings(code)) & CONSTANTS.keys()
    assert found, f"{path} names no CUDA device any more: drop it from FUNCTIONS"
    assert not set(_strings(replace_constants(code))) & CONSTANTS.keys()


@pytest.mark.parametrize("name", MODULES)
def test_module_as_shipped_still_asks_torch_cuda(name: str) -> None:
    assert "torch.cuda." in _source(name), f"{name} no longer mentions torch.cuda: drop it from MODULES"


def test_norm_as_shipped_is_still_looked_up_by_name() -> None:
    assert f"{NORM[1]}," in _source(NORM[0])
    assert "torch.norm(tensor)" in inspect.getsource(utils.local_multi_tensor_l2_norm), "upstream's norm has changed"


@on_cpu
def test_install_twice_changes_nothing_more_and_leaves_torch_alone() -> None:
    before = dict(torch.cuda.__dict__)
    install()
    first = [megatron_cpu.resolve(path).__code__ for path in FUNCTIONS]
    install()
    assert all(megatron_cpu.resolve(path).__code__ is code for path, code in zip(FUNCTIONS, first, strict=True))
    assert torch.cuda.__dict__ == before
    assert importlib.import_module("torch") is torch
    for name in MODULES:
        seen = importlib.import_module(name).torch
        assert seen is not torch and seen.nn is torch.nn
        assert seen.cuda.current_device() == "cpu"


@on_cpu
def test_local_norm_is_on_the_cpu_after_install() -> None:
    install()
    norm, _ = utils.local_multi_tensor_l2_norm(1, None, [[torch.tensor([3.0]), torch.tensor([4.0])]], False)
    assert norm.device.type == "cpu" and norm.tolist() == [5.0]
    assert clip_grads.l2_norm_impl is l2_norm


def test_norm_is_exact_for_millions_of_elements() -> None:
    tensors = [torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)), torch.ones(7, 3), torch.zeros(0)]
    expected = sum(float(t.double().square().sum()) for t in tensors) ** 0.5
    norm, _ = l2_norm(1, torch.zeros(1), [tensors])
    assert norm.shape == (1,) and norm.dtype == torch.float32
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    assert l2_norm(1, torch.zeros(1), [[torch.tensor([float("nan")])]])[0].isnan()


def test_constants_are_replaced_in_nested_code_and_tuples_only_when_whole() -> None:
    def outer() -> tuple[object, ...]:
        def inner() -> str:
            return "cuda"

        return inner(), ("cuda", 1), "cuda:0"

    outer.__code__ = replace_constants(outer.__code__)
    assert outer() == ("cpu", ("cpu", 1), "cuda:0")


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _code_as_shipped(module: str, qualified: str) -> types.CodeType:
    """The function's code compiled from the source: the imported one may be patched already."""
    code = compile(_source(module), module, "exec")
    for name in qualified.split("."):
        (code,) = [c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name]
    return code


def _strings(code: object) -> Iterator[str]:
    if isinstance(code, types.CodeType):
        for constant in code.co_consts:
            yield from _strings(constant)
    elif isinstance(code, tuple):
        for item in code:
            yield from _strings(item)
    elif isinstance(code, str):
        yield code
