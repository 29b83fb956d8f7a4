"""Checkpoints: every field comes back, damage is seen, and what fails costs no older one."""

import errno
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from student_store import MODEL, make_store, small_config

from schemas.errors import CheckpointError, SaveError
from schemas.model import ModelConfig
from schemas.runs import TrainConfig
from student_train import checkpoint
from student_train.checkpoint import SUMS_FILE, Checkpoints, RunIdentity, check_sums
from student_train.loop import TrainResult, train

ONE = jax.devices()[:1]
RUN = RunIdentity(tokens="t", targets=None, rows=3, model=ModelConfig(**MODEL), settings={"a": 1})
pytestmark = pytest.mark.usefixtures("compile_once", "compile_quickly")


class MoreState(NamedTuple):
    """A state with fields that the trainer's may get one day."""

    params: Any
    opt_state: Any
    step: jax.Array
    average: Any
    skipped: jax.Array
    unused: Any


def make_state(step: int, average: Any = None) -> MoreState:
    values = {"a": jnp.arange(6.0).reshape(2, 3) + step, "b": jnp.full(4, step, jnp.bfloat16)}
    return MoreState(values, (values, jnp.asarray(7)), jnp.asarray(step), average, step < 5, None)


def abstract(state: Any) -> Any:
    where = jax.sharding.SingleDeviceSharding(ONE[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.asarray(x).dtype, sharding=where), state
    )


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's `out` with the checkpoints of steps 4 and 8."""
    monkeypatch.setattr(checkpoint, "State", MoreState)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (2, 4, 8):
            checkpoints.save(make_state(step, {"x": jnp.ones(2)}), RUN)  # type: ignore[arg-type]
        checkpoints.wait()
    return tmp_path


def test_a_run_from_before_a_setting_was_there_had_its_default() -> None:
    now = RUN.model_copy(update={"settings": {"a": 1, "accumulate": 1}})
    now.check(RUN, Path("run"))
    now.settings["accumulate"] = 2
    with pytest.raises(CheckpointError, match=r"settings.accumulate is 1 there and 2 here"):
        now.check(RUN, Path("run"))


def test_a_run_from_when_there_was_one_more_setting_had_it_off() -> None:
    before = RUN.model_copy(update={"settings": {"a": 1, "gone": False}})
    RUN.check(before, Path("run"))
    before.settings["gone"] = True
    with pytest.raises(CheckpointError, match=r"settings.gone is True there and None here"):
        RUN.check(before, Path("run"))


def test_every_field_of_the_state_comes_back(saved: Path) -> None:
    with Checkpoints(saved, keep=2) as checkpoints:
        assert checkpoints.steps() == [4, 8]
        assert checkpoints.identity(8) == RUN
        for step in (4, 8):
            state = make_state(step, {"x": jnp.ones(2)})
            found = checkpoints.restore(step, abstract(state))
            assert jax.tree.structure(found) == jax.tree.structure(state)
            for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
                assert left.dtype == jnp.asarray(right).dtype
                np.testing.assert_array_equal(left, right)
        found = checkpoints.restore_params(8, abstract(make_state(8).params), averaged=False)
        np.testing.assert_array_equal(found["a"], make_state(8).params["a"])


def test_a_field_that_was_not_saved_is_named(saved: Path) -> None:
    state = make_state(8, {"x": jnp.ones(2)})._replace(unused={"y": jnp.ones(3)})
    with (
        Checkpoints(saved, keep=2) as checkpoints,
        pytest.raises(CheckpointError, match=r"checkpoints/8 does not .*unused"),
    ):
        checkpoints.restore(8, abstract(state))


def test_damage_to_any_file_is_seen(saved: Path) -> None:
    folder = saved / "checkpoints" / "8"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert check_sums(folder) is None
    for path in files:
        raw = path.read_bytes()
        name = str(path.relative_to(folder))
        for bad in (raw[:-1], bytes([raw[0] ^ 1]) + raw[1:], raw[:-1] + bytes([raw[-1] ^ 128])):
            path.write_bytes(bad)
            fault = check_sums(folder)
            assert fault is not None
            assert name in fault or name == SUMS_FILE
        path.unlink()
        assert name in str(check_sums(folder))
        path.write_bytes(raw)
    assert check_sums(folder) is None
    # The list may have been cut between two lines.
    sums = folder / SUMS_FILE
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(lines[:-1]))
    assert f"is not in {SUMS_FILE}" in str(check_sums(folder))
    # Processes share the work: one of them sees it.
    assert sum(check_sums(folder, part, 4) is not None for part in range(4)) == 1


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="a tool of GNU coreutils")
def test_sha256sum_can_check_a_checkpoint(saved: Path) -> None:
    folder = saved / "checkpoints" / "8"
    command = ["sha256sum", "--check", "--strict", "--quiet", SUMS_FILE]
    assert subprocess.run(command, cwd=folder, check=False).returncode == 0


def test_what_cannot_be_saved_costs_nothing_that_was(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with Checkpoints(saved, keep=1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_sums", full)
            checkpoints.save(make_state(9), RUN)  # type: ignore[arg-type]
            message = r"of step 9 .* \(.*No space left.*\); make room .* newest one is of step 8"
            with pytest.raises(SaveError, match=message):
                checkpoints.wait()
        folder = saved / "checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == ["4", "8"]
        checkpoints.save(make_state(9), RUN)  # type: ignore[arg-type]
        checkpoints.wait()
        assert [path.name for path in folder.iterdir()] == ["9"]
        assert check_sums(folder / "9") is None


def test_a_damaged_checkpoint_is_set_aside_and_its_step_saved_again(saved: Path) -> None:
    with Checkpoints(saved, keep=2) as checkpoints:
        for name in ("damaged-8", "damaged-8.1"):
            assert checkpoints.set_aside(8).name == name
            assert checkpoints.steps() == [4]
            checkpoints.save(make_state(8), RUN)  # type: ignore[arg-type]
            checkpoints.wait()
            assert checkpoints.fault(8) is None
        assert (saved / "checkpoints" / "damaged-8" / SUMS_FILE).exists()


def test_what_a_kill_left_half_done_is_swept(saved: Path) -> None:
    folder = saved / "checkpoints"
    for name in ("saving-12.orbax-checkpoint-tmp", "saving-12", "removing-2"):
        (folder / name / "params").mkdir(parents=True)
    with Checkpoints(saved, keep=2) as checkpoints:
        assert checkpoints.steps() == [4, 8]
        checkpoints.sweep()
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, TrainResult]:
    folder = tmp_path_factory.mktemp("whole")
    make_store(folder / "store", rows=24)
    config = small_config(folder, folder / "out", steps=6, checkpoint_every=2, keep_checkpoints=3)
    return config, train(config, devices=ONE)


def losses(result: TrainResult) -> list[str]:
    return [line.split(', "tokens_per')[0] for line in result.metrics.read_text().splitlines()]


def test_a_run_continues_from_the_newest_whole_checkpoint(
    whole: tuple[TrainConfig, TrainResult], tmp_path: Path
) -> None:
    config, expected = whole
    out = tmp_path / "out"
    shutil.copytree(config.out, out)
    (out / "result.json").unlink()
    for step, name in ((4, "params/_METADATA"), (6, "run/metadata")):
        path = out / "checkpoints" / str(step) / name
        path.write_bytes(path.read_bytes()[:-1])
    said: list[str] = []
    result = train(config.model_copy(update={"out": out}), say=said.append, devices=ONE)
    assert result.resumed_from == 2
    assert [line.split(" and was moved")[0] for line in said] == [
        "The checkpoint of step 6 is damaged (run/metadata is not what was written)",
        "The checkpoint of step 4 is damaged (params/_METADATA is not what was written)",
    ]
    assert losses(result) == losses(expected)
    weights = "model.safetensors"
    assert (result.export / weights).read_bytes() == (expected.export / weights).read_bytes()
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["2", "4", "6", "damaged-4", "damaged-6"]


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_save_that_fails_ends_the_run_only_if_that_is_wished(
    whole: tuple[TrainConfig, TrainResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
) -> None:
    config, expected = whole
    write = checkpoint.write_sums

    def fails_once(folder: Path) -> None:
        if folder.name == "saving-2":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder)

    monkeypatch.setattr(checkpoint, "write_sums", fails_once)
    said: list[str] = []
    config = config.model_copy(update={"out": tmp_path / "out", "on_failed_save": policy})
    if policy == "stop":
        with pytest.raises(SaveError, match=r"of step 2 .*No space left"):
            train(config, say=said.append, devices=ONE)
        assert said == []
        return
    result = train(config, say=said.append, devices=ONE)
    assert len(said) == 1
    assert "that of step 2" in said[0]
    assert said[0].endswith("Training goes on.")
    assert losses(result) == losses(expected)
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == ["4", "6"]


def test_what_is_reserved_has_the_states_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an array over eight devices, eight parts, in page-locked memory."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, P(None, "x"))
    state = jax.ShapeDtypeStruct((3, 16), jnp.bfloat16, sharding=where)
    made = []
    make = jax.make_array_from_callback
    monkeypatch.setattr(
        checkpoint.jax,
        "make_array_from_callback",
        lambda *arguments: made.append(make(*arguments)) or made[-1],
    )
    checkpoint._reserve(state)
    (found,) = made
    assert found.sharding.memory_kind == "pinned_host"
    assert (found.shape, found.dtype) == ((3, 16), jnp.bfloat16)
    assert {part.data.shape for part in found.addressable_shards} == {(3, 2)}
