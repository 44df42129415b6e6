"""What is worth loading, from what was measured."""

from __future__ import annotations

import pytest

from ghostcacher.gate import Leg, Line, worth_tokens


def line(*points, times=1):
    made = Line()
    for amount, seconds in points * times:
        made.add(amount, seconds)
    return made


def test_a_line_is_what_was_observed():
    assert Line().seconds(5) is None
    assert line((100, 2.0)).seconds(50) == pytest.approx(1.0)
    assert line((0, 0.5), (1, 0.5)).seconds(8) == pytest.approx(0.5)
    known = line((10, 1.1), (20, 1.2), (40, 1.4))
    assert [known.seconds(amount) for amount in (0, 10, 100)] == pytest.approx([1.0, 1.1, 2.0])


def test_neither_part_of_a_line_is_ever_negative():
    falling = line((10, 3.0), (20, 2.0), (30, 1.0))
    assert falling.seconds(200) == falling.seconds(0) > 0
    steep = line((10, 0.0), (20, 1.0))
    assert steep.seconds(0) == 0.0
    assert steep.seconds(5) >= 0.0


def test_a_line_says_nothing_of_amounts_far_beyond_what_it_saw():
    made = line((1, 0.03), (10, 0.04))
    assert made.seconds(80) is not None
    assert made.seconds(81) is None
    assert line((1, 0.03)).seconds(10_000) is None


def test_a_pause_between_two_steps_is_no_prefill():
    made = line((100, 1.0))
    made.add_usual(100, 60.0)
    assert made.seconds(100) == pytest.approx(1.0)
    made.add_usual(100, 2.0)
    assert made.seconds(100) > 1.2


def test_old_observations_fade():
    faster = line((100, 10.0), times=20)
    for _ in range(40):
        faster.add(100, 1.0)
    assert faster.seconds(100) == pytest.approx(1.0, rel=0.2)


PREFILL = line((100, 1.0), (200, 2.0))


@pytest.mark.parametrize(
    ("seconds", "worth"),
    [
        ((0.1, 0.1), 150),
        ((0.1, 9.0), 100),  # the near tier alone
        ((9.0, 0.1), 0),
        ((None, None), 150),  # never measured: used
        ((0.1, None), 150),
        ((9.0, None), 0),
    ],
)
def test_as_much_is_loaded_as_pays(seconds, worth):
    legs = [Leg("disk", 100, 1000, seconds[0]), Leg("remote", 150, 500, seconds[1])]
    assert worth_tokens(legs, 200, PREFILL) == worth


def test_a_slow_first_leg_may_pay_for_what_comes_after_it():
    legs = [Leg("remote", 100, 1000, 1.2), Leg("disk", 190, 500, 0.05)]
    assert worth_tokens(legs, 200, PREFILL) == 190


def test_a_little_slower_is_loaded_all_the_same():
    assert worth_tokens([Leg("disk", 100, 1, 1.0 + 0.04)], 200, PREFILL) == 100
    assert worth_tokens([Leg("disk", 100, 1, 1.0 + 0.06)], 200, PREFILL) == 0


def test_what_is_computed_in_no_time_is_not_loaded_for_twice_as_long():
    """A GPU's 20 ms: the grace is a quarter of them."""
    prefill = line((100, 0.01), (200, 0.02))
    assert worth_tokens([Leg("disk", 100, 1, 0.01 + 0.004)], 200, prefill) == 100
    assert worth_tokens([Leg("disk", 100, 1, 0.01 + 0.006)], 200, prefill) == 0


def test_what_was_measured_long_ago_is_not_known():
    class Clock:
        now = 0.0

    made = Line(lambda: Clock.now)
    made.add(10, 1.0)
    assert made.seconds(10, 60.0) == pytest.approx(1.0)
    Clock.now = 60.0
    assert made.seconds(10, 60.0) is None
    assert made.seconds(10) == pytest.approx(1.0)


def test_nothing_known_means_load():
    assert worth_tokens([Leg("remote", 100, 1, 99.0)], 200, Line()) == 100
    assert worth_tokens([], 200, PREFILL) == 0
