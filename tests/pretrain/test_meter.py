from __future__ import annotations

import pytest

from pretrain.meter import BySource, Meter, duration, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
        ("cpu", None),
    ],
)
def test_peaks_by_the_names_that_devices_give(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_published_speeds_give_their_published_mfu() -> None:
    """llm.c on H100: 1,558M at 46,811 tokens/s per GPU, 48.7 %; 124M at 463,000 tokens/s, 40.1 %."""
    for flops, rate, mfu in [(6 * 1_555_972_800 + 12 * 48 * 1600 * 1024, 46_811, 0.487), (855_166_464, 463_000, 0.401)]:
        meter = Meter(flops, 989e12)
        meter.step(rate, 1.0)
        assert meter.read(0).mfu == pytest.approx(mfu, abs=1e-3)


def test_a_reading_covers_the_steps_since_the_one_before() -> None:
    meter = Meter(10, 1e6)
    meter.step(1000, 1.0, waited=0.5)
    meter.step(1000, 3.0, waited=0.5)
    first = meter.read(5000)
    assert (first.tokens_per_s, first.mfu, first.data_wait, first.eta_s) == (500.0, 0.005, 0.25, 10.0)
    meter.step(1000, 1.0)
    second = meter.read(4000)
    assert (second.tokens_per_s, second.data_wait) == (1000.0, 0.0)
    assert second.eta_s == pytest.approx(4000 * 5 / 3000)  # all steps remembered


def test_evaluations_count_in_the_time_left_only() -> None:
    meter = Meter(10, None)
    meter.step(1000, 1.0)
    meter.aside(1.0)
    speed = meter.read(1000)
    assert (speed.tokens_per_s, speed.mfu, speed.eta_s) == (1000.0, None, 2.0)


def test_nothing_measured_is_no_error() -> None:
    speed = Meter(10, None).read(1000)
    assert (speed.tokens_per_s, speed.data_wait, speed.eta_s) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.7, "1m 00s"),
        (425, "7m 05s"),
        (3599.6, "1h 00m"),
        (11_240, "3h 07m"),
        (86_400 * 12 + 4 * 3600, "12d 04h"),
    ],
)
def test_durations_as_people_read_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_loss_of_a_corpus_is_the_mean_over_its_targets_of_several_steps() -> None:
    found = BySource(["alpha", "beta", "never"])
    found.add([6.0, 1.0, 0.0], [2, 1, 0])
    found.add([10.0, 0.0, 0.0], [2, 0, 0])
    assert found.take() == {"train_loss/alpha": 4.0, "train_loss/beta": 1.0}
    assert found.take() == {}
