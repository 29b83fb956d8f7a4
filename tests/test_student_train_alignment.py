"""Targets that are shifted against their tokens are refused before the first step."""

from pathlib import Path

import numpy as np
import pytest
from student_store import chain, make_store

from schemas.errors import AlignmentError
from schemas.manifest import SamplerSpec
from student_train.alignment import ShardAlignment, check_alignment, neighbour_weights
from student_train.batch import Batch
from student_train.data import StoreSource

ROWS = np.arange(12)


def read(store: Path) -> tuple[Batch, SamplerSpec]:
    source = StoreSource(str(store), "default")
    assert source.targets_manifest is not None
    return source.read(ROWS), source.targets_manifest.sampler


def test_the_next_token_gets_the_weight_that_the_chain_gives_it(tmp_path: Path) -> None:
    batch, sampler = read(make_store(tmp_path / "store"))
    found = check_alignment(batch, sampler, "here")
    successors, probabilities = chain()
    given = []
    for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
        for t in range(len(tokens) - 2):
            if segments[t] == segments[t + 1] == segments[t + 2] != 0:
                hit = successors[tokens[t]] == tokens[t + 1]
                given.append(probabilities[tokens[t]][hit].sum())
    assert found.next == pytest.approx(np.mean(given), rel=1e-3)
    assert found.own == 0
    assert found.after_next < 0.2 * found.next


@pytest.mark.parametrize("roll", [-1, 1])
def test_rows_rolled_by_one_are_refused(tmp_path: Path, roll: int) -> None:
    batch, sampler = read(make_store(tmp_path / "store", roll=roll))
    found = neighbour_weights(batch, sampler)
    message = (
        rf"those of 'x' put {found.own:.4f} on the token itself, {found.next:.4f} on the next and "
        rf"{found.after_next:.4f} on the one after"
    )
    with pytest.raises(AlignmentError, match=message):
        check_alignment(batch, sampler, "'x'")
    assert (found.own, found.after_next)[roll < 0] > 0.3 > found.next


def test_targets_of_other_rows_are_refused(tmp_path: Path) -> None:
    batch, sampler = read(make_store(tmp_path / "store"))
    silent = batch._replace(entry_weight=np.zeros_like(batch.entry_weight))
    with pytest.raises(AlignmentError, match=r"0\.0000 on the next"):
        check_alignment(silent, sampler, "here")


@pytest.mark.parametrize("roll", [-1, 1])
def test_one_misaligned_shard_among_many_is_named(tmp_path: Path, roll: int) -> None:
    """Means over all rows would pass: four of twelve rows are misplaced."""
    good, sampler = read(make_store(tmp_path / "good"))
    bad, _ = read(make_store(tmp_path / "bad", roll=roll))
    misplaced = ROWS // 4 == 1
    batch = Batch(
        *(
            np.where(misplaced.reshape(-1, *[1] * (b.ndim - 1)), b, g)
            for g, b in zip(map(np.asarray, good), map(np.asarray, bad), strict=True)
        )
    )
    check_alignment(batch, sampler, "here")
    shards = ShardAlignment(sampler, 4, "'x'")
    with pytest.raises(AlignmentError, match=r"those of shard 1 of 'x' put 0\.\d+ on the token"):
        shards.check(ROWS, batch)
    aligned = ShardAlignment(sampler, 4, "'x'")
    aligned.check(ROWS, good)
    # Vouched for once, a shard is not looked at again.
    assert aligned._settled == set(range(3))
    aligned.check(ROWS, batch)


def test_a_teacher_that_knows_nothing_accuses_no_shard(tmp_path: Path) -> None:
    batch, sampler = read(make_store(tmp_path / "store"))
    random = np.random.default_rng(0)
    shards = ShardAlignment(sampler, 4, "'x'")
    for _ in range(300):
        ids = random.integers(0, 61, batch.entry_id.shape).astype(np.int32)
        shards.check(ROWS, batch._replace(entry_id=np.where(batch.entry_id < 0, -1, ids)))
    assert shards._settled == set()
