"""Warmup-stable-decay as a function of the step."""

import pytest

from lightbulb.config import ConfigError, build_config
from lightbulb.train.schedule import ScheduleConfig, learning_rate_factor


def factors(steps=100, **values):
    config = build_config(ScheduleConfig, values)
    return [learning_rate_factor(config, step, steps) for step in range(steps)]


def test_warmup_rises_to_the_peak_and_stays_until_the_decay():
    curve = factors(warmup=0.1, decay=0.2)
    assert curve[0] == pytest.approx(0.1)
    assert curve[9:80] == [1.0] * 71
    assert curve[80] < 1.0
    assert curve == sorted(curve[:10]) + curve[10:80] + sorted(curve[80:], reverse=True)


@pytest.mark.parametrize(("shape", "final"), [("linear", 0.0), ("one_minus_sqrt", 0.1), ("exponential", 0.01)])
def test_decay_ends_at_the_final_fraction(shape, final):
    curve = factors(decay=0.5, shape=shape, final=final)
    assert curve[-1] == pytest.approx(final)


def test_shapes_differ_in_the_middle_as_their_formulas_say():
    middle = {s: factors(decay=0.5, shape=s, final=0.01)[74] for s in ("linear", "one_minus_sqrt", "exponential")}
    assert middle["linear"] == pytest.approx(0.01 + 0.99 * 0.5)
    assert middle["one_minus_sqrt"] == pytest.approx(0.01 + 0.99 * (1 - 0.5**0.5))
    assert middle["exponential"] == pytest.approx(0.1)


def test_no_warmup_and_no_decay_is_constant():
    assert set(factors(warmup=0, decay=0)) == {1.0}


def test_phases_longer_than_the_run_are_refused():
    with pytest.raises(ConfigError, match=r"warmup 0\.5 \+ decay 0\.6"):
        factors(warmup=0.5, decay=0.6)
    with pytest.raises(ConfigError, match="exponential never reaches"):
        factors(shape="exponential")


def test_cosine_falls_from_the_end_of_the_warmup_unless_a_decay_is_given():
    curve = factors(warmup=0.1, shape="cosine", final=0.1)
    assert curve[9] == 1.0 and curve[10] < 1.0
    assert curve[54] == pytest.approx(0.1 + 0.9 * 0.5) and curve[-1] == pytest.approx(0.1)
    late = factors(warmup=0.1, decay=0.2, shape="cosine")
    assert late[10:80] == [1.0] * 70 and late[89] == pytest.approx(0.5) and late[-1] == pytest.approx(0.0)
    for warmup in (0.0, 0.015, 0.1, 1 / 3, 0.7):
        build_config(ScheduleConfig, {"warmup": warmup, "shape": "cosine"})  # the phases just fit
