"""The ledger says the same at every moment, whoever is interrupted and whoever comes in between."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import small_store

from logit_store import ledger as ledgers
from logit_store import storage
from logit_store.ledger import Ledger, record_bytes, shard_spec, summary_bytes
from schemas.errors import CorruptStoreError, StorageError
from schemas.manifest import LedgerRecord, ShardFile, ShardStatistics

SHARDS = 7
MANIFEST = small_store.tokens_manifest(num_sequences=SHARDS, shard_sequences=1)
FINISHED = {f"segment-00000{n}.jsonl" for n in range(3)} | {"summary.json"}


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch) -> None:
    """Three segments of three, three and one shard."""
    monkeypatch.setattr(ledgers, "SEGMENT_SHARDS", 3)


@pytest.fixture
def url(tmp_path) -> str:
    return str(tmp_path / "store")


def open_ledger(url: str) -> Ledger:
    return Ledger(url, None, MANIFEST)


def record(index: int, content: str = "") -> LedgerRecord:
    digest = hashlib.sha256(f"{content}{index}".encode()).hexdigest()
    return LedgerRecord(
        spec=shard_spec(MANIFEST, index),
        tokens_sha256=digest,
        files=(
            ShardFile(key=f"tokens/c/{index}/0", size_bytes=10 + index, sha256=digest),
            ShardFile(key=f"segment_ids/c/{index}/0", size_bytes=1, sha256=digest),
        ),
        statistics=ShardStatistics(
            tokens=16, predicted_tokens=15 - index, max_entries=index, mass_sum=0.1 * index
        ),
    ).sealed()


def commit(url: str, *indices: int) -> None:
    for index in indices or range(SHARDS):
        open_ledger(url).commit(record(index))


def files(url: str) -> dict[str, bytes]:
    folder = Path(url) / "ledger"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(url: str, contents: dict[str, bytes]) -> None:
    folder = Path(url) / "ledger"
    folder.mkdir(parents=True, exist_ok=True)
    for name in files(url).keys() - contents.keys():
        (folder / name).unlink()
    for name, raw in contents.items():
        (folder / name).write_bytes(raw)


def says(url: str) -> list[LedgerRecord | None]:
    """Each shard's record; all ways to ask must agree."""
    ledger = open_ledger(url)
    found = [ledger.record(index) for index in range(SHARDS)]
    there = [r for r in found if r is not None]
    assert list(ledger.records()) == there
    np.testing.assert_array_equal(ledger.committed(), [r is not None for r in found])
    assert [spec.index for spec in ledger.pending()] == [
        index for index, r in enumerate(found) if r is None
    ]
    return found


@pytest.fixture
def calm(tmp_path) -> dict[str, bytes]:
    """The files of a finished ledger that nobody disturbed."""
    calm_url = str(tmp_path / "calm")
    commit(calm_url)
    assert open_ledger(calm_url).compact() == SHARDS
    return files(calm_url)


class Watched:
    """A key-value store that calls `before(count)` before each of its operations."""

    def __init__(self, store, before: Callable[[int], None]):
        self._store, self._before = store, before
        self.count = 0

    def _call(self, name, *arguments, **keywords):
        self.count += 1
        self._before(self.count)
        return getattr(self._store, name)(*arguments, **keywords)

    def read(self, *arguments, **keywords):
        return self._call("read", *arguments, **keywords)

    def write(self, *arguments, **keywords):
        return self._call("write", *arguments, **keywords)

    def list(self, *arguments, **keywords):
        return self._call("list", *arguments, **keywords)

    def __getattr__(self, name):
        return getattr(self._store, name)


def watched(url: str, before: Callable[[int], None]) -> Ledger:
    ledger = open_ledger(url)
    ledger._store = Watched(ledger._store, before)
    return ledger


def at_every_operation(
    url: str, run: Callable[[Ledger], object], meanwhile: Callable[[], object]
) -> Iterator[int]:
    """Run something again and again, with something else before its first, second, … operation.

    Yields after each; the caller looks at the ledger and sets it back.
    """
    moment = 0
    while True:
        moment += 1
        happened = []

        def before(count: int, moment: int = moment, happened: list = happened) -> None:
            if count == moment:
                happened.append(count)
                meanwhile()

        run(watched(url, before))
        if not happened:
            return
        yield moment


class Stop(Exception):
    """The process ends here."""


def stop() -> None:
    raise Stop


def interrupted(run: Callable[[Ledger], object]) -> Callable[[Ledger], object]:
    def until(ledger: Ledger) -> None:
        with contextlib.suppress(Stop):
            run(ledger)

    return until


def test_records_are_read_back_as_they_were_committed(url):
    assert says(url) == [None] * SHARDS
    commit(url, 4, 0)
    assert says(url) == [record(i) if i in (0, 4) else None for i in range(SHARDS)]
    assert sorted(files(url)) == ["00000000.json", "00000004.json"]
    assert files(url)["00000004.json"] == record_bytes(record(4))


def test_full_segments_replace_their_records(url):
    commit(url, 0, 1, 2, 4)
    assert open_ledger(url).compact() == 4
    assert sorted(files(url)) == ["00000004.json", "segment-000000.jsonl"]
    lines = b"".join(record_bytes(record(index)) for index in range(3))
    assert files(url)["segment-000000.jsonl"] == lines
    assert says(url) == [record(i) if i in (0, 1, 2, 4) else None for i in range(SHARDS)]
    assert open_ledger(url).summary() is None
    assert not open_ledger(url).is_compacted()


def test_a_finished_ledger_is_segments_and_their_sum(url):
    commit(url)
    ledger = open_ledger(url)
    assert ledger.compact() == SHARDS
    assert files(url).keys() == FINISHED
    assert ledger.is_compacted()
    assert says(url) == [record(index) for index in range(SHARDS)]
    summary = ledger.summary()
    assert summary is not None
    assert summary == ledger.sum_up()
    assert summary.is_intact()
    assert summary.num_shards == SHARDS
    assert summary.statistics == ShardStatistics(
        tokens=16 * 7,
        predicted_tokens=15 * 7 - 21,
        max_entries=6,
        mass_sum=sum(0.1 * index for index in range(7)),
    )
    assert summary.array_bytes == {"tokens": 70 + 21, "segment_ids": 7}
    assert summary.record_bytes == sum(len(record_bytes(record(index))) for index in range(7))
    assert summary.segments_sha256 == tuple(
        hashlib.sha256(files(url)[f"segment-00000{n}.jsonl"]).hexdigest() for n in range(3)
    )


def test_a_finished_ledger_is_opened_without_a_listing(url):
    commit(url)
    open_ledger(url).compact()
    operations = []
    assert watched(url, operations.append).committed().all()
    assert len(operations) == 1
    assert watched(url, operations.append).record(5) == record(5)
    assert len(operations) == 3


def test_records_are_read_some_at_a_time(url, monkeypatch):
    monkeypatch.setattr(ledgers, "_AT_ONCE", 2)
    commit(url)
    assert says(url) == [record(index) for index in range(SHARDS)]
    assert open_ledger(url).compact() == SHARDS
    assert files(url).keys() == FINISHED


def test_compacting_again_changes_nothing(url, calm):
    put(url, calm)
    operations: list[int] = []
    assert watched(url, operations.append).compact() == SHARDS
    assert files(url) == calm
    # A listing and a look at the summary, however many shards there are.
    assert len(operations) == 2


def test_a_compaction_cut_anywhere_says_the_same_and_is_finished_by_the_next(url, calm):
    commit(url)
    loose = files(url)
    seen = set()
    for _ in at_every_operation(url, interrupted(lambda ledger: ledger.compact()), stop):
        assert says(url) == [record(index) for index in range(SHARDS)]
        seen.add(tuple(sorted(files(url))))
        assert open_ledger(url).compact() == SHARDS
        assert files(url) == calm
        put(url, loose)
    assert files(url) == calm
    assert len(seen) >= SHARDS


def test_two_compactions_end_as_one(url, calm):
    """The other runs from its beginning to its end between any two operations of this one."""
    commit(url)
    loose = files(url)

    def other() -> None:
        assert open_ledger(url).compact() == SHARDS

    for moment in at_every_operation(url, lambda ledger: ledger.compact(), other):
        assert files(url) == calm, moment
        put(url, loose)


def test_a_compaction_that_another_cut_into_ends_as_one(url, calm):
    """The other is killed somewhere, between any two operations of this one."""
    commit(url)
    loose = files(url)
    for length in range(1, 40, 3):

        def other(length: int = length) -> None:
            def before(count: int) -> None:
                if count == length:
                    raise Stop

            interrupted(lambda ledger: ledger.compact())(watched(url, before))

        for moment in at_every_operation(url, lambda ledger: ledger.compact(), other):
            assert says(url) == [record(index) for index in range(SHARDS)]
            open_ledger(url).compact()
            assert files(url) == calm, (length, moment)
            put(url, loose)
        put(url, loose)


def test_reading_while_another_compacts_misses_nothing(url):
    commit(url)
    loose = files(url)
    found = []

    def read(ledger: Ledger) -> None:
        found.append(list(ledger.records()))

    for moment in at_every_operation(url, read, lambda: open_ledger(url).compact()):
        assert found[-1] == [record(index) for index in range(SHARDS)], moment
        put(url, loose)


def test_a_shard_committed_while_the_driver_compacts_is_kept(url, calm):
    commit(url, 0, 1, 2, 3, 5, 6)
    loose = files(url)
    for _ in at_every_operation(url, lambda ledger: ledger.compact(), lambda: commit(url, 4)):
        assert says(url) == [record(index) for index in range(SHARDS)]
        assert open_ledger(url).compact() == SHARDS
        assert files(url) == calm
        put(url, loose)


def test_a_writer_that_comes_late_is_overtaken_and_agrees(url, calm):
    """Another commits its shard and the driver compacts, between any two of its operations."""
    commit(url, 0, 1, 2, 3, 5, 6)
    loose = files(url)

    def others() -> None:
        commit(url, 4)
        open_ledger(url).compact()

    for _ in at_every_operation(url, lambda ledger: ledger.commit(record(4)), others):
        assert says(url) == [record(index) for index in range(SHARDS)]
        # Also of a finished ledger the record that is left over goes.
        assert open_ledger(url).compact() == SHARDS
        assert files(url) == calm
        put(url, loose)


def test_of_two_writers_with_other_bytes_one_is_refused(url):
    commit(url, 0, 1, 2, 3, 5, 6)
    loose = files(url)
    for compacts in (False, True):
        refused = []

        def attempt(run: Callable[[], object], refused: list = refused) -> None:
            try:
                run()
            except CorruptStoreError as error:
                refused.append(str(error))

        def others(attempt: Callable = attempt, compacts: bool = compacts) -> None:
            attempt(lambda: open_ledger(url).commit(record(4, "other")))
            if compacts:
                open_ledger(url).compact()

        for _ in at_every_operation(
            url, lambda ledger: attempt(lambda: ledger.commit(record(4))), others
        ):
            # One writer may be told, or both, if they took turns; never none.
            assert refused, compacts
            assert all("two of shard 4 of" in message for message in refused)
            refused.clear()
            put(url, loose)


def test_the_first_record_stands(url):
    first = open_ledger(url).commit(record(0))
    sums = first.statistics.model_copy(update={"mass_sum": 1e-9})
    assert open_ledger(url).commit(record(0).model_copy(update={"statistics": sums})) == first
    assert says(url)[0] == first


def test_withdrawn_shards_are_missing_and_the_others_stay(url, calm):
    for count in range(SHARDS):
        put(url, calm)
        open_ledger(url).withdraw([count, 6])
        missing = {count, 6}
        assert says(url) == [None if i in missing else record(i) for i in range(SHARDS)]
        assert "summary.json" not in files(url)
        commit(url, *missing)
        open_ledger(url).compact()
        assert files(url) == calm


def test_withdrawing_from_an_unfinished_ledger(url):
    commit(url, 0, 1, 2, 4)
    open_ledger(url).compact()
    open_ledger(url).withdraw([1, 3, 4])
    assert says(url) == [record(i) if i in (0, 2) else None for i in range(SHARDS)]


def test_records_can_be_replaced(url, calm):
    put(url, calm)
    open_ledger(url).withdraw([2], [record(1, "new"), record(5, "new")])
    news = {2: None, 1: record(1, "new"), 5: record(5, "new")}
    assert says(url) == [news.get(i, record(i)) for i in range(SHARDS)]


def test_a_withdrawal_cut_anywhere_withdraws_nothing_else(url, calm):
    put(url, calm)
    seen = set()
    withdraw = interrupted(lambda ledger: ledger.withdraw([1, 2, 4]))
    for _ in at_every_operation(url, withdraw, stop):
        kept = [i for i, r in enumerate(says(url)) if r is not None]
        assert {0, 3, 5, 6} <= set(kept)
        seen.add(tuple(kept))
        open_ledger(url).withdraw([1, 2, 4])
        assert says(url) == [None if i in (1, 2, 4) else record(i) for i in range(SHARDS)]
        put(url, calm)
    assert len(seen) > 2


def test_a_replacement_cut_anywhere_loses_no_record(url, calm):
    put(url, calm)
    replace = interrupted(lambda ledger: ledger.withdraw([], [record(1), record(4)]))
    for _ in at_every_operation(url, replace, stop):
        assert says(url) == [record(i) for i in range(SHARDS)]
        put(url, calm)


def test_a_torn_segment_is_named_and_can_be_replaced(url, calm):
    for torn in (b"", b"{}\n", calm["segment-000001.jsonl"][:-1].replace(b"\n", b" ")):
        put(url, calm | {"segment-000001.jsonl": torn})
        ledger = open_ledger(url)
        with pytest.raises(CorruptStoreError, match=r"segment-000001\.jsonl of .* holds \d;"):
            ledger.record(4)
        assert ledger.record(2) == record(2)
        with pytest.raises(CorruptStoreError, match="retort repair"):
            list(ledger.records())
        assert [index for index, _, raw in ledger.lines() if not raw] == [3, 4, 5]
        ledger.withdraw([3], [record(4), record(5)])
        assert says(url) == [None if i == 3 else record(i) for i in range(SHARDS)]
        commit(url, 3)
        ledger.compact()
        assert files(url) == calm


@pytest.mark.parametrize("change", ["flip", "space", "place"])
def test_a_record_that_is_damaged_or_elsewhere_is_named(url, calm, change):
    lines = calm["segment-000001.jsonl"].splitlines(keepends=True)
    if change == "flip":
        lines[1] = lines[1].replace(b"tokens/c/4/0", b"tokens/c/5/0")
    elif change == "space":
        lines[1] = lines[1].replace(b"{", b"{ ", 1)
    else:
        lines[1], lines[2] = lines[2], lines[1]
    put(url, calm | {"segment-000001.jsonl": b"".join(lines)})
    rule = "holds shard 5 in the place of 4" if change == "place" else "own checksum"
    with pytest.raises(CorruptStoreError, match=rule):
        open_ledger(url).record(4)
    assert open_ledger(url).record(3) == record(3)


def test_a_summary_that_is_damaged_or_of_another_manifest_is_named(url, calm):
    summary = calm["summary.json"]
    put(url, calm)
    foreign = open_ledger(url).sum_up().model_copy(update={"manifest_fingerprint": "0" * 64})
    for raw in (b"", b"\xff", summary[:-1], summary.replace(b"112", b"113"), b" " + summary):
        put(url, calm | {"summary.json": raw})
        with pytest.raises(CorruptStoreError, match=r"ledger/summary\.json of"):
            open_ledger(url).committed()
    put(url, calm | {"summary.json": summary_bytes(foreign.sealed())})
    with pytest.raises(CorruptStoreError, match="its checksum and its manifest"):
        open_ledger(url).committed()


def test_what_lies_beside_is_not_taken_for_records(url):
    commit(url, 0)
    names = ("000000001.json", "00000009.json", "segment-000003.jsonl", "segment-0000001.jsonl")
    for name in (
        *names,
        "00000002.json.__lock",
        "\u0660" * 7 + "\u0661.json",
        "summary.jsonl",
        "0001.json",
    ):
        (Path(url) / "ledger" / name).write_bytes(b"?")
    assert says(url) == [record(0)] + [None] * (SHARDS - 1)
    assert open_ledger(url).compact() == 1


def test_records_beside_their_segment_are_told(url, calm):
    put(url, calm | {"00000004.json": record_bytes(record(4))})
    ledger = open_ledger(url)
    assert ledger.superseded() == [(4, "ledger/00000004.json")]
    assert ledger.superseded_fault(4) is None
    put(url, calm | {"00000004.json": record_bytes(record(4, "other"))})
    assert "two of shard 4" in (ledger.superseded_fault(4) or "")
    with pytest.raises(CorruptStoreError, match="two of shard 4"):
        ledger.compact()
    assert files(url).keys() == FINISHED | {"00000004.json"}


def test_a_damaged_record_stops_its_segment(url):
    commit(url)
    path = Path(url) / "ledger/00000004.json"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CorruptStoreError, match=r"shard 4 in ledger/00000004\.json"):
        open_ledger(url).compact()
    assert sorted(files(url)) == [
        "00000003.json",
        "00000004.json",
        "00000005.json",
        "00000006.json",
        "segment-000000.jsonl",
    ]


def test_keys_are_all_that_a_ledger_may_have(url, calm):
    ledger = open_ledger(url)
    assert {f"ledger/{name}" for name in calm} <= set(ledger.keys())
    assert len(ledger.keys()) == SHARDS + 3 + 1
    assert ledger.segment_key_of(5) == "ledger/segment-000001.jsonl"
    assert ledger.summary_key == "ledger/summary.json"


def test_what_the_storage_refuses_is_said_in_one_sentence(url, calm):
    def refuse() -> None:
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    for run in (
        lambda ledger: ledger.commit(record(0)),
        lambda ledger: ledger.compact(),
        lambda ledger: ledger.withdraw([1], [record(2)]),
        lambda ledger: list(ledger.records()),
    ):
        put(url, {name: raw for name, raw in calm.items() if "1" not in name})
        refused = []

        def attempt(ledger: Ledger, run: Callable = run, refused: list = refused) -> None:
            try:
                run(ledger)
            except StorageError as error:
                refused.append(str(error))

        count = sum(1 for _ in at_every_operation(url, attempt, refuse))
        assert len(refused) == count > 0
        assert all("(RESOURCE_EXHAUSTED: No space left on device); check" in m for m in refused)


def test_the_tests_see_every_operation(url):
    """If the ledger got its store anew somewhere, what is above would watch nothing."""
    counts: list[int] = []
    commit(url)
    watched(url, counts.append).compact()
    assert len(counts) > 3 * SHARDS
    assert storage.list_keys(storage.open_kvstore(url, "ledger/")) == sorted(FINISHED)
