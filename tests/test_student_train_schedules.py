"""Schedules' corners, and golden values of each shape."""

import itertools
from typing import Any

import numpy as np
import pytest

from schemas.errors import ConfigError
from schemas.runs import OptimizerConfig, RateSchedule, Schedule, TrainConfig
from student_train.schedules import alpha, factor, learning_rate

CONFIG = OptimizerConfig(
    learning_rate=2.0, schedule=RateSchedule(warmup_steps=4, final_fraction=0.1)
)


def factors(schedule: Schedule, steps: int) -> list[float]:
    return [float(factor(schedule, steps, step)) for step in range(steps)]


def test_the_rate_warms_up_to_its_peak_and_falls_to_its_floor() -> None:
    rates = [float(learning_rate(CONFIG, 25, step)) for step in range(25)]
    np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[14], 1.1, rtol=1e-6)
    np.testing.assert_allclose(rates[24], 0.2, rtol=1e-6)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 10), (9, 10), (10, 10), (50, 10)])
def test_every_rate_of_a_short_run_is_positive_and_at_most_the_peak(
    warmup: int, steps: int
) -> None:
    schedule = CONFIG.schedule.model_copy(update={"warmup_steps": warmup})
    config = CONFIG.model_copy(update={"schedule": schedule})
    rates = [float(learning_rate(config, steps, step)) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)


@pytest.mark.parametrize(
    ("fields", "golden"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"decay_steps": None}, [1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9, 0]),
        (
            {"warmup_steps": 2, "decay_steps": 4, "initial_fraction": 0.5},
            [0.75, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0],
        ),
        (
            {"decay_steps": 4, "decay": "sqrt", "final_fraction": 0.5},
            [1, 1, 1, 1, 1, 1, 0.75, 1 - 0.125**0.5, 1 - 0.1875**0.5, 0.5],
        ),
        (
            {"warmup_steps": 1, "decay_steps": 3, "decay": "cosine"},
            [1, 1, 1, 1, 1, 1, 1, 0.75, 0.25, 0],
        ),
        ({"warmup_steps": 10}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
    ],
    ids=["constant", "linear", "wsd", "wsd sqrt", "wsd cosine", "linear up"],
)
def test_golden_factors(fields: dict[str, Any], golden: list[float]) -> None:
    np.testing.assert_allclose(factors(Schedule(**fields), 10), golden, atol=1e-6)


def config(**fields: Any) -> TrainConfig:
    return TrainConfig.parse({"store": "s", "out": "o", "steps": 10} | fields, "here")


def test_alpha_has_its_own_peak_and_is_zero_without_targets() -> None:
    wsd = {"warmup_steps": 2, "decay_steps": 2}
    found = [float(alpha(config(alpha=0.8, alpha_schedule=wsd), step)) for step in range(10)]
    np.testing.assert_allclose(found, [0.4, *[0.8] * 7, 0.4, 0], atol=1e-6)
    assert float(alpha(config(targets=None), 3)) == 0


@pytest.mark.parametrize("name", ["alpha_schedule", "optimizer.schedule"])
def test_a_schedule_that_does_not_fit_is_refused(name: str) -> None:
    fields: dict[str, Any] = {"warmup_steps": 6, "decay_steps": 5}
    for part in reversed(name.split(".")):
        fields = {part: fields}
    with pytest.raises(ConfigError, match=rf"{name}\.decay_steps must fit into steps, .* 11 of 10"):
        config(**fields)
