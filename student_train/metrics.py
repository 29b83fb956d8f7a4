"""What a run reports: JSON lines, one a record, TensorBoard, and trackers that were asked for.

A record belongs to a step. On a resume everything after the restored step is cut away, so that no
step is ever reported twice. Trackers keep what they got: of a step that is done again they get the
same numbers again.
"""

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from student_train.trackers import Tracker

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
# Far more than come between two looks at the thread that takes them.
_QUEUE = 1000


class Metrics:
    """Writes records of a run under its `out` folder; use as a context manager."""

    def __init__(
        self,
        out: Path,
        restored_step: int,
        *,
        silent: bool = False,
        open_trackers: Callable[[], list[Tracker]] = list,
    ):
        """Continue after `restored_step` (0: start anew). All hosts but one are `silent`."""
        self.path = out / METRICS_FILE
        self._silent = silent
        self._trackers: list[Tracker] = []
        if silent:
            return
        # Where PyTorch is installed it imports that: seconds, which no other verb needs.
        from tensorboardX import SummaryWriter

        out.mkdir(parents=True, exist_ok=True)
        self._trackers = open_trackers()
        self._kept = _truncate(self.path, restored_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(out / TENSORBOARD_FOLDER),
            purge_step=restored_step + 1,
            write_to_disk=True,
            max_queue=_QUEUE,
        )
        self._board_thread = self._board.file_writer.event_writer._worker
        self._hook = threading.excepthook
        threading.excepthook = self._on_thread_error

    def write(self, record: dict[str, Any]) -> None:
        """Append one record with a `step`, unless one that was kept from before gives its names."""
        if self._silent or self._has(record):
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        numbers = {
            name: float(value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        }
        if not self._is_board_written():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path.parent))
        for name, value in numbers.items():
            self._board.add_scalar(name, value, record["step"])
        # The record of a skipped step has none.
        for tracker in self._trackers if numbers else ():
            tracker.write(record["step"], numbers)

    def _is_board_written(self) -> bool:
        """Whether TensorBoard's thread lives; an error ends it, and then its queue only fills."""
        return self._board_thread.is_alive()

    def _on_thread_error(self, error: Any) -> None:
        """That of TensorBoard's thread is told by `write`, in one sentence and no traceback."""
        if error.thread is not self._board_thread:
            self._hook(error)

    def _has(self, record: dict[str, Any]) -> bool:
        return any(
            kept["step"] == record["step"] and kept.keys() >= record.keys() for kept in self._kept
        )

    def close(self) -> None:
        if self._silent:
            return
        threading.excepthook = self._hook
        self._file.close()
        if self._is_board_written():
            self._board.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _truncate(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Keep whole records up to `last_step`; returns them. The file is replaced atomically."""
    kept: list[dict[str, Any]] = []
    if not path.exists():
        return kept
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            # Only the last line can be cut short, by a kill while it was written.
            break
        if record["step"] <= last_step:
            kept.append(record)
    work = path.with_suffix(".tmp")
    work.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(work, path)
    return kept
