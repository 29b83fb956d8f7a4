"""Several processes train as one: the same numbers, their own rows, one end."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from student_processes import finish, records, start, start_several
from student_store import make_store, small_config

from gemma2 import checkpoint as gemma2_checkpoint
from gemma2 import presets
from schemas.errors import ConfigError
from schemas.runs import TrainConfig
from student_train import hosts
from student_train import mesh as meshes
from student_train.checkpoint import Checkpoints
from student_train.data import StoreSource, row_order
from student_train.step import abstract_state

STEPS, BATCH, DEVICES, ROWS = 6, 8, 8, 40
# RETORT_PROCESSES=4 for more, which take their time.
COUNTS = (1, int(os.environ.get("RETORT_PROCESSES", "2")))
MOST = COUNTS[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an `out-N` for each of COUNTS: one run by that many processes, eight devices in all.

    All at once, as most of the time each waits for its compiler.
    """
    folder = tmp_path_factory.mktemp("processes")
    make_store(folder / "store", rows=ROWS, shard_sequences=2)
    make_store(folder / "held-out", rows=9, seed=2, targets=False)
    started = []
    for count in COUNTS:
        config = write_config(folder, f"out-{count}")
        if count == 1:
            started.append(start(config, devices=DEVICES))
        else:
            started += start_several([config] * count, devices=DEVICES // count)
    finish(started, seconds=900)
    return folder


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    config = folder / f"{name}.json"
    fields = {"steps": STEPS, "checkpoint_every": 4} | changes
    run = small_config(folder, folder / name, **fields)
    config.write_text(run.model_dump_json())
    return config


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in records(out) if "loss" in record]


@pytest.mark.parametrize("count", COUNTS[1:])
def test_several_processes_compute_what_one_does(folder: Path, count: int) -> None:
    """To float32's accuracy: sums over processes are added in another order than over devices."""
    runs = [records(folder / f"out-{number}") for number in (count, 1)]
    for name, steps in (("loss", STEPS), ("grad_norm", STEPS), ("eval_nats_per_token", 1)):
        found, expected = ([r[name] for r in run if name in r] for run in runs)
        assert len(found) == len(expected) == steps
        np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert losses(folder / "out-1")[0] - losses(folder / "out-1")[-1] > 0.1


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


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_what_processes_saved_is_restored_on_any_devices(folder: Path, devices: int) -> None:
    config = TrainConfig.model_validate_json((folder / f"out-{MOST}.json").read_text())
    model = presets.resolve(config.model)
    mesh = meshes.make_mesh(config.mesh, jax.devices()[:devices])
    with Checkpoints(config.out, None) as checkpoints:
        assert checkpoints.steps() == [4, STEPS]
        assert checkpoints.fault(STEPS) is None
        state = checkpoints.restore(STEPS, abstract_state(model, config, mesh))
    assert int(state.step) == STEPS
    _, exported = gemma2_checkpoint.load(config.out / "export", dtype=np.float32)
    found = jax.tree_util.tree_leaves_with_path(state.params)
    for (path, array), expected in zip(found, jax.tree.leaves(exported), strict=True):
        assert len(array.sharding.device_set) == devices
        np.testing.assert_array_equal(np.asarray(array), expected, jax.tree_util.keystr(path))
    moments = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.opt_state)])
    assert np.isfinite(moments).all()
    assert np.count_nonzero(moments) > moments.size / 2


def test_processes_stop_at_one_step_for_a_shard_that_one_cannot_read(
    folder: Path, tmp_path: Path
) -> None:
    """With the programs of `folder`, if two processes compiled them there."""
    shape: Any = {"devices": DEVICES // 2, "compiled": folder / "compiled"}
    store = make_store(tmp_path / "store", rows=ROWS, shard_sequences=2)
    config = write_config(tmp_path, "out", checkpoint_every=100)
    order = row_order(StoreSource(str(store), "default"), 0)
    checked = {int(row) // 2 for step in range(2) for row in order.rows(step, BATCH)}
    step, shard, place = next(
        (step, int(row) // 2, place)
        for step in range(2, STEPS)
        for place, row in enumerate(order.rows(step, BATCH))
        if int(row) // 2 not in checked
    )
    (lost,) = (store / "targets/default/entry_bucket/c").glob(f"{shard}/*")
    kept = lost.read_bytes()
    lost.unlink()
    said = finish(start_several([config] * 2, **shape), status=2)
    reader = place * 2 // BATCH
    assert f"entry_bucket in shards [{shard}]" in said[reader][1]
    assert f"Process {reader}: Stored bytes" in said[1 - reader][1]
    for _, errors in said:
        assert f"saved at step {step}" in errors
    assert [record["step"] for record in records(tmp_path / "out")] == list(range(1, step + 1))
    lost.write_bytes(kept)
    for output, _ in finish(start_several([config] * 2, **shape)):
        assert f"resumed_from={step}" in output


def test_a_signal_to_one_process_stops_all_with_the_state_saved(
    folder: Path, tmp_path: Path
) -> None:
    """With the programs of the test before, which know their last step."""
    make_store(tmp_path / "store", rows=ROWS)
    config = write_config(tmp_path, "out", checkpoint_every=1000)
    processes = start_several(
        [config] * 2, devices=DEVICES // 2, delay_seconds=2, compiled=folder / "compiled"
    )
    deadline = time.monotonic() + 200
    while len(records(tmp_path / "out")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, status=0, seconds=60)
    steps = [record["step"] for record in records(tmp_path / "out")]
    assert 2 <= len(steps) < STEPS
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == [str(steps[-1])]


def test_what_ends_one_process_ends_all(tmp_path: Path) -> None:
    make_store(tmp_path / "store", rows=ROWS)
    good = write_config(tmp_path, "out")
    bad = tmp_path / "bad.json"
    bad.write_text(good.read_text().replace("model.json", "nothing.json"))
    said = finish(start_several([good, bad], devices=2), status=2, seconds=120)
    assert "nothing.json" in said[1][1]
    assert "process 1 failed" in said[0][1]
    assert "nothing.json" in said[0][1]


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "store", rows=ROWS)
    configs = [write_config(tmp_path, name) for name in ("here", "elsewhere")]
    said = finish(start_several(configs, devices=2), status=2, seconds=120)
    for _, errors in said:
        assert "a folder that all processes of a run share" in errors
        assert "elsewhere of process 1 is not that of process 0" in errors
    assert list((tmp_path / "here").iterdir()) == []


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "a,b",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
ONE = {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        (ONE, False),
        (ONE | dict.fromkeys(hosts.EXPLICIT, "1"), True),
        (ONE | {"JAX_COORDINATOR_ADDRESS": "a:1"}, False),
        (ONE | SLURM | {"SLURM_NTASKS": "2"}, True),
        (ONE | SLURM | {"SLURM_NTASKS": "1"}, False),
        (ONE | {"SLURM_NTASKS": "2"}, False),
        (ONE | {"KUBERNETES_SERVICE_HOST": "a"}, False),
        (ONE | {"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_the_environment_says_whether_there_are_several(
    environment: dict[str, str], several: bool
) -> None:
    assert hosts.wants_several(environment) is several


def test_half_a_description_of_the_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"but JAX_PROCESS_ID is not set; set all three"):
        hosts.wants_several({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"})
