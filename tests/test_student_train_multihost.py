"""Several processes train as one: the same numbers, their own rows, one end."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from student_processes import finish, records, start, start_several
from student_store import make_store, small_config

from schemas.errors import ConfigError
from student_train import hosts, step
from student_train import mesh as meshes
from student_train.checkpoint import Checkpoints
from student_train.data import StoreSource, row_order
from student_train.loop import TrainResult, train

STEPS, BATCH, DEVICES = 6, 8, 8
COUNTS = (1, 2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `out-1`, `out-2` and `out-4`: one run by that many processes, eight devices in all."""
    folder = tmp_path_factory.mktemp("processes")
    make_store(folder / "store", rows=24)
    make_store(folder / "held-out", rows=9, seed=2, targets=False)
    for count in COUNTS:
        config = folder / f"{count}.json"
        run = small_config(folder, folder / f"out-{count}", steps=STEPS, checkpoint_every=4)
        config.write_text(run.model_dump_json())
        if count == 1:
            finish([start(config, devices=DEVICES)])
        else:
            finish(start_several(config, count, devices=DEVICES // count))
    return folder


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in records(out) if "loss" in record]


@pytest.mark.parametrize("count", COUNTS[1:])
def test_several_processes_compute_what_one_does(folder: Path, count: int) -> None:
    found, expected = losses(folder / f"out-{count}"), losses(folder / "out-1")
    assert len(found) == STEPS
    print([a - b for a, b in zip(found, expected)])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("count", COUNTS)
def test_each_process_reads_only_its_own_rows(folder: Path, count: int) -> None:
    order = row_order(StoreSource(str(folder / "store"), "default"), 0)
    reads = [
        json.loads((folder / f"out-{count}" / f"rows-{index}.json").read_text())
        for index in range(count)
    ]
    for index, found in enumerate(reads):
        # The first read is the check of the alignment, of every process.
        batches = sorted(tuple(rows) for rows in found[1:])
        share = BATCH // count
        expected = sorted(
            tuple(order.rows(number, BATCH)[index * share : (index + 1) * share].tolist())
            for number in range(STEPS)
        )
        assert batches == expected
