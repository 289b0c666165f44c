"""Planted faults: which rank, step and place they strike."""

import pytest

from lightbulb.train.faults import Fault, PlantedFault, fault_point, is_planted


def test_an_entry_strikes_its_rank_step_and_place_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTBULB_FAULT", "nan:rank=1:step=3;raise:point=save")
    monkeypatch.setenv("RANK", "1")
    assert is_planted("nan", "step", 3) == Fault("nan", "step", 1, 3)
    assert is_planted("nan", "step", 2) is None
    assert is_planted("nan", "save", 3) is None
    with pytest.raises(PlantedFault, match="save, step 7"):
        fault_point("save", 7)
    monkeypatch.setenv("RANK", "0")
    assert is_planted("nan", "step", 3) is None
    fault_point("step", 3)


@pytest.mark.parametrize("text", ["explode", "kill:rank", "kill:rang=1", "sleep:seconds=a"])
def test_a_fault_that_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        Fault.parse(text)
