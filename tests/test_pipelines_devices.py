"""GPUs of a machine shared out among processes, by their names alone: none is there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import devices

CLAIM = """
import os, sys
from pathlib import Path
from pipelines import devices
from schemas.errors import ConfigError
try:
    found = devices.claim(int(sys.argv[2]), Path(sys.argv[1]), wait_seconds=float(sys.argv[3]))
except ConfigError as error:
    print(error, flush=True)
    sys.exit(2)
print(",".join(found), os.environ["CUDA_VISIBLE_DEVICES"], devices.claim(1) == [], flush=True)
sys.stdin.read()
"""


def start(folder: Path, count: int = 1, wait: float = 0.0, names: str = "7,GPU-3/x,5"):
    return subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(folder), str(count), str(wait)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": names, "JAX_PLATFORMS": "cuda,cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_each_process_has_its_own_and_a_killed_one_gives_them_back(tmp_path: Path) -> None:
    processes = [start(tmp_path) for _ in range(3)]
    try:
        said = [process.stdout.readline().split() for process in processes]
        assert sorted(name for name, _, _ in said) == ["5", "7", "GPU-3/x"]
        # It sees no other, and asks but once.
        assert all(name == seen and again == "True" for name, seen, again in said)
        late = start(tmp_path)
        assert "of 7, GPU-3/x, 5 too few are free" in late.communicate()[0]
        assert late.returncode == 2
        processes[1].send_signal(signal.SIGKILL)
        processes[1].wait()
        both = start(tmp_path, count=2)
        assert "needs 2 of the machine's GPUs to itself" in both.communicate()[0]
        processes.append(start(tmp_path))
        assert processes[-1].stdout.readline().split()[0] == said[1][0]
        # One that finds none waits for those that end.
        processes.append(start(tmp_path, wait=60))
        processes[0].communicate("")
        assert processes[-1].stdout.readline().split()[0] == said[0][0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_two_that_share_a_teacher_are_taken_together(tmp_path: Path) -> None:
    with start(tmp_path, count=2) as process:
        assert process.stdout.readline().split()[:2] == ["7,GPU-3/x"] * 2
        process.communicate("")


def test_nothing_is_claimed_where_jax_uses_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert devices.claim(1, tmp_path) == []
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(devices, "_has_begun", lambda: True)
    assert devices.claim(1, tmp_path) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.visible() == []
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
