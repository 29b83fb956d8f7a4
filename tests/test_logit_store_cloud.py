"""A store in a bucket, through TensorStore's own drivers and servers that speak their protocols.

What holds here is that the driver asks and a server of that protocol answers as the store needs;
that Amazon's and Google's own services do is theirs to promise.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import bucket_servers
import numpy as np
import pytest
import small_store
import web_server
from bucket_servers import Bucket, Race

from logit_store import chosen_rows, layout, manifests, reader, remote, storage, writer
from logit_store.inspect import terminal, terminal_compare
from logit_store.inspect.web.stores import Served
from logit_store.ledger import Ledger
from logit_store.repair import repair
from logit_store.verify import verify
from pipelines import cli
from schemas.errors import (
    ConfigError,
    CorruptStoreError,
    IncompleteStoreError,
    ManifestMismatchError,
    RetortError,
    StorageError,
    StoreNotFoundError,
)

VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "STORAGE_EMULATOR_HOST",
    "TENSORSTORE_GCS_HTTP_URL",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING",
)


@pytest.fixture(scope="session")
def s3() -> Iterator[Bucket]:
    with bucket_servers.s3_bucket() as bucket:
        yield bucket


@pytest.fixture(scope="session")
def gs() -> Iterator[Bucket]:
    with bucket_servers.gcs_bucket() as bucket:
        yield bucket


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path) -> None:
    for name in VARIABLES:
        # Set first, so that what the code itself sets is undone as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(remote, "_FIRST_RETRIES", {"max_retries": 2, "initial_delay": "1ms"})
    monkeypatch.setattr(remote, "_answered", {})


TABLES = [f"targets/default/{table}/c/0" for table in small_store.tables().arrays()]


def point_at(monkeypatch, scheme: str, url: str) -> None:
    """What a user sets to reach a server of their own."""
    if scheme == "gs":
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url.removeprefix("http://"))
        return
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.fixture(params=["s3", "gs"])
def bucket(request, monkeypatch) -> Iterator[Bucket]:
    found: Bucket = request.getfixturevalue(request.param)
    found.front.requests.clear()
    point_at(monkeypatch, request.param, found.front.url)
    yield found
    found.front.answer = None
    found.front.page_keys = bucket_servers.PAGE_KEYS
    found.front.race = None
    assert found.front.refuse_once == []


@pytest.fixture
def path(request) -> str:
    """A folder of the bucket that is this test's own, with what a URL would have to escape."""
    return f"runs/{request.node.name} 1+1"


@pytest.fixture(scope="session")
def local(tmp_path_factory) -> str:
    url = str(tmp_path_factory.mktemp("local") / "store")
    small_store.write_store(url)
    return url


def files(url: str) -> dict[str, bytes]:
    root = Path(url)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def stored(local) -> dict[str, bytes]:
    """The small store's objects, which a writer leaves in a bucket too: the first test says so."""
    return files(local)


@pytest.fixture(scope="session")
def loose(tmp_path_factory) -> dict[str, bytes]:
    """The same, with records of targets that no driver has compacted yet."""
    url = str(tmp_path_factory.mktemp("loose") / "store")
    small_store.write_tokens(url)
    create_targets(url)
    for index in range(3):
        write_shard(url, index)
    return files(url)


def seed(bucket: Bucket, path: str, objects: dict[str, bytes]) -> str:
    """Put a store there as it is, without the requests of a writer; returns its URL."""
    bucket.write_all({f"{path}/{key}": raw for key, raw in objects.items()})
    return bucket.url(path)


def ledger_of(url: str, name: str | None) -> Ledger:
    return Ledger(url, name, manifests.read_manifest(url, name))


def create_tokens(url: str, **changes: object) -> None:
    writer.create_tokens(url, small_store.tokens_manifest(**changes), small_store.CORPUS)


def create_targets(url: str, name: str = "default", **changes: object) -> None:
    manifest = small_store.targets_manifest(**changes)
    writer.create_targets(url, name, manifest, small_store.tables())


def write_shard(url: str, index: int) -> None:
    """Commit one shard of the small store's targets."""
    tokens, segments = small_store.token_rows()
    spec = writer.plan_shards(small_store.targets_manifest())[index]
    rows = slice(spec.first_row, spec.stop_row)
    shard = small_store.part(small_store.target_rows(), spec)
    writer.TargetsWriter(url, "default").write(spec, tokens[rows], segments[rows], shard)


def assert_same_rows(url: str, local: str) -> None:
    order = [4, 0, 3, 0]
    found = reader.TargetsReader(url, "default").rows(order)
    expected = reader.TargetsReader(local, "default").rows(order)
    for column in fields(expected):
        np.testing.assert_array_equal(getattr(found, column.name), getattr(expected, column.name))


def test_a_store_in_a_bucket_is_byte_for_byte_the_local_one(bucket, path, local):
    url = bucket.url(path)
    small_store.write_store(url)
    assert bucket.objects(f"{path}/") == files(local)
    assert_same_rows(url, local)
    assert reader.list_targets(url) == ["default"]
    for name in (None, "default"):
        assert ledger_of(url, name).committed().all()
        assert list(ledger_of(url, name).records()) == list(ledger_of(local, name).records())
        assert ledger_of(url, name).summary() == ledger_of(local, name).summary()
    report, expected = verify(url), verify(local)
    assert report.ok
    assert report == expected
    assert report.shards == 6


def test_a_bucket_itself_may_be_a_store(bucket, local):
    try:
        small_store.write_store(bucket.url(""))
        assert_same_rows(bucket.url(""), local)
        assert {key: bucket.read(key) for key in files(local)} == files(local)
    finally:
        for key in files(local):
            bucket.delete(key)


def test_writing_again_changes_nothing(bucket, path, local, stored):
    url = seed(bucket, path, stored)
    bucket.front.requests.clear()
    small_store.write_store(url)
    written = {request.key for request in bucket.front.requests if request.is_write}
    # Tables are written over, with what they are.
    assert written == {f"{path}/{key}" for key in TABLES}
    assert bucket.objects(f"{path}/") == files(local)
    for key in files(local):
        if "ledger/" in key or "copies/" in key:
            bucket.delete(f"{path}/{key}")
    small_store.write_store(url)
    assert bucket.objects(f"{path}/") == files(local)


def test_verify_finds_a_flipped_byte_a_missing_object_and_a_stranger(bucket, path, stored):
    url = seed(bucket, path, stored)
    for key in ("targets/default/entry_bucket/c/1/0", "tokens/c/2/0", "targets/default/zarr.json"):
        raw = bucket.read(f"{path}/{key}")
        flipped = bytearray(raw)
        flipped[len(raw) // 2] ^= 4
        bucket.write(f"{path}/{key}", bytes(flipped))
        assert key in {problem.file for problem in verify(url).problems}
        bucket.delete(f"{path}/{key}")
        if "/c/" in key:
            problems = {(problem.file, problem.what) for problem in verify(url).problems}
            assert (key, "the file is missing or shorter than recorded") in problems
        bucket.write(f"{path}/{key}", raw)
    ledger_of(url, "default").withdraw([0])
    bucket.write(f"{path}/tokens/c/9/0", b"?")
    report = verify(url)
    assert report.missing_shards == 1
    assert [problem.file for problem in report.problems] == ["tokens/c/9/0"]


def test_a_reader_meets_damage_and_not_zeros(bucket, path, stored):
    url = seed(bucket, path, stored)
    raw = bytearray(bucket.read(f"{path}/tokens/c/0/0"))
    raw[20] ^= 1
    bucket.write(f"{path}/tokens/c/0/0", bytes(raw))
    bucket.delete(f"{path}/targets/default/entry_bucket/c/1/0")
    targets = reader.TargetsReader(url, "default")
    with pytest.raises(CorruptStoreError, match=r"tokens in shards \[0\] of .*DATA_LOSS"):
        targets.rows([4, 0])
    with pytest.raises(CorruptStoreError, match=r"entry_bucket in shards \[1\] of .*missing"):
        targets.rows([4, 2])
    targets.rows([4])


def test_a_reader_refuses_rows_without_a_record(bucket, path, stored):
    url = seed(bucket, path, stored)
    ledger_of(url, "default").withdraw([1])
    targets = reader.TargetsReader(url, "default")
    targets.rows([0, 4])
    with pytest.raises(IncompleteStoreError, match=r"rows \[2, 3\], of shards \[1\]"):
        targets.rows([3, 0, 2])


def test_a_run_that_was_cut_writes_only_what_is_pending(bucket, path, local):
    url = bucket.url(path)
    small_store.write_tokens(url)
    create_targets(url)
    write_shard(url, 1)
    # A shard whose data is there and whose record is not: its writer was killed in between.
    bucket.write(f"{path}/targets/default/entry_bucket/c/0/0", b"half")
    bucket.front.requests.clear()
    assert [spec.index for spec in ledger_of(url, "default").pending()] == [0, 2]
    small_store.write_targets(url)
    written = {request.key for request in bucket.front.requests if request.is_write}
    manifest = small_store.targets_manifest()
    shards = {
        spec.shard_key(index) for spec in layout.row_arrays(manifest).values() for index in (0, 2)
    }
    ledger = {"00000000.json", "00000002.json", "segment-000000.jsonl", "summary.json"}
    expected = shards | {f"ledger/{key}" for key in ledger}
    assert written == {
        *(f"{path}/targets/default/{key}" for key in expected),
        *(f"{path}/{key}" for key in TABLES),
    }
    assert bucket.objects(f"{path}/") == files(local)


class _Lockstep:
    """A key-value store whose users all look for a key before any of them writes it."""

    def __init__(self, store: Any, parties: threading.Barrier):
        self._store, self._parties = store, parties
        self._waits = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, key: str) -> Any:
        found = self._store.read(key)
        found.result()
        if self._waits:
            self._waits = False
            self._parties.wait(timeout=60)
        return found


RACERS = 12


def test_of_writers_that_all_saw_nothing_one_wins_and_all_learn_what_it_wrote(bucket, path):
    """The record or manifest that is there first stands: the server decides, request by request."""
    url = bucket.url(path)
    for attempt in range(8):
        key = ("zarr.json", "ledger/00000000.json")[attempt % 2]
        group = f"{attempt}/"
        parties = threading.Barrier(RACERS)
        bucket.front.requests.clear()

        def write(number: int, group: str = group, key: str = key, parties: Any = parties) -> bytes:
            store = _Lockstep(storage.open_kvstore(url, group), parties)
            return storage.write_new(store, key, b"writer %d" % number)

        with ThreadPoolExecutor(RACERS) as pool:
            answers = set(pool.map(write, range(RACERS)))
        assert answers == {bucket.read(f"{path}/{group}{key}")}
        writes = [request for request in bucket.front.requests if request.is_write]
        assert {request.key for request in writes} == {f"{path}/{group}{key}"}
        assert all(request.is_conditional for request in writes)
        assert Counter(request.status for request in writes) == {200: 1, 412: RACERS - 1}


# A child for each list of arguments, which all begin when the last one is there. The parent has
# imported everything for them, and opens no store: a fork would lose TensorStore's threads.
RACE = f"""
import json, os, sys, traceback
sys.path.insert(0, {str(Path(__file__).parent)!r})
import small_store
from logit_store import writer
small_store.target_rows()
code, *given = json.loads(sys.argv[1])
waiting, starting = os.pipe()
runs = []
for arguments in given:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(starting)
        os.dup2(writing, 1)
        os.read(waiting, 1)
        sys.argv[1:] = arguments
        status = 1
        try:
            exec(code)
            sys.stdout.flush()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    os.close(writing)
    runs.append((child, reading))
os.close(starting)
found = []
for child, reading in runs:
    with os.fdopen(reading) as file:
        found.append((file.read(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
print(json.dumps(found))
"""


def racing(code: str, *arguments: list[str]) -> list[str]:
    """Run a process for each list of arguments, from the same moment; what each printed."""
    command = [sys.executable, "-c", RACE, json.dumps([code, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [status for _, status in found] == [0] * len(arguments), done.stderr
    return [output for output, _ in found]


def test_of_processes_with_different_configs_only_one_is_accepted(bucket, path):
    url = bucket.url(path)
    small_store.write_tokens(url)
    code = (
        "manifest = small_store.targets_manifest(seed=int(sys.argv[2]))\n"
        "for name in 'abc':\n"
        "    try:\n"
        "        writer.create_targets(sys.argv[1], name, manifest, small_store.tables())\n"
        "        print(name, end='')\n"
        "    except writer.ManifestMismatchError as error:\n"
        "        assert f'and {sys.argv[2]} here' in str(error), error\n"
    )
    race = Race([f"{path}/targets/{name}/zarr.json" for name in "abc"], writers=3)
    bucket.front.race = race
    answers = racing(code, *([url, str(seed)] for seed in range(3)))
    # All found nothing there, and wrote.
    assert list(race.met.values()) == [3, 3, 3]
    assert sorted("".join(answers)) == list("abc")
    for seed, names in enumerate(answers):
        for name in names:
            assert manifests.read_manifest(url, name).seed == seed
    assert reader.list_targets(url) == list("abc")


def test_processes_that_write_the_same_shards_end_in_the_same_bytes(bucket, path, local):
    url = bucket.url(path)
    racing("small_store.write_store(sys.argv[1])", *([url] for _ in range(3)))
    assert bucket.objects(f"{path}/") == files(local)
    documents = [
        request
        for request in bucket.front.requests
        if request.is_write and request.key.endswith((".json", ".jsonl"))
    ]
    assert all(request.is_conditional for request in documents)
    won = Counter(request.key for request in documents if request.status == 200)
    # A record may come again after it was compacted, from a writer that had not seen it.
    records = {key: count for key, count in won.items() if key.rsplit("/", 1)[1][0] == "0"}
    assert len(records) == 6
    for key in records:
        del won[key]
    documents_there = [key for key in files(local) if key.endswith((".json", ".jsonl"))]
    assert won == {f"{path}/{key}": 1 for key in documents_there}


@pytest.mark.parametrize("compacted", [False, True])
def test_a_second_writer_of_other_bytes_is_told(bucket, path, compacted, loose):
    url = seed(bucket, path, loose)
    ledger = ledger_of(url, "default")
    if compacted:
        assert ledger.compact() == 3
    record = ledger.record(1)
    assert record is not None
    assert ledger.commit(record) == record
    other = record.model_copy(update={"tokens_sha256": "0" * 64})
    with pytest.raises(CorruptStoreError, match="Writers of one shard must produce equal bytes"):
        ledger.commit(other)
    assert ledger.record(1) == record


def cut_after(front: bucket_servers.Front, monkeypatch, number: int, refusal: bytes) -> None:
    """Refuse whatever would change the bucket from the request `number` on."""
    pass_on = front.pass_on
    left = iter(range(number))

    def refusing(call: bucket_servers.Call):
        if call.method in ("PUT", "POST", "DELETE"):
            with front.cut:
                if next(left, None) is None:
                    return 403, [], refusal
        return pass_on(call)

    monkeypatch.setattr(front, "pass_on", refusing)


# Changes that a compaction, or a withdrawal, of three shards makes: a segment, three records, the
# summary.
CHANGES = 5


@pytest.mark.parametrize("cut", range(CHANGES + 1))
def test_a_compaction_cut_anywhere_says_the_same_and_goes_on(
    bucket, path, local, monkeypatch, cut, loose
):
    url = seed(bucket, path, loose)
    records = list(ledger_of(url, "default").records())
    with monkeypatch.context() as patch:
        cut_after(bucket.front, patch, cut, REFUSALS[bucket.scheme])
        if cut < CHANGES:
            with pytest.raises(StorageError, match="refuses access"):
                ledger_of(url, "default").compact()
        else:
            assert ledger_of(url, "default").compact() == 3
    assert ledger_of(url, "default").committed().all()
    assert list(ledger_of(url, "default").records()) == records
    # Between the segment and the summary a missing summary could as well be lost.
    assert [problem.what for problem in verify(url).problems] == (
        ["the file is missing, though every shard is committed"] if 0 < cut < CHANGES else []
    )
    assert ledger_of(url, "default").compact() == 3
    assert bucket.objects(f"{path}/") == files(local)


@pytest.mark.parametrize("cut", range(CHANGES + 1))
def test_a_withdrawal_cut_anywhere_costs_no_other_shard(
    bucket, path, local, monkeypatch, cut, stored
):
    url = seed(bucket, path, stored)
    records = list(ledger_of(url, "default").records())
    with monkeypatch.context() as patch:
        cut_after(bucket.front, patch, cut, REFUSALS[bucket.scheme])
        if cut < CHANGES:
            with pytest.raises(StorageError, match="refuses access"):
                ledger_of(url, "default").withdraw([1])
        else:
            ledger_of(url, "default").withdraw([1])
    ledger = ledger_of(url, "default")
    kept = [record for record in ledger.records() if record.spec.index != 1]
    assert kept == [records[0], records[2]]
    # Even a withdrawal that was cut has not lost the record it was about to take back half-way.
    assert ledger.record(1) in (records[1], None)
    ledger.withdraw([1])
    assert ledger.committed().tolist() == [True, False, True]
    assert list(ledger.records()) == [records[0], records[2]]
    small_store.write_targets(url)
    assert bucket.objects(f"{path}/") == files(local)


def test_a_store_in_a_bucket_is_repaired(bucket, path, local, stored):
    """A manifest and a table from their copies, a shard withdrawn, a ledger derived."""
    url = seed(bucket, path, stored)
    bucket.write(f"{path}/zarr.json", b"{}")
    bucket.delete(f"{path}/targets/default/bucket_bits/c/0")
    bucket.delete(f"{path}/ledger/segment-000000.jsonl")
    raw = bytearray(bucket.read(f"{path}/targets/default/entry_bucket/c/1/0"))
    raw[4] ^= 1
    bucket.write(f"{path}/targets/default/entry_bucket/c/1/0", bytes(raw))
    damaged = bucket.objects(f"{path}/")
    assert repair(url, apply=False)[1].withdrawn == {"default": [1]}
    assert bucket.objects(f"{path}/") == damaged
    outcome = repair(url, apply=True)[1]
    assert (outcome.withdrawn, outcome.left) == ({"default": [1]}, [])
    report = verify(url)
    assert report.ok
    assert report.missing_shards == 1
    small_store.write_targets(url)
    assert bucket.objects(f"{path}/") == files(local)


@pytest.mark.parametrize("folder", ["copies/targets", "targets/many/ledger"])
def test_listings_go_on_past_a_page(bucket, path, folder, stored):
    """The sets of targets are listed by their manifests' copies, shards by their records."""
    url = seed(bucket, path, stored)
    # The client does not know how long a page is; the real ones of a thousand keys take long.
    bucket.front.page_keys = 50
    ends = [f"{index:08d}.json" for index in range(70)]
    bucket.write_all({f"{path}/{folder}/{end}": b"" for end in ends})
    bucket.front.requests.clear()
    if folder == "copies/targets":
        small_store.write_targets(url, "zest")
        bucket.front.requests.clear()
        names = [end.removesuffix(".json") for end in ends]
        assert reader.list_targets(url) == [*names, "default", "zest"]
    else:
        many = Ledger(url, "many", small_store.targets_manifest(num_sequences=2 * 70))
        assert many.committed().all()
    pages = [request.path for request in bucket.front.requests if not request.key]
    assert sum("continuation-token=" in page or "pageToken=" in page for page in pages) == 1
    listed = storage.list_keys(storage.open_kvstore(url, f"{folder}/"))
    assert [key for key in listed if key[0] == "0"] == ends


def test_a_busy_server_is_asked_again(bucket, path, monkeypatch):
    """S3 answers 409 to one of two conditional writes at once, without saying which one won."""
    statuses = [409, 503] if bucket.scheme == "s3" else [429, 503]
    spec = storage.kvstore_spec(bucket.url(path))
    retries = {f"{spec['driver']}_request_retries": {"initial_delay": "1ms"}}
    monkeypatch.setattr(storage, "kvstore_spec", lambda *_: spec | retries)
    bucket.front.refuse_once = list(statuses)
    assert storage.write_new(storage.open_kvstore(bucket.url(path)), "key", b"mine") == b"mine"
    writes = [request for request in bucket.front.requests if request.is_write]
    assert [request.status for request in writes] == [*statuses, 200]
    assert all(request.is_conditional for request in writes)


def test_a_write_that_found_no_bucket_is_not_taken_for_a_lost_race(bucket, path):
    """The s3 driver reports a conditional PUT's 404 as it does a condition that does not hold."""
    store = storage.open_kvstore(bucket.url(path))
    bucket.front.refuse_once = [404]
    with pytest.raises((StorageError, StoreNotFoundError)) as error:
        storage.write_new(store, "key", b"mine")
    expected = {
        "s3": f"that was written must be there, but key of {bucket.url(path)}/ is not; check the",
        "gs": "A store's bucket must exist, but",
    }
    assert expected[bucket.scheme] in one_sentence(error.value)


def one_sentence(error: RetortError) -> str:
    text = str(error)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    assert "tensorstore_spec" not in text
    return text


def test_a_missing_bucket_is_named(s3, monkeypatch):
    point_at(monkeypatch, "s3", s3.front.url)
    for use in (
        lambda: reader.TokensReader("s3://nowhere/a/b"),
        lambda: verify("s3://nowhere/a/b"),
        lambda: create_tokens("s3://nowhere/a/b"),
    ):
        with pytest.raises(StoreNotFoundError) as error:
            use()
        assert one_sentence(error.value) == (
            f"A store's bucket must exist, but {s3.front.url} (AWS_ENDPOINT_URL_S3) has no "
            "s3://nowhere; create it or correct s3://nowhere/a/b."
        )


def test_a_bucket_that_is_missing_at_the_write_is_named(gs, monkeypatch):
    """fake-gcs-server lists any bucket as empty, so here it is the write that finds out."""
    point_at(monkeypatch, "gs", gs.front.url)
    with pytest.raises(StoreNotFoundError) as error:
        create_tokens("gs://nowhere/a")
    assert "(STORAGE_EMULATOR_HOST) has no gs://nowhere; create it" in one_sentence(error.value)


def test_a_bucket_that_can_be_read_but_not_listed_is_refused(gs, path, monkeypatch):
    """Google's driver gives no keys then, and a store without records would be written anew."""
    point_at(monkeypatch, "gs", gs.front.url)
    small_store.write_tokens(gs.url(path))
    monkeypatch.setattr(remote, "_answered", {})
    pass_on = gs.front.pass_on
    refusal = (403, [], REFUSALS["gs"])
    is_listing = lambda call: call.path.partition("?")[0].endswith("/o")  # noqa: E731
    monkeypatch.setattr(
        gs.front, "pass_on", lambda call: refusal if is_listing(call) else pass_on(call)
    )
    with pytest.raises(StorageError, match="can be read and not listed; ask for the permission"):
        reader.TokensReader(gs.url(path))


def test_a_store_that_is_not_in_the_bucket_is_named(bucket, path):
    with pytest.raises(StoreNotFoundError, match=rf"{bucket.scheme}://.* holds no tokens; check"):
        reader.TokensReader(bucket.url(path))


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_server_that_is_down_is_named(monkeypatch, capfd, scheme):
    port = bucket_servers.free_port()
    point_at(monkeypatch, scheme, f"http://127.0.0.1:{port}")
    status = cli.main(["inspect", f"{scheme}://retort/a"])
    captured = capfd.readouterr()
    assert status == 2
    (sentence,) = [line for line in captured.err.splitlines() if line.startswith("retort")]
    assert f"A store's server must answer, but for {scheme}://retort " in sentence
    assert f"127.0.0.1:{port} (" in sentence
    assert "does not (ABORTED: All 2 retry attempts failed: CURL error" in sentence
    assert sentence.endswith("; check the network and the endpoint.")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_server_that_never_answers_is_not_waited_for(monkeypatch, scheme):
    monkeypatch.setattr(remote, "_FIRST_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_at(monkeypatch, scheme, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StorageError, match=r"does not .*; check the network and the endpoint"):
            reader.TokensReader(f"{scheme}://retort/a")


REFUSALS = {
    "s3": b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
    "gs": b'{"error": {"code": 403, "message": "Access Denied"}}',
}


def test_refused_access_is_named_wherever_it_happens(bucket, path, stored):
    """Also in the middle of a run, where it must not be taken for damaged bytes."""
    url = seed(bucket, path, stored)
    targets = reader.TargetsReader(url, "default")
    targets.rows([0])
    tokens = writer.TokensWriter(url)
    ledger = ledger_of(url, None)
    ledger.withdraw([0])
    spec = ledger.pending()[0]
    columns = [column[:2] for column in small_store.token_rows()]
    opened = storage.open_kvstore(url)
    bucket.front.answer = (403, REFUSALS[bucket.scheme])
    for use in (
        lambda: targets.rows([1]),
        lambda: reader.TargetsReader(url, "default"),
        lambda: tokens.write(spec, *columns),
        lambda: create_targets(url, "more"),
        lambda: storage.write_new(opened, "key", b""),
        lambda: storage.list_keys(opened),
        lambda: storage.open_array(url, "", layout.row_arrays(tokens.manifest)["tokens"]),
        lambda: ledger.committed(),
        lambda: list(ledger.records()),
        lambda: ledger.compact(),
        lambda: ledger.withdraw([1]),
        lambda: repair(url, apply=True),
        lambda: verify(url),
        lambda: reader.TokensReader(bucket.url(path + "/another")),
    ):
        with pytest.raises(StorageError) as error:
            use()
        sentence = one_sentence(error.value)
        assert "A store's bucket must let you list, read and write, but " in sentence
        assert f"refuses access to {bucket.url('').rstrip('/')} (PERMISSION_DENIED: " in sentence
        assert sentence.endswith(" and the bucket's policy.")


def test_a_shard_that_may_not_be_written_is_an_error_of_access(bucket, path):
    url = bucket.url(path)
    create_tokens(url)
    spec = ledger_of(url, None).pending()[0]
    bucket.front.refuse_once = [403]
    with pytest.raises(StorageError, match=r"let you list, read and write, but .* refuses"):
        writer.TokensWriter(url).write(spec, *(rows[:2] for rows in small_store.token_rows()))
    assert not ledger_of(url, None).committed().any()


def test_a_key_that_the_server_does_not_know_is_refused(s3, monkeypatch):
    point_at(monkeypatch, "s3", s3.front.url)
    # From here on moto checks who asks, as the real service does.
    s3.call("POST", "/moto-api/reset-auth", b"0")
    try:
        with pytest.raises(StorageError) as error:
            reader.TokensReader(s3.url("a"))
    finally:
        s3.call("POST", "/moto-api/reset-auth", b"Infinity")
    assert "InvalidAccessKeyId" in one_sentence(error.value)
    assert "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and" in str(error.value)


def test_without_credentials_a_request_is_anonymous_and_the_refusal_says_so(
    s3, path, monkeypatch, capfd
):
    point_at(monkeypatch, "s3", s3.front.url)
    small_store.write_tokens(s3.url(path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert cli.main(["inspect", s3.url(path)]) == 2
    captured = capfd.readouterr().err
    (sentence,) = [line for line in captured.splitlines() if line.startswith("retort")]
    assert "refuses access to s3://retort (PERMISSION_DENIED" in sentence
    assert "AWS_ACCESS_KEY_ID is not set; a profile or a role, if any, is used" in sentence
    assert "authorization" not in s3.front.requests[-1].headers


def test_a_process_does_not_look_for_credentials_at_every_open(s3, path, monkeypatch):
    point_at(monkeypatch, "s3", s3.front.url)
    small_store.write_tokens(s3.url(path))
    s3.call("PUT", s3.path(f"{path}/zarr.json") + "?acl", x_amz_acl="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    code = (
        "import sys\nfrom logit_store import storage\n"
        "for group in 'abcdefgh':\n"
        "    storage.list_keys(storage.open_kvstore(sys.argv[1], f'{group}/'))\n"
    )
    command = [sys.executable, "-c", code, s3.url(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert 1 <= printed.count("Default chain credentials provider failed") <= 2


def test_an_answer_that_no_rule_foresees_is_passed_on(bucket, path):
    bucket.front.answer = (400, b"<Error><Code>AuthorizationHeaderMalformed</Code></Error>")
    with pytest.raises(StorageError) as error:
        reader.TokensReader(bucket.url(path))
    sentence = one_sentence(error.value)
    assert "must take a store's requests, but for" in sentence
    checked = {"s3": "the endpoint and AWS_REGION", "gs": "the endpoint"}
    assert sentence.endswith(f"; check {checked[bucket.scheme]}.")


@pytest.mark.parametrize(
    ("url", "variables", "message"),
    [
        ("s3://", {}, "must be s3://bucket/path, but it is s3://; name the bucket"),
        ("gs:///a", {}, "must be gs://bucket/path, but it is gs:///a; name the bucket"),
        ("s3://a!b/c", {}, r"name must be valid, but that of s3://a!b/c is not \(Invalid S3"),
        ("gs://A/c", {}, "name must be valid, but that of gs://A/c is not .*Invalid GCS"),
        (
            "s3://a-b/c",
            {"AWS_ENDPOINT_URL": "localhost:9000"},
            "AWS_ENDPOINT_URL must begin with http:// or https://, but it is localhost:9000;",
        ),
        (
            "s3://a-b/c",
            {"AWS_SECRET_ACCESS_KEY": "s"},
            "must be set together, but only AWS_SECRET_ACCESS_KEY is; set the other",
        ),
    ],
)
def test_a_wrong_url_or_variable_is_named(monkeypatch, url, variables, message):
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as error:
        reader.TokensReader(url)
    one_sentence(error.value)


def test_the_variables_of_other_clients_are_read(monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert storage.kvstore_spec("s3://b-c/d", "e/") == {
        "driver": "s3",
        "bucket": "b-c",
        "path": "d/e/",
        "aws_region": "eu-west-1",
        "use_conditional_write": True,
    }
    monkeypatch.setenv("AWS_REGION", "eu-west-2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://any/")
    found = storage.kvstore_spec("s3://b-c")
    assert (found["aws_region"], found["endpoint"]) == ("eu-west-2", "https://any")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3/")
    assert storage.kvstore_spec("s3://b-c")["endpoint"] == "https://s3"
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert storage.kvstore_spec("s3://b-c")["aws_region"] == "us-east-1"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "https://emulator:1")
    storage.kvstore_spec("gs://b-c")
    assert os.environ["TENSORSTORE_GCS_HTTP_URL"] == "https://emulator:1"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "emulator:2")
    storage.kvstore_spec("gs://b-c")
    assert os.environ["TENSORSTORE_GCS_HTTP_URL"] == "http://emulator:2"


def test_requests_are_signed_with_the_environments_key_and_region(s3, monkeypatch):
    point_at(monkeypatch, "s3", s3.front.url)
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "for an hour")
    s3.front.requests.clear()
    storage.list_keys(storage.open_kvstore(s3.url("signed")))
    headers = s3.front.requests[-1].headers
    assert headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=somebody/")
    assert "/eu-north-1/s3/" in headers["authorization"]
    assert headers["x-amz-security-token"] == "for an hour"


def test_real_credentials_do_not_reach_an_emulator(gs, monkeypatch, tmp_path):
    """In a process of its own: TensorStore keeps the first token that it finds."""
    (tmp_path / "key.json").write_text("{}")
    code = (
        "from logit_store import storage\nstorage.list_keys(storage.open_kvstore('gs://retort/a'))"
    )
    variables = {
        "STORAGE_EMULATOR_HOST": gs.front.url,
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "key.json"),
    }
    gs.front.requests.clear()
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, check=True)
    assert {request.headers.get("authorization") for request in gs.front.requests} == {
        "Bearer emulator"
    }


def test_a_store_is_asked_for_its_bucket_once(bucket, path):
    url = bucket.url(path)
    small_store.write_tokens(url)
    bucket.front.requests.clear()
    for name in ("", "targets/", "ledger/"):
        storage.read_bytes(storage.open_kvstore(url, name), "zarr.json")
    assert all(request.key for request in bucket.front.requests)
    assert len(bucket.front.requests) == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as error:
        create_tokens(str(tmp_path / "file" / "store"))
    assert "A store's folder must be readable and writable, but at " in one_sentence(error.value)
    assert f"{tmp_path}/file/store" in str(error.value)


def test_damage_that_a_writer_meets_is_named():
    match = r"in s3://b/x some do not \(DATA_LOSS: bad\); delete the file"
    with pytest.raises(CorruptStoreError, match=match), remote.explained("s3://b/x"):
        raise ValueError("DATA_LOSS: bad [tensorstore_spec='{}']")


def test_a_config_that_differs_is_refused_in_a_bucket_too(bucket, path):
    url = bucket.url(path)
    small_store.write_tokens(url)
    with pytest.raises(ManifestMismatchError, match="shard_sequences is 2 there and 1 here"):
        create_tokens(url, shard_sequences=1)


def test_the_inspector_reads_a_bucket_as_it_reads_a_folder(bucket, path, local, stored, tmp_path):
    """Every view of the terminal, rows that are exported, and the pages of the browser."""
    url = seed(bucket, path, stored)
    piece = "⟨{}⟩".format

    def seen(store: str) -> tuple[str, list[str]]:
        data = [
            terminal.inspect_data(store),
            terminal.show_data(store, "default", 1, 0, 16, piece),
            terminal.stats_data(store, "default", 9),
            terminal.verify_data(store, verify(store)),
            terminal_compare.diff_data((store, "default"), (local, "default"), 9),
        ]
        out = tmp_path / f"{len(store)}.jsonl"
        chosen_rows.export(store, "default", "1:3,4", out, "jsonl")
        with web_server.serving([Served(store, "a store", None)]) as address:
            pages = [
                web_server.ask(address, where)[2]
                for where in ("/s/0", "/s/0/sequence/2", "/s/0/shard/1", "/s/0/shards?by=mass")
            ]
        return json.dumps(data).replace(store, "").replace(local, ""), [out.read_text(), *pages]

    data, pages = seen(url)
    expected, expected_pages = seen(local)
    assert data == expected
    assert [page.replace(url, "") for page in pages] == [
        page.replace(local, "") for page in expected_pages
    ]
