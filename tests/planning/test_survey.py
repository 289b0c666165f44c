"""What the machine has: packages required and optional, wrong and broken ones, programs, number formats."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lightbulb.planning.survey import (
    PROGRAMS,
    Finding,
    Part,
    collectives,
    cpu_bf16,
    examine,
    machine_facts,
    memory_per_rank,
    programs,
    requirements,
)


def test_missing_required_packages_are_told_from_optional_ones() -> None:
    gone = Part("no-such-package", "no_such_package", "something slower")
    missing = Finding("no-such-package", "missing", "something slower", False)
    assert examine(gone, False, {}) == missing
    assert examine(gone, False, {"no-such-package": Requirement("no-such-package")}) == missing._replace(
        is_problem=True
    )


def test_wrong_versions_and_packages_that_do_not_load_are_found() -> None:
    old = examine(Part("rich", "rich", ""), False, {"rich": Requirement("rich>=999")})
    assert old.remark == "needs >=999; pip install 'rich>=999'" and old.is_problem
    broken = examine(Part("rich", "rich.no_such_module", "no colours"), True, {"rich": Requirement("rich")})
    assert broken.remark == "does not load (No module named 'rich.no_such_module'), so: no colours"
    assert broken.is_problem


def test_it_knows_what_is_required() -> None:
    assert {"torch", "deepspeed", "megatron-core", "mosaicml-streaming"} <= set(requirements())
    assert "flash-attn" not in requirements()


@pytest.mark.parametrize(
    ("flags", "words"),
    [("fpu amx_tile amx_bf16", "by AMX"), ("fpu avx512_bf16", "by AVX-512"), ("fpu avx2", "without")],
)
def test_the_bf16_instructions_are_read(tmp_path: Path, flags: str, words: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: x\nflags\t\t: {flags}\n")
    assert cpu_bf16(tmp_path / "cpuinfo").startswith(words)
    assert cpu_bf16(tmp_path / "none").startswith("without")


def test_a_missing_program_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/no/such/folder")
    found = list(programs())
    assert [item.found for item in found] == ["missing"] * len(PROGRAMS)
    assert all(item.remark and not item.is_problem for item in found)


def test_the_machine_is_described() -> None:
    facts = dict(machine_facts())
    assert {"Python, torch", "collectives", "CPU", "memory", "disk here"} <= facts.keys()
    assert "gloo" in collectives()
    assert 0 < memory_per_rank(2) <= memory_per_rank(1)
