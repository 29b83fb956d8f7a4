"""Progress for a person: live bars on a terminal, sparse plain lines in a log.

Nothing here knows what is being counted. Bars show the rate and the time left.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

Advance = Callable[[int, str], None]
"""Called with the count done so far and a short note (may be empty)."""

_LOG_SECONDS = 20.0
_POLL_SECONDS = 0.5


def _rate(task: Task) -> float:
    """Units per second since the bar started: a shard may take minutes, so no shorter time will do.

    What was done before it started does not count.
    """
    return (task.completed - task.fields["first"]) / max(task.elapsed or 0.0, 1e-9)


class _RateColumn(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        rate = _rate(task)
        if rate <= 0:
            return Text("-/s")
        return Text(f"{rate:,.1f}/s" if rate < 100 else f"{rate:,.0f}/s")


class _LeftColumn(ProgressColumn):
    """Time left at that rate."""

    def render(self, task: Task) -> Text:
        rate = _rate(task)
        if task.total is None or rate <= 0:
            return Text("-:--:--")
        return Text(str(timedelta(seconds=round((task.total - task.completed) / rate))))


class _Progress(Progress):
    """With a task's note on a line of its own, so that both fit a terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", no_wrap=True, overflow="ellipsis")


@contextmanager
def bar(
    console: Console, label: str, total: int | None, unit: str, done: int = 0
) -> Iterator[Advance]:
    """A bar (terminal) or a line every 20 seconds (log); yields the function that advances it."""
    if console.is_terminal:
        with _Progress(
            TextColumn("{task.description}"),
            # On a narrow terminal it gives way, and no number is cut.
            BarColumn(bar_width=24, table_column=Column(no_wrap=False)),
            MofNCompleteColumn(),
            TextColumn(unit),
            _RateColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            _LeftColumn(),
            console=console,
        ) as progress:
            task = progress.add_task(label, total=total, completed=done, note="", first=done)
            yield lambda count, note: progress.update(task, completed=count, note=note)
        return
    start = last = time.monotonic()
    latest = done

    def advance(count: int, note: str) -> None:
        nonlocal last, latest
        latest = count
        now = time.monotonic()
        if now - last >= _LOG_SECONDS:
            last = now
            console.print(_line(label, count, total, unit, (count - done) / (now - start), note))

    yield advance
    seconds = max(time.monotonic() - start, 1e-9)
    console.print(
        f"{label}: {latest:,} {unit} in {seconds:,.1f} s", highlight=False, soft_wrap=True
    )


def _line(label: str, count: int, total: int | None, unit: str, rate: float, note: str) -> str:
    text = f"{label}: {count:,}"
    if total is not None:
        text += f"/{total:,}"
    text += f" {unit}, {rate:,.1f}/s"
    if total is not None and rate > 0:
        text += f", {(total - count) / rate:,.0f} s left"
    return f"{text}, {note}" if note else text


@contextmanager
def watch(
    console: Console,
    label: str,
    total: int,
    unit: str,
    count: Callable[[], int],
    note: Callable[[], str] = lambda: "",
) -> Iterator[None]:
    """A bar fed by polling `count` from a thread: works on every runner, as it asks the store.

    `note` is asked after each count for what else there is to say.
    """
    finished = threading.Event()
    failures: list[BaseException] = []
    with bar(console, label, total, unit, count()) as advance:

        def poll() -> None:
            try:
                while not finished.wait(_POLL_SECONDS):
                    advance(count(), note())
            except BaseException as error:  # noqa: BLE001 - raised again below, in the caller
                failures.append(error)

        thread = threading.Thread(target=poll, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()
        # Once more when nobody else counts: what counts is not made for two at once.
        advance(count(), note())
    if failures:
        raise failures[0]
