"""From measured time and counted work to rates: tokens/s, model FLOP/s, utilisation, input wait."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self, TypeVar

from gemma2 import flops
from schemas.accelerators import accelerator_of
from schemas.model import ModelConfig
from schemas.runs import TrainConfig

Item = TypeVar("Item")


class Work(NamedTuple):
    """What one step computes and on what. Tokens are positions, padding included."""

    tokens: int
    """Of a step, over all devices."""
    flops_per_token: float
    """Model FLOPs of training: causal and windowed pairs of whole rows, and the head."""
    head_flops_per_token: float
    """Of which the vocabulary head's."""
    devices: int
    peak_flops_per_second: float | None
    """Of one device; None of one that is not in the table."""

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        model: ModelConfig,
        sequence_tokens: int,
        devices: Sequence[Any],
    ) -> Self:
        """The work of a run's step on JAX devices of one kind."""
        accelerator = accelerator_of(devices[0].device_kind)
        head = flops.forward_flops_per_token(model, sequence_tokens).head
        return cls(
            tokens=config.batch_sequences * sequence_tokens,
            flops_per_token=flops.training_flops_per_token(model, sequence_tokens),
            head_flops_per_token=flops.TRAINING_TO_FORWARD * head,
            devices=len(devices),
            peak_flops_per_second=None
            if accelerator is None
            else accelerator.peak_flops_per_second,
        )

    def rates(self, steps: int, seconds: float, waited_seconds: float) -> dict[str, float | None]:
        """What a record says of `steps` steps that took `seconds`; TFLOP/s are per device."""
        tokens_per_second = steps * self.tokens / seconds
        per_device = tokens_per_second / self.devices
        model_flops = per_device * self.flops_per_token
        peak = self.peak_flops_per_second
        return {
            "tokens_per_second": round(tokens_per_second, 1),
            "model_tflops_per_second": model_flops / 1e12,
            "head_tflops_per_second": per_device * self.head_flops_per_token / 1e12,
            "mfu": None if peak is None else model_flops / peak,
            "input_wait_share": waited_seconds / seconds,
        }


NO_RATES: dict[str, float | None] = dict.fromkeys(Work(1, 1, 1, 1, 1).rates(1, 1, 1))
"""The same names, before there is anything to tell."""


class Stopwatch:
    """Time of steps since the last reading, without what happened while paused."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0

    def step(self, waited_seconds: float) -> None:
        """A step is done, for whose batch the loop waited. The first one only starts the watch."""
        if self._since is None:
            self.resume()
            return
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        self._steps += 1
        self._waited += waited_seconds

    def resume(self) -> None:
        """What happened since the last step is none of its time."""
        self._since = time.perf_counter()

    def read(self, work: Work) -> dict[str, float | None]:
        """The rates since the last reading."""
        if not self._steps:
            return dict(NO_RATES)
        rates = work.rates(self._steps, self._seconds, min(self._waited, self._seconds))
        self._reset()
        return rates


def timed(items: Iterable[Item]) -> Iterator[tuple[Item, float]]:
    """Each item with the seconds that its consumer waited for it."""
    iterator = iter(items)
    while True:
        start = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item, time.perf_counter() - start
