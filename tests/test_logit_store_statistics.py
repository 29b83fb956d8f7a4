"""Figures of a store against sums made the slow way from the rows that went in."""

from pathlib import Path

import numpy as np
import pytest
import small_store

from logit_store import codec, layout, manifests, reader, statistics, writer
from logit_store.codec import RowEntries
from logit_store.ledger import Ledger
from schemas.manifest import ShardStatistics


@pytest.fixture
def store(tmp_path) -> str:
    small_store.write_store(str(tmp_path / "store"))
    return str(tmp_path / "store")


def create(url: str, **changes: object) -> None:
    """A store without shards."""
    writer.create_tokens(url, small_store.tokens_manifest(), small_store.CORPUS)
    manifest = small_store.targets_manifest(**changes)
    writer.create_targets(url, "default", manifest, small_store.tables())


def write_entries(url: str, rows: list[RowEntries], monkeypatch, **changes: object) -> None:
    """A store of the small store's rows with other entries; every block has all its points."""
    whole = small_store.target_rows()
    encoded = [
        codec.encode_row(
            small_store.tables().vocabulary,
            entries,
            small_store.LENGTH,
            small_store.LENGTH * small_store.PER_TOKEN,
            small_store.POINTS,
        )
        for entries in rows
    ]
    columns = {name: np.stack([row[name] for row in encoded]) for name in encoded[0]}
    columns["block_points"] = np.full_like(whole.block_points, small_store.POINTS)
    targets = type(whole)(**columns, teacher_nats=whole.teacher_nats)
    monkeypatch.setattr(small_store, "target_rows", lambda: targets)
    small_store.write_tokens(url)
    small_store.write_targets(url, **changes)


def weights(rows: list[RowEntries], block_points: np.ndarray) -> dict[tuple[int, int], dict]:
    """(row, position) → id → weight, of every predicted position."""
    found: dict[tuple[int, int], dict] = {}
    for row, entries in enumerate(rows):
        for t, i, p in zip(entries.position, entries.id, entries.points, strict=True):
            weight = p / block_points[row, t // small_store.BLOCK]
            found.setdefault((row, int(t)), {})[int(i)] = weight
    return found


def nats() -> tuple[np.ndarray, np.ndarray]:
    """Entropy and label log-probability of the predicted positions, as they are stored."""
    predicted = layout.predicted_mask(small_store.token_rows()[1])
    found = codec.decode_nats(small_store.target_rows().teacher_nats).astype(np.float64)
    return found[:, 0][predicted], -found[:, 1][predicted]


def test_the_summary_is_of_the_rows(store):
    _, segments = small_store.token_rows()
    expected = weights(*small_store.row_entries())
    found = statistics.summary(store, "default")
    assert (found.sequences, found.shards, found.committed_shards) == (5, 3, 3)
    assert found.tokens == 5 * 16 - 3 == np.count_nonzero(segments)
    assert found.predicted_tokens == len(expected) == layout.predicted_mask(segments).sum()
    entries = sum(len(of_one) for of_one in expected.values())
    assert found.entries_per_token == entries / found.tokens
    assert found.max_entries == max(len(of_one) for of_one in expected.values())
    assert found.mean_mass == pytest.approx(1, rel=1e-6)
    entropy, label = nats()
    assert found.mean_entropy_nats == pytest.approx(entropy.mean(), rel=1e-12)
    assert found.mean_label_logprob_nats == pytest.approx(label.mean(), rel=1e-12)
    assert found.mean_label_logprob_nats < 0


def test_the_summary_of_a_finished_store_is_that_of_its_records(store, monkeypatch):
    """Of a finished store the records are not read; of an unfinished one they are summed up."""
    names = (None, "default")
    finished = [statistics.summary(store, name) for name in names]
    for name in names:
        ledger = Ledger(store, name, manifests.read_manifest(store, name))
        (Path(store) / ledger.summary_key).unlink()
    records = [statistics.summary(store, name) for name in names]
    for whole, part in zip(finished, records, strict=True):
        size = whole.metadata_bytes - part.metadata_bytes
        assert size > 0
        assert whole.bytes_per_token == pytest.approx(part.bytes_per_token + size / whole.tokens)
        sizes = {"metadata_bytes": 0, "bytes_per_token": 0}
        assert whole.as_dict() | sizes == part.as_dict() | sizes
    small_store.write_store(store)
    monkeypatch.setattr(Ledger, "sum_up", lambda _: pytest.fail("the summary is there"))
    monkeypatch.setattr(Ledger, "records", lambda _: pytest.fail("the summary is there"))
    assert [statistics.summary(store, name) for name in names] == finished


def test_the_summary_of_an_unfinished_store_is_of_what_is_committed(store):
    manifest = small_store.targets_manifest()
    ledger = Ledger(store, "default", manifest)
    records = list(ledger.records())
    ledger.withdraw([1])
    found = statistics.summary(store, "default")
    assert (found.shards, found.committed_shards) == (3, 2)
    sums = ShardStatistics(tokens=0).plus(records[0].statistics).plus(records[2].statistics)
    assert found.predicted_tokens == sums.predicted_tokens == 2 * 14 + 11
    assert found.mean_entropy_nats == pytest.approx(sums.entropy_sum_nats / (2 * 14 + 11))
    # The tokens are all there.
    assert found.tokens == 77
    sizes = {key: 0 for key in layout.row_arrays(manifest)}
    for file in (*records[0].files, *records[2].files):
        sizes[file.key.split("/")[0]] += file.size_bytes
    assert {key: found.array_bytes[key] for key in sizes} == sizes


@pytest.mark.parametrize("unfinished", [False, True])
def test_every_byte_on_disk_is_in_the_bytes_per_token(store, unfinished):
    if unfinished:
        Ledger(store, "default", small_store.targets_manifest()).withdraw([1])
        for path in Path(store).glob("targets/default/*/c/1"):
            (path / "0" if (path / "0").is_file() else path / "0" / "0").unlink()
    found = statistics.summary(store, "default")
    sizes = {path: path.stat().st_size for path in Path(store).rglob("*") if path.is_file()}
    # The group that only holds the sets of targets belongs to none of them.
    del sizes[Path(store) / "targets/zarr.json"]
    assert sum(found.array_bytes.values()) + found.metadata_bytes == sum(sizes.values())
    assert found.bytes_per_token == sum(sizes.values()) / found.tokens
    for name, size in found.array_bytes.items():
        chunks = [path for path in sizes if f"/{name}/c/" in str(path)]
        chunks += [path for path in sizes if str(path).endswith(f"copies/targets/default/{name}")]
        assert size == sum(sizes[path] for path in chunks), name
    tables = set(small_store.tables().arrays())
    assert set(found.array_bytes) == tables | {
        *layout.row_arrays(small_store.tokens_manifest()),
        *layout.row_arrays(small_store.targets_manifest()),
    }


def test_another_set_of_targets_costs_this_one_nothing(store):
    before = statistics.summary(store, "default")
    small_store.write_targets(store, "more", seed=5)
    assert statistics.summary(store, "default") == before


def test_the_summary_of_tokens_alone_has_no_targets_in_it(store):
    found = statistics.summary(store, None)
    assert set(found.array_bytes) == {"tokens", "segment_ids"}
    assert found.tokens == 77
    assert found.predicted_tokens == 4 * 14 + 11
    assert found.entries_per_token == 0
    files = {path.relative_to(store): path for path in Path(store).rglob("*") if path.is_file()}
    sizes = [path.stat().st_size for name, path in files.items() if "targets" not in name.parts]
    assert found.bytes_per_token == sum(sizes) / 77


def test_a_store_without_shards_has_a_summary(tmp_path):
    url = str(tmp_path / "empty")
    create(url)
    found = statistics.summary(url, "default")
    assert (found.shards, found.committed_shards, found.bytes_per_token) == (3, 0, 0)
    assert statistics.distributions(url, "default") == {}


def test_distributions_are_of_predicted_positions(store):
    tokens, _ = small_store.token_rows()
    expected = weights(*small_store.row_entries())
    found = statistics.distributions(store, "default")
    counts = [len(of_one) for of_one in expected.values()]
    assert found["entries per token"].mean == np.mean(counts)
    assert found["entries per token"].percentiles[90] == np.percentile(counts, 90)
    assert found["entries per token"].percentiles[100] == 3
    masses = found["stored mass"]
    assert [masses.mean, *masses.percentiles.values()] == pytest.approx([1] * 7, rel=1e-6)
    for key, values in zip(
        ("teacher entropy (nats)", "label log-probability (nats)"), nats(), strict=True
    ):
        assert found[key].percentiles[50] == pytest.approx(np.percentile(values, 50), rel=1e-6)
        assert found[key].percentiles[1] == pytest.approx(np.percentile(values, 1), rel=1e-6)
        assert found[key].mean == pytest.approx(values.mean(), rel=1e-5)
    stored = [of_one.get(int(tokens[r, t + 1]), 0.0) for (r, t), of_one in expected.items()]
    assert found["stored weight of the label"].mean == pytest.approx(np.mean(stored), rel=1e-6)


def test_the_weight_of_a_label_that_was_sampled_is_counted(tmp_path, monkeypatch):
    """Made-up targets hardly ever hold the label, so here it has all points or seven of them."""
    tokens, segments = small_store.token_rows()
    rows = []
    for row in range(small_store.ROWS):
        positions = np.flatnonzero(layout.predicted_mask(segments)[row])
        labels = tokens[row, positions + 1]
        others = (labels + 1) % small_store.VOCAB
        even = positions % 2 == 0
        rows.append(
            RowEntries(
                np.concatenate([positions, positions[even]]),
                np.concatenate([labels, others[even]]),
                np.concatenate([np.where(even, 7, 10), np.full(even.sum(), 3)]),
            )
        )
    url = str(tmp_path / "store")
    write_entries(url, rows, monkeypatch)
    found = statistics.distributions(url, "default")
    expected = [0.7 if t % 2 == 0 else 1.0 for e in rows for t in np.unique(e.position)]
    assert found["stored weight of the label"].mean == pytest.approx(np.mean(expected))
    assert found["stored weight of the label"].percentiles[1] == pytest.approx(0.7)
    assert found["stored weight of the label"].percentiles[100] == pytest.approx(1)
    assert found["stored mass"].mean == pytest.approx(1)


def test_the_rest_of_top_k_is_no_stored_mass(tmp_path, monkeypatch):
    """Of ten points, four stand for all ids without an entry."""
    rows = []
    for segments in small_store.token_rows()[1]:
        positions = np.flatnonzero(layout.predicted_mask(segments))
        ids = np.repeat([5, small_store.VOCAB], len(positions))
        points = np.repeat([6, 4], len(positions))
        rows.append(RowEntries(np.tile(positions, 2), ids, points))
    sampler = small_store.targets_manifest().sampler.model_copy(update={"name": "top_k"})
    url = str(tmp_path / "store")
    write_entries(url, rows, monkeypatch, sampler=sampler)
    assert statistics.summary(url, "default").mean_mass == pytest.approx(0.6)
    assert statistics.distributions(url, "default")["stored mass"].mean == pytest.approx(0.6)
    assert statistics.distributions(url, "default")["entries per token"].mean == 2


def test_a_sample_of_rows_is_spread_over_what_is_committed(store, monkeypatch):
    Ledger(store, "default", small_store.targets_manifest()).withdraw([1])
    asked: list[int] = []
    read = reader.TargetsReader.rows

    def spy(self, rows):
        asked.extend(int(row) for row in rows)
        return read(self, rows)

    monkeypatch.setattr(reader.TargetsReader, "rows", spy)
    statistics.distributions(store, "default", max_sequences=2)
    assert asked == [0, 4]
    asked.clear()
    statistics.distributions(store, "default")
    assert asked == [0, 1, 4]
