"""Tokenize and dump through Beam: the same bytes on every runner, however often it is killed."""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest
from dump_world import TEACHER, digest, dump_config, flags, make_world, tokenize_config
from rich.console import Console

from gemma2 import checkpoint, model
from logit_store import manifests, reader, writer
from logit_store.ledger import Ledger
from logit_store.verify import verify
from pipelines import cli, dump, progress, runner, shards, tokenize
from schemas.errors import ConfigError, IncompleteStoreError, ManifestMismatchError
from schemas.runs import CorpusConfig, SamplerConfig
from teacher_dump import tokenizer as tokenizers

QUIET = Console(quiet=True)
INTERRUPTED = (
    "retort dump: interrupted; what was committed is kept, and the same command continues."
)
pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory, compile_once) -> Path:
    """A store that was made without interruption."""
    store = tmp_path_factory.mktemp("whole") / "store"
    tokenize.tokenize(tokenize_config(world, store), QUIET)
    dump.dump(dump_config(world, store), QUIET)
    return store


def test_the_store_is_whole_and_holds_the_corpus(world, whole):
    report = verify(str(whole))
    assert report.ok, report.problems
    assert report.missing_shards == 0
    tokens = reader.TokensReader(str(whole))
    assert tokens.manifest.num_shards > 5
    assert len(manifests.read_corpus(str(whole), tokens.manifest).splits) > 2
    rows = tokens.rows(np.arange(tokens.manifest.num_sequences))
    tokenizer = tokenizers.Tokenizer.load(world / "tokenizer.model")
    text = tokenizer.decode(rows.tokens[rows.segment_ids > 0])
    expected = "".join(path.read_text() for path in sorted((world / "corpus").iterdir()))
    assert text == expected


def test_a_driver_leaves_devices_to_its_workers(world, whole, tmp_path):
    """JAX would take the first GPU's memory, which is a worker's, if the driver asked for any."""
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    sampler = SamplerConfig(entries_per_token=4, points=6, block_tokens=32)
    config = dump_config(world, store, name="planned", sampler=sampler)
    code = (
        "from rich.console import Console\nfrom pipelines import devices, dump\n"
        "from schemas.runs import DumpConfig\n"
        f"config = DumpConfig.model_validate_json({config.model_dump_json()!r})\n"
        "dump.prepare(config, Console(quiet=True))\n"
        "assert not devices._has_begun()\n"
        "import jax\njax.devices()\nassert devices._has_begun()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "planned" in reader.list_targets(str(store))


def test_a_run_sums_up_what_it_did(world, whole, tmp_path):
    """From the shards' own records, and without those of other runs."""
    [kept] = (whole / "reports" / "dump-default").iterdir()
    found = json.loads(kept.read_text())
    manifest = manifests.read_manifest(str(whole), "default")
    sums = Ledger(str(whole), "default", manifest).summary()
    assert found["statistics"] == pytest.approx(sums.statistics.model_dump())
    assert found["shards_computed"] == manifest.num_shards
    assert found["entries_per_token"] == pytest.approx(4, rel=0.05)
    assert found["captured_mass"] == pytest.approx(1, abs=1e-5)
    stored = sum(sums.array_bytes.values()) / sums.statistics.tokens
    assert found["bytes_per_token"] == pytest.approx(stored)
    assert found["tokens_per_second"] == pytest.approx(
        sums.statistics.tokens / found["seconds"], rel=1e-2
    )
    assert found["runner"] == "FnApiRunner in_memory"
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    Ledger(str(store), "default", manifest).withdraw([2])
    log = io.StringIO()
    said = dump.dump(dump_config(world, store), Console(file=log, width=200))
    assert len(list((store / "reports" / "dump-default").iterdir())) == 2
    one = [r for r in (store / "reports" / "dump-default").iterdir() if r.name != kept.name]
    again = json.loads(one[0].read_text())
    assert (again["shards_computed"], again["shards_reused"]) == (1, manifest.num_shards - 1)
    assert again["statistics"]["tokens"] < found["statistics"]["tokens"] / 2
    assert f"{again['statistics']['tokens']:,} tokens in" in said
    assert "captured mass 1.0000; the teacher's entropy" in said
    assert verify(str(store)).ok


def test_progress_says_what_the_records_say(world, whole, tmp_path):
    """Tokens, entries and mass on a terminal's bar while shards come, whoever commits them."""
    manifest = manifests.read_manifest(str(whole), "default")
    ledger = Ledger(str(whole), "default", manifest)
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    copy = Ledger(str(store), "default", manifest)
    copy.withdraw([0, 1, 3])
    work = shards.Work()
    count = shards._Counter(copy, work)
    assert (count(), work.line()) == (manifest.num_shards - 3, "")
    for done, index in enumerate((3, 0), 1):
        copy.commit(ledger.record(index))
        assert (count(), work.computed) == (manifest.num_shards - 3 + done, done)
    both = ledger.record(3).statistics.plus(ledger.record(0).statistics)
    assert work.statistics == both
    line = f", {both.entries / both.tokens:.2f} entries/token, captured mass 1.0000"
    assert work.line().endswith(line)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    with progress.watch(terminal, "dump", 10, "shards", count, work.line):
        pass
    assert line.strip(", ") in terminal.file.getvalue()


def test_what_a_bar_counts_is_never_counted_twice_at_once(monkeypatch):
    """The last count does not meet one of the thread that polls."""
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.001)
    counting = threading.Lock()
    met = 0

    def count() -> int:
        nonlocal met
        if not counting.acquire(blocking=False):
            met += 1
            return 0
        time.sleep(0.02)
        counting.release()
        return 1

    for _ in range(5):
        with progress.watch(QUIET, "x", 1, "shards", count):
            time.sleep(0.03)
    assert met == 0


def test_a_second_run_reuses_everything(world, whole):
    before = digest(whole)
    assert "reused" in tokenize.tokenize(tokenize_config(world, whole), QUIET)
    assert "reused" in dump.dump(dump_config(world, whole), QUIET)
    assert digest(whole) == before


def start(world: Path, store: Path, compiled: Path) -> subprocess.Popen[bytes]:
    """The two jobs in a process of their own, by the command line."""
    t, d = tokenize_config(world, store), dump_config(world, store)
    code = (
        "import sys\nfrom pipelines.cli import main\n"
        f"assert main({['tokenize', *flags(t)]!r}) == 0\n"
        f"assert main({['dump', *flags(d)]!r}) == 0\n"
    )
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_killed_anywhere_it_ends_in_the_same_bytes(world, whole, compiled, tmp_path):
    """SIGKILL at random moments, locks and half-written files left as they are, then run again."""
    rng = random.Random(int(os.environ.get("RETORT_KILL_SEED", "0")))
    store = tmp_path / "store"
    # A copy, as a program may be half-written too.
    programs = shutil.copytree(compiled, tmp_path / "compiled")
    kills = 0
    progress = set()
    # `benchmarks/engine_faults.py` kills dozens of times.
    for _ in range(4):
        with start(world, store, programs) as process:
            # Most of the time is start-up; aim at the work, which the store's growth shows.
            deadline = time.monotonic() + 60
            size = len(list(store.rglob("*")))
            while time.monotonic() < deadline and process.poll() is None:
                if len(list(store.rglob("*"))) != size:
                    break
                # To look more often would take a core from the job.
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.25))
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
        kills += 1
        progress.add(len(list(store.rglob("*"))))
    assert kills >= 3
    assert len(progress) >= 2, "every kill came before any work was done"
    final = start(world, store, programs)
    output, _ = final.communicate(timeout=300)
    assert final.returncode == 0, output.decode()
    assert digest(store) == digest(whole)


def test_ctrl_c_in_a_dump_says_one_sentence_and_loses_nothing(world, whole, tmp_path):
    store = tmp_path / "store"
    tokenize.tokenize(tokenize_config(world, store), QUIET)
    command = [sys.executable, "-m", "pipelines.cli", "dump", *flags(dump_config(world, store))]
    # Not with a program that was kept: processes that compile for themselves write the same bytes.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        ledger = store / "targets/default/ledger"
        deadline = time.monotonic() + 300
        while not (ledger.is_dir() and any(ledger.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=120)
    assert process.returncode == 130, message
    assert message.strip().splitlines() == [INTERRUPTED]
    committed = reader.TargetsReader(str(store), "default").committed
    assert 0 < committed.sum() < len(committed)
    dump.dump(dump_config(world, store), QUIET)
    assert digest(store) == digest(whole)


def test_ctrl_c_before_worker_processes_answer_ends_them(world, tmp_path):
    """Beam never tells those to end that have not called it. The signal is to the driver alone."""
    store = tmp_path / "store"
    tokenize.tokenize(tokenize_config(world, store), QUIET)
    command = [sys.executable, "-m", "pipelines.cli", "dump", *flags(dump_config(world, store))]
    with subprocess.Popen(
        [*command, "--runner", "processes", "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        driver, workers = psutil.Process(process.pid), []
        deadline = time.monotonic() + 300
        while len(workers) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
            workers = driver.children(recursive=True)
        process.send_signal(signal.SIGINT)
        try:
            _, message = process.communicate(timeout=60)
            _, left = psutil.wait_procs(workers, timeout=10)
        finally:
            for one in (driver, *workers):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
    assert process.returncode == 130, message
    assert message.strip().splitlines()[-1] == INTERRUPTED
    assert "Traceback" not in message
    assert left == []


def test_a_dump_over_unfinished_tokens_is_refused(world, tmp_path):
    config = tokenize_config(world, tmp_path / "store")
    tokenize.tokenize(config, QUIET)
    Ledger(config.store, None, manifests.read_manifest(config.store, None)).withdraw([1])
    with pytest.raises(IncompleteStoreError, match="run `retort tokenize` again first"):
        dump.dump(dump_config(world, tmp_path / "store"), QUIET)


@pytest.mark.parametrize("backend", ["jax", "transformers"])
def test_a_teacher_of_too_few_ids_is_refused_by_its_config(
    world, whole, tmp_path, capsys, monkeypatch, backend
):
    """By the driver: there are no weights to load, and no job."""
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("a job was begun"))
    folder = tmp_path / "teacher"
    folder.mkdir()
    config = json.loads((world / "teacher" / "config.json").read_text()) | {"vocab_size": 500}
    if backend == "transformers":
        config = {"model_type": "gemma3", "text_config": config}
    (folder / "config.json").write_text(json.dumps(config))
    before = digest(whole)
    asked = dump_config(world, whole, teacher=folder, name="few")
    assert cli.main(["dump", *flags(asked)]) == 2
    assert capsys.readouterr().err == (
        f"retort dump: A teacher must know every id of the store's tokenizer, but {folder} "
        "has 500 and the tokenizer 512; give the teacher that belongs to the tokenizer.\n"
    )
    assert digest(whole) == before


def test_another_config_is_refused_field_by_field(world, whole):
    with pytest.raises(ManifestMismatchError, match="seed is 0 there and 7 here"):
        dump.dump(dump_config(world, whole, seed=7), QUIET)
    with pytest.raises(ManifestMismatchError, match="sequence_tokens is 64 there and 32 here"):
        tokenize.tokenize(tokenize_config(world, whole, sequence_tokens=32), QUIET)


def test_a_changed_input_is_refused(world, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("the first text " * 200)
    config = tokenize_config(world, tmp_path / "store", corpus=CorpusConfig(paths=(str(corpus),)))
    tokenize.tokenize(config, QUIET)
    (corpus / "a.txt").write_text("another text " * 200)
    with pytest.raises(ManifestMismatchError, match="sources is"):
        tokenize.tokenize(config, QUIET)
    spec = writer.plan_shards(reader.TokensReader(config.store).manifest)[0]
    Ledger(config.store, None, manifests.read_manifest(config.store, None)).withdraw([0])
    with pytest.raises(ConfigError, match="Inputs must not change while they are tokenized"):
        tokenize.write_shard(config, spec)


def test_a_workers_error_reaches_the_user_as_one_sentence(world, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.jsonl").symlink_to(corpus / "absent")
    config = tokenize_config(world, tmp_path / "store", corpus=CorpusConfig(paths=(str(corpus),)))
    with pytest.raises(ConfigError, match=r"must be readable, but .*a\.jsonl is not"):
        tokenize.tokenize(config, QUIET)


def test_runners_that_lose_data_are_refused_by_name():
    with pytest.raises(ConfigError, match="multi_threading is refused"):
        runner.parse_options(["--direct_running_mode=multi_threading"])
    with pytest.raises(ConfigError, match="DirectRunner is refused"):
        runner.parse_options(["--runner=DirectRunner"])


def test_the_pilot_gives_the_entries_that_were_asked_for(whole):
    targets = reader.TargetsReader(str(whole), "default")
    batch = targets.rows(np.arange(targets.manifest.num_sequences))
    entries = (batch.entry_id >= 0).sum() / (batch.segment_ids > 0).sum()
    assert entries == pytest.approx(4, rel=0.05)
    assert not (whole / "pilot").exists() or not any((whole / "pilot").rglob("*.json"))


def test_a_dump_that_is_continued_keeps_its_points(world, whole, tmp_path, monkeypatch):
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    manifest = manifests.read_manifest(str(store), "default")
    Ledger(str(store), "default", manifest).withdraw([2])

    def no_pilot(*_: object) -> int:
        raise AssertionError("the manifest says how many points there are")

    monkeypatch.setattr(dump, "_pilot_points", no_pilot)
    assert "1 shards computed" in dump.dump(dump_config(world, store), QUIET)
    assert digest(store) == digest(whole)
    sampler = SamplerConfig(entries_per_token=4, points=manifest.sampler.points, block_tokens=32)
    given = dump_config(world, store, name="given", sampler=sampler)
    dump.dump(given, QUIET)
    found = manifests.read_manifest(str(store), "given")
    assert manifest.sampler.entries_per_token == 4
    assert found.sampler == manifest.sampler.model_copy(update={"entries_per_token": None})
    more = SamplerConfig(entries_per_token=5, slots_per_token=6, block_tokens=32)
    with pytest.raises(ManifestMismatchError, match="entries_per_token is 4 there and 5 here"):
        dump.dump(dump_config(world, store, sampler=more), QUIET)
    # The points were given, so that they are kept whatever the default is.
    assert "are complete" in dump.dump(dump_config(world, store, name="given", sampler=more), QUIET)


def test_a_pilot_that_was_cut_off_is_continued(world, whole, tmp_path, monkeypatch):
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    config = dump_config(world, store, name="piloted")
    asked: list[int] = []
    process = dump.CountPilot.process

    def some(self, element):
        asked.append(dump.PilotSpec.model_validate_json(element).index)
        if len(asked) == 3:
            raise ConfigError("cut off here")
        yield from process(self, element)

    monkeypatch.setattr(dump.CountPilot, "process", some)
    with pytest.raises(ConfigError, match="cut off here"):
        dump.dump(config, QUIET)
    left = {int(path.stem) for path in (store / "pilot" / "piloted").glob("*.json")}
    assert left
    first, asked[:] = set(asked), [-1, -2, -3]
    dump.dump(config, QUIET)
    assert left.isdisjoint(asked[3:])
    assert left | set(asked[3:]) > first
    found = manifests.read_manifest(str(store), "piloted")
    assert found.sampler == manifests.read_manifest(str(store), "default").sampler
    assert not list((store / "pilot").rglob("*.json"))


def test_repair_computes_lost_shards_again(world, whole, tmp_path, capsys):
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    for name in ("entry_bucket/c/1/0", "head_count/c/3/0"):
        path = store / "targets/default" / name
        path.write_bytes(path.read_bytes()[:-3])
    repair = ["repair", str(store), "--teacher", str(world / "teacher")]
    assert cli.main(repair) == 2
    assert "teacher is of use with apply alone" in capsys.readouterr().err
    assert cli.main([*repair, "--apply", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["written_again"], found["write_again"]) == (True, ["default"], [])
    assert digest(store) == digest(whole)


def test_repair_does_not_take_another_teacher(world, whole, tmp_path, capsys):
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    (store / "targets/default/entry_bucket/c/1/0").write_bytes(b"")
    other = model.init_params(TEACHER, jax.random.key(1))
    checkpoint.save(tmp_path / "other", TEACHER, other)
    command = ["repair", str(store), "--apply", "--teacher", str(tmp_path / "other")]
    assert cli.main(command) == 2
    assert "weights_sha256 is" in capsys.readouterr().err
    command[-1] = str(world / "teacher")
    assert cli.main(command) == 0
    assert digest(store) == digest(whole)


def test_a_teacher_of_transformers_dumps_too(world, tmp_path, capsys):
    """Its own backend by default, retried to the same bytes, and no other teacher's shards."""
    transformers = pytest.importorskip("transformers")
    store, folder = tmp_path / "store", tmp_path / "llama"
    corpus = CorpusConfig(paths=(str(world / "corpus" / "0.py"),))
    tokenize.tokenize(tokenize_config(world, store, corpus=corpus), QUIET)
    # Its head has rows beyond the tokenizer's 512 pieces.
    config = transformers.LlamaConfig(
        vocab_size=520,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=24,
        num_hidden_layers=2,
        initializer_range=0.4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    # By draws, whose program is compiled sooner than that of systematic sampling.
    sampler = SamplerConfig(name="multinomial", entries_per_token=4, block_tokens=32)
    asked = dump_config(world, store, teacher=folder, name="llama", sampler=sampler)
    assert cli.main(["dump", *flags(asked)]) == 0
    manifest = manifests.read_manifest(str(store), "llama")
    assert (manifest.teacher.backend, manifest.teacher.name) == ("transformers", "llama")
    assert verify(str(store)).ok
    with pytest.raises(ConfigError, match="dtype float8 is for Gemma 2 teachers in JAX"):
        dump.dump(asked.model_copy(update={"dtype": "float8"}), QUIET)
    before = digest(store)
    Ledger(str(store), "llama", manifest).withdraw([1])
    assert "1 shards computed" in dump.dump(asked, QUIET)
    assert digest(store) == before
    with pytest.raises(ManifestMismatchError, match=r"teacher\.backend is transformers there"):
        dump.dump(asked.model_copy(update={"teacher": world / "teacher"}), QUIET)
    (folder / "tokenizer.model").write_bytes((world / "tokenizer.model").read_bytes())
    assert "are complete" in dump.dump(asked, QUIET)
    (folder / "tokenizer.model").write_bytes(b"another")
    capsys.readouterr()
    assert cli.main(["dump", *flags(asked)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("retort dump: A teacher must have the store's tokenizer, but")
    assert tokenizers.Tokenizer.load(world / "tokenizer.model").info.sha256 in said
    assert hashlib.sha256(b"another").hexdigest() in said


def test_a_dump_in_float8_is_another_set(world, tmp_path):
    store = tmp_path / "store"
    tokenize.tokenize(tokenize_config(world, store), QUIET)
    sampler = SamplerConfig(name="multinomial", points=4, entries_per_token=4, block_tokens=32)
    asked = dump_config(world, store, sampler=sampler, dtype="float8")
    dump.dump(asked, QUIET)
    manifest = manifests.read_manifest(str(store), "default")
    assert manifest.dtype == "float8"
    assert verify(str(store)).ok
    before = digest(store)
    Ledger(str(store), "default", manifest).withdraw([1])
    assert "1 shards computed" in dump.dump(asked, QUIET)
    assert digest(store) == before
    with pytest.raises(ManifestMismatchError, match="dtype is float8 there and bfloat16 here"):
        dump.dump(asked.model_copy(update={"dtype": "bfloat16"}), QUIET)


def test_points_follow_from_the_curve_of_expected_entries():
    points = np.array([1, 10, 100])
    entries = np.array([1.0, 5.0, 25.0])
    assert [dump.points_for(wanted, points, entries) for wanted in (1, 5, 25)] == [1, 10, 100]
    assert dump.points_for(11.18, points, entries) == 32
    assert dump.points_for(99, points, entries) == 100


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerConfig(name="top_k", entries_per_token=5, block_tokens=64),
        SamplerConfig(name="multinomial", entries_per_token=9, points=9, block_tokens=32),
        SamplerConfig(name="full", block_tokens=64),
    ],
    ids=lambda sampler: sampler.name,
)
def test_other_samplers_over_the_same_tokens(world, whole, tmp_path, sampler):
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    dump.dump(dump_config(world, store, name=sampler.name, sampler=sampler), QUIET)
    assert verify(str(store)).ok
    targets = reader.TargetsReader(str(store), sampler.name)
    batch = targets.rows([0])
    counts = (batch.head_count.astype(int) + batch.tail_count)[0]
    masses = np.bincount(targets.positions(batch)[0], batch.entry_weight[0])
    np.testing.assert_allclose(masses[counts > 0], 1.0, rtol=1e-5)
    if sampler.name == "top_k":
        assert set(counts[counts > 0]) == {6}
    if sampler.name == "full":
        assert counts.max() > 500
