"""Where the kernels run: compiled on a GPU, or in Triton's interpreter."""

from collections.abc import Callable, Iterator

import compiling
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_compiler() -> Iterator[None]:
    yield
    compiling.end()


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device of Triton's kernels; the C++ kernels stay on the CPU."""
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    """Set the threads of the C++ kernels for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
