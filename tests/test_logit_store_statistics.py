"""Figures of a store against sums made the slow way from the rows that went in."""

from pathlib import Path

import numpy as np
import pytest
import small_store

from logit_store import layout, reader, statistics, writer


@pytest.fixture
def store(tmp_path) -> str:
    small_store.write_store(str(tmp_path / "store"))
    return str(tmp_path / "store")


def test_the_summary_is_of_the_rows(store):
    _, segments = small_store.token_rows()
    rows, expected = small_store.target_rows()
    predicted = layout.predicted_mask(segments)
    found = statistics.summary(store, "default")
    assert (found.sequences, found.shards, found.committed_shards) == (5, 3, 3)
    assert found.tokens == 5 * 16 - 3
    assert found.predicted_tokens == len(expected) == predicted.sum()
    entries = sum(len(weights) for weights in expected.values())
    assert found.entries_per_token == entries / found.tokens
    assert found.max_entries == max(len(weights) for weights in expected.values())
    mass = sum(sum(weights.values()) for weights in expected.values())
    assert abs(found.mean_mass * len(expected) / mass - 1) < 0.01
    entropy = rows.teacher_entropy[predicted].astype(np.float64).mean()
    assert abs(found.mean_entropy_nats - entropy) < 1e-12
    label = rows.label_logprob[predicted].astype(np.float64).mean()
    assert abs(found.mean_label_logprob_nats - label) < 1e-12


def test_every_byte_on_disk_is_in_the_bytes_per_token(store):
    found = statistics.summary(store, "default")
    sizes = {path: path.stat().st_size for path in Path(store).rglob("*") if path.is_file()}
    # The group that only holds the sets of targets belongs to none of them.
    del sizes[Path(store) / "targets/zarr.json"]
    assert sum(found.array_bytes.values()) + found.metadata_bytes == sum(sizes.values())
    assert found.bytes_per_token == sum(sizes.values()) / found.tokens
    shards = [size for path, size in sizes.items() if path.parent.parent.parent.name == "tokens"]
    assert found.array_bytes["tokens"] == sum(shards)


def test_the_summary_of_tokens_alone_has_no_targets_in_it(store):
    found = statistics.summary(store, None)
    assert set(found.array_bytes) == {"tokens", "segment_ids"}
    assert found.tokens == 77
    assert found.entries_per_token == 0


def test_a_store_without_shards_has_a_summary(tmp_path):
    url = str(tmp_path / "empty")
    writer.create_tokens(url, small_store.tokens_manifest())
    writer.create_targets(url, "default", small_store.targets_manifest())
    found = statistics.summary(url, "default")
    assert (found.shards, found.committed_shards, found.bytes_per_token) == (3, 0, 0)
    assert statistics.distributions(url, "default") == {}


def test_distributions_are_of_predicted_positions(store):
    tokens, segments = small_store.token_rows()
    rows, expected = small_store.target_rows()
    predicted = layout.predicted_mask(segments)
    found = statistics.distributions(store, "default")
    counts = [len(weights) for weights in expected.values()]
    assert found["entries per token"].mean == np.mean(counts)
    assert found["entries per token"].percentiles[90] == np.percentile(counts, 90)
    assert found["entries per token"].percentiles[100] == 3
    masses = [sum(weights.values()) for weights in expected.values()]
    assert abs(found["stored mass"].percentiles[50] / np.median(masses) - 1) < 0.02
    entropy = rows.teacher_entropy[predicted].astype(np.float32)
    assert found["teacher entropy (nats)"].percentiles[50] == np.percentile(entropy, 50)
    stored = [weights.get(int(tokens[r, t + 1]), 0.0) for (r, t), weights in expected.items()]
    assert abs(found["stored weight of the label"].mean - np.mean(stored)) < 0.01


def test_the_weight_of_a_label_that_was_sampled_is_counted(tmp_path, monkeypatch):
    """Made-up targets hardly ever hold the label, so here every label is an entry."""
    tokens, segments = small_store.token_rows()
    rows, _ = small_store.target_rows()
    followers = np.roll(tokens, -1, axis=1)
    rows.entry_count[:] = layout.predicted_mask(segments)
    rows.entry_id[:] = layout.UNUSED_ID
    rows.entry_weight[:] = 0
    blocks = small_store.LENGTH // small_store.BLOCK
    for row in range(small_store.ROWS):
        for block in range(blocks):
            span = slice(block * small_store.BLOCK, (block + 1) * small_store.BLOCK)
            ids = followers[row, span][rows.entry_count[row, span] > 0]
            rows.entry_id[row, block * small_store.SLOTS :][: len(ids)] = ids
            rows.entry_weight[row, block * small_store.SLOTS :][: len(ids)] = 255
    monkeypatch.setattr(small_store, "target_rows", lambda: (rows, {}))
    small_store.write_store(str(tmp_path / "store"))
    found = statistics.distributions(str(tmp_path / "store"), "default")
    assert found["stored weight of the label"].percentiles[1] == 1
    assert found["stored mass"].mean == 1


def test_a_sample_of_rows_is_spread_over_what_is_committed(store, monkeypatch):
    (Path(store) / "targets/default/ledger/00000001.json").unlink()
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
