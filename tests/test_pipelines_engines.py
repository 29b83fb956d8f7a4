"""The same store from every engine, of a corpus with poison, filters and a mixture."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dump_world import digest, dump_config, make_world, rich_corpus, tokenize_config
from rich.console import Console

from logit_store import manifests
from logit_store.verify import verify
from pipelines import cli, dump, runner, tokenize
from pipelines.arguments import Engine
from schemas.errors import ConfigError
from schemas.runs import CorpusConfig

QUIET = Console(quiet=True)
WORKERS = 2
LONGEST_START_SECONDS = 120
pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory, compile_once: None) -> Path:
    return write(world, tmp_path_factory.mktemp("whole") / "store", [])


def write(world: Path, store: Path, options: list[str]) -> Path:
    """Few shards: each worker process compiles the teacher for itself."""
    config = tokenize_config(world, store, shard_sequences=256, corpus=rich_corpus(world))
    tokenize.tokenize(config, QUIET, runner.parse_options(options))
    dump.dump(dump_config(world, store), QUIET, runner.parse_options(options))
    return store


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory, compile_once: None) -> Iterator[str]:
    """The address of a Dask scheduler that has two workers, each a process of its own."""
    folder = tmp_path_factory.mktemp("dask")
    file = folder / "scheduler.json"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "DASK_TEMPORARY_DIRECTORY": str(folder)}
    flags = ["--scheduler-file", str(file)]
    module = [sys.executable, "-m"]
    commands = [
        [*module, "distributed.cli.dask_scheduler", *flags, "--port", "0", "--no-dashboard"],
        *[
            [*module, "distributed.cli.dask_worker", *flags, "--nthreads", "1", "--no-dashboard"]
            for _ in range(WORKERS)
        ],
    ]
    with (folder / "log").open("wb") as log:
        processes = [
            subprocess.Popen(c, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
            for c in commands
        ]
    try:
        until = time.monotonic() + LONGEST_START_SECONDS
        while not file.exists() or not file.read_text():
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.2)
        yield json.loads(file.read_text())["address"]
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=60)


@pytest.fixture
def job_server() -> Iterator[str]:
    """Beam's own portable job service."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    module = "apache_beam.runners.portability.local_job_service_main"
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + LONGEST_START_SECONDS
        while True:
            try:
                socket.create_connection(("localhost", port), 1).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.2)
        yield f"localhost:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_the_corpus_has_every_kind_of_poison(whole: Path) -> None:
    report = manifests.read_report(str(whole))
    assert report is not None
    assert set(report.dead_letters) == {
        *("empty", "no_text", "not_json", "not_utf8", "nul_bytes", "surrogate", "too_long"),
        "unreadable",
    }
    assert any(name.startswith("dead_letters/") for name in digest(whole))


def test_several_processes_write_the_same_bytes(
    world: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And leave the terminal to the driver, but for what Beam logs before it has options."""
    options = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    assert digest(write(world, tmp_path / "store", options)) == digest(whole)
    assert "INFO:apache_beam" not in capfd.readouterr().err


def test_a_dask_cluster_writes_the_same_bytes(
    world: Path, whole: Path, scheduler: str, tmp_path: Path
) -> None:
    import distributed

    with distributed.Client(scheduler) as client:
        client.wait_for_workers(WORKERS, timeout=LONGEST_START_SECONDS)
        clients = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.clients))
        with distributed.get_task_stream(client) as stream:
            store = write(world, tmp_path / "store", dask(scheduler))
        left = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.clients))
    assert digest(store) == digest(whole)
    assert verify(str(store)).ok
    assert left == clients
    # Not one of them did all of it.
    assert len({task["worker"] for task in stream.data}) == WORKERS


def dask(scheduler: str) -> list[str]:
    return ["--runner=DaskRunner", f"--dask_client_address={scheduler}"]


def test_a_portable_job_server_writes_the_same_bytes(
    world: Path, whole: Path, job_server: str, tmp_path: Path
) -> None:
    options = [
        "--runner=PortableRunner",
        f"--job_endpoint={job_server}",
        "--environment_type=LOOPBACK",
    ]
    assert digest(write(world, tmp_path / "store", options)) == digest(whole)


def test_an_error_of_a_dask_worker_is_the_users_sentence(
    world: Path, scheduler: str, tmp_path: Path
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").symlink_to(tmp_path / "absent")
    corpus = CorpusConfig(paths=(str(tmp_path / "corpus"),))
    config = tokenize_config(world, tmp_path / "store", corpus=corpus)
    options = runner.options_of(Engine(runner="dask", scheduler=scheduler))
    with pytest.raises(ConfigError, match=r"must be readable, but .*a\.jsonl is not"):
        tokenize.tokenize(config, QUIET, options)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--runner=dask"], "--runner dask needs the address of a scheduler"),
        (["--workers=2"], "--workers is for --runner processes, but the runner is 'memory'"),
        (["--scheduler=tcp://h:1"], "--scheduler is for --runner dask, but the runner is 'memory'"),
        (["--runner=processes", "--", "--streaming"], "The engine must be named once"),
        (["--", "--runner=DaskRunner", "--dask_npartitions=1"], "must be one spec"),
    ],
)
def test_engines_that_are_named_wrongly(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["dump", "--store=/no/store", "--teacher=/no/teacher", *flags]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert sentence in said


def test_dask_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'retort\[dask\]'"):
        runner.options_of(Engine(runner="dask", scheduler="tcp://h:1"))
