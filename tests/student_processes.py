"""Training runs in processes of their own: one, or several that find each other."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "student_run.py"
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def environment(compiled: Path, devices: int = 1) -> dict[str, str]:
    """Of a process with so many CPU devices; equal programs are compiled once."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(
    config: Path,
    delay_seconds: float = 0,
    *,
    devices: int = 1,
    compiled: Path | None = None,
    **variables: str,
) -> "subprocess.Popen[str]":
    """Programs are kept in `compiled`, by default beside the config."""
    compiled = compiled or config.parent / "compiled"
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(config), str(delay_seconds)],
        env=environment(compiled, devices) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_several(
    configs: list[Path],
    *,
    devices: int,
    delay_seconds: float = 0,
    compiled: Path | None = None,
) -> "list[subprocess.Popen[str]]":
    """The processes of one run, with a config and `devices` each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return [
        start(
            config,
            delay_seconds,
            devices=devices,
            compiled=compiled,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(len(configs)),
            JAX_PROCESS_ID=str(index),
        )
        for index, config in enumerate(configs)
    ]


def finish(
    processes: "list[subprocess.Popen[str]]", status: int = 0, seconds: float = 300
) -> list[tuple[str, str]]:
    """Outputs and errors of all, which must end with `status`."""
    try:
        said = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == status, (process.returncode, errors)
    return said


def records(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
