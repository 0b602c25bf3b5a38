"""Curves small enough for a page, which keep what is seen of a run: spikes, gaps, the scale."""

import math

import numpy as np
import pytest

from pretrain.curves import BUCKETS, HEIGHT, LEFT, WIDTH, Mark, Plot, curve, draw, number, ticks, x_axis, y_axis


def test_a_long_curve_keeps_its_spikes_and_its_mean() -> None:
    x = np.arange(1_000_000.0)
    y = 3 + np.exp(-x / 1e5)
    y[123_456] = 50.0
    found = curve("loss", x.tolist(), y.tolist())
    assert len(found.x) == len(found.mean) == len(found.low) == BUCKETS
    assert max(found.high) == 50.0 and max(found.mean) < 4.1 and min(found.low) == y.min()
    assert found.last == y[-1]
    assert np.mean(found.mean) == pytest.approx(y.mean(), rel=1e-4)
    assert len(draw(Plot("loss", "Loss", [found])).lines[0].line) < 10_000


def test_a_short_curve_is_kept_as_it_is() -> None:
    found = curve("loss", [1.0, 2.0, 5.0], [3.0, 2.5, 2.0])
    assert (found.x, found.mean, found.low) == ([1.0, 2.0, 5.0], [3.0, 2.5, 2.0], [3.0, 2.5, 2.0])
    chart = draw(Plot("loss", "Loss", [found]))
    assert len(chart.lines[0].dots) == 3 and chart.lines[0].band == "" and chart.lines[0].last == "2"


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    found = curve("loss", [1.0, 2.0, 3.0, 4.0], [3.0, math.nan, math.inf, 2.0])
    assert (found.x, found.mean, found.not_finite) == ([1.0, 4.0], [3.0, 2.0], 2)
    assert draw(Plot("loss", "Loss", [found])).notes == ["2 values that are not finite are left out"]
    nothing = curve("loss", [1.0], [math.nan])
    assert nothing.last is None
    chart = draw(Plot("loss", "Loss", [nothing]))
    assert (chart.lines[0].line, chart.lines[0].last) == ("", "no finite value")


@pytest.mark.parametrize("values", [[2.0], [0.0, 0.0], [-1.0, 5.0], [1e-9, 2e-9], [5e12, 6e12]], ids=str)
def test_every_point_lies_in_its_chart(values: list[float]) -> None:
    each = curve("x", [float(i + 1) for i in range(len(values))], values)
    chart = draw(Plot("x", "X", [each], marks=[Mark(1.0, "restart", "again")]))
    for x, y, _ in chart.lines[0].dots:
        assert LEFT <= x <= WIDTH and 0 <= y <= HEIGHT
    assert len(chart.y_ticks) >= 2 and len(chart.marks) == 1


def test_the_first_steps_of_a_long_curve_do_not_set_its_height() -> None:
    x = [float(i) for i in range(1000)]
    falling = curve("loss", x, [2 + 9 * math.exp(-i / 20) + i / 1000 for i in range(1000)])
    axis = y_axis([falling])
    assert axis.cut and 3 <= axis.high < 6
    assert draw(Plot("loss", "Loss", [falling])).notes == ["the height of the first steps is cut off"]
    assert not y_axis([curve("lr", x, [min(i, 1000 - i) / 1000 for i in range(1000)])]).cut


def test_a_wide_range_is_drawn_by_powers_of_ten() -> None:
    axis = y_axis([curve("grad", [1.0, 2.0, 3.0], [0.02, 1.0, 900.0])])
    assert axis.logarithmic and (axis.low, axis.high) == (0.01, 1000.0)
    assert axis.at(0.01) == 0.0 and axis.at(1000.0) == pytest.approx(1.0)


def test_axes_have_round_numbers() -> None:
    assert ticks(0.0, 737280.0, 5) == [0, 200_000, 400_000, 600_000, 800_000]
    assert ticks(2.93, 3.41, 5) == [2.9, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5]
    assert x_axis([curve("x", [1.0, 7.0], [1.0, 1.0])]).ticks == [0, 2, 4, 6]
    assert x_axis([]).ticks[0] == 0


def test_numbers_are_short() -> None:
    assert [number(n) for n in (0, 6e-4, 0.0123456, 3.14159, 9999, 12_345, 1_234_567, 3e12, -0.5)] == [
        "0", "6e-4", "0.01235", "3.142", "9999", "12.3k", "1.23M", "3T", "-0.5",
    ]  # fmt: skip


def test_a_share_that_is_0_all_the_time_has_no_axis_below_0() -> None:
    axis = y_axis([curve("accuracy", [1, 2], [0.0, 0.0])], percent=True)
    assert axis.low == 0 < axis.high <= 0.011
