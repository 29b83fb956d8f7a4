"""Rates from counted work and measured time; peaks only of what is in the table."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma2 import flops, presets
from schemas.accelerators import ACCELERATORS, accelerator_of
from schemas.runs import TrainConfig
from student_train import throughput
from student_train.throughput import NO_RATES, Stopwatch, Work, timed

CONFIG = TrainConfig(store="s", out=Path("o"), batch_sequences=4)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_devices_are_known_by_what_jax_calls_them(kind: str, name: str) -> None:
    assert accelerator_of(kind) is ACCELERATORS[name]


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "TPU v3"])
def test_of_other_devices_no_peak_is_claimed(kind: str) -> None:
    assert accelerator_of(kind) is None
    work = Work.of(CONFIG, presets.resolve("tiny"), 64, [SimpleNamespace(device_kind=kind)])
    rates = work.rates(1, 1.0, 0.0)
    assert rates["mfu"] is None
    assert rates["model_tflops_per_second"] is not None


def test_utilisation_is_the_counted_work_over_the_peak() -> None:
    model = presets.resolve("gemma2-2.6b")
    devices = [SimpleNamespace(device_kind="NVIDIA H200")] * 2
    work = Work.of(CONFIG, model, 8192, devices)
    rates = work.rates(steps=10, seconds=20.0, waited_seconds=5.0)
    # 4 rows of 8192 tokens, 10 times in 20 s, on two devices.
    assert rates["tokens_per_second"] == 16384.0
    per_device = 8192 * flops.training_flops_per_token(model, 8192)
    assert rates["model_tflops_per_second"] == pytest.approx(per_device / 1e12)
    assert rates["mfu"] == pytest.approx(per_device / 989.5e12)
    # The head's three products alone: 6 FLOPs for each number of its table.
    assert rates["head_tflops_per_second"] == pytest.approx(8192 * 6 * 590_118_912 / 1e12)
    assert rates["input_wait_share"] == 0.25


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)


def test_only_steps_take_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watch, work = Clock(monkeypatch), Stopwatch(), Work(100, 2e12, 1e12, 1, None)
    assert watch.read(work) == NO_RATES
    clock.now = 50.0  # compilation and the first step
    watch.step(3.0)
    assert watch.read(work) == NO_RATES
    for now, waited in ((52.0, 0.5), (54.0, 0.5)):
        clock.now = now
        watch.step(waited)
    clock.now = 1000.0  # an evaluation
    watch.resume()
    clock.now = 1004.0
    watch.step(1.0)
    found = watch.read(work)
    assert found["tokens_per_second"] == 37.5
    assert found["input_wait_share"] == 0.25
    assert found["model_tflops_per_second"] == pytest.approx(75.0)
    clock.now = 1005.0
    watch.step(0.0)
    assert watch.read(work)["tokens_per_second"] == 100.0


def test_waiting_is_what_the_consumer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def slow() -> "list[int]":
        for number in range(3):
            clock.now += number
            yield number  # type: ignore[misc]

    found = []
    for item, waited in timed(slow()):
        found.append((item, waited))
        clock.now += 100
    assert found == [(0, 0.0), (1, 1.0), (2, 2.0)]
