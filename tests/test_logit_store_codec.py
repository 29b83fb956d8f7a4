"""The entry code: round trips, canonical form, faults without a crash, sizes, nats."""

import numpy as np
import pytest
import small_store
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_store import buffers, codec
from logit_store.codec import RowEntries, Vocabulary
from logit_store.layout import predicted_mask
from schemas.errors import CorruptStoreError

LENGTH, BLOCK, SLOTS, POINTS, VOCAB = 12, 4, 5, 7, 200


def vocabulary(seed: int = 0, size: int = VOCAB, slots: int = SLOTS) -> Vocabulary:
    random = np.random.default_rng(seed)
    counts = random.permutation((1e6 / np.arange(1, size + 1) ** 1.3).astype(np.int64))
    return codec.make_vocabulary(counts, slots)


@st.composite
def rows(draw: st.DrawFn) -> tuple[np.ndarray, RowEntries, np.ndarray, int]:
    """predicted [L], entries that fill it, block_points, and the most points."""
    points = draw(st.sampled_from([1, POINTS, 257, 300, 65535]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    predicted = random.random(LENGTH) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    block_points = random.integers(max(1, points // 2), points + 1, LENGTH // BLOCK)
    position, ids, counts = [], [], []
    for block in range(LENGTH // BLOCK):
        room = BLOCK * SLOTS
        mine = [t for t in range(block * BLOCK, (block + 1) * BLOCK) if predicted[t]]
        for index, t in enumerate(mine):
            total = int(block_points[block])
            most = min(total, room - (len(mine) - index - 1), 12)
            number = int(random.integers(1, most + 1))
            room -= number
            cuts = np.sort(random.choice(np.arange(1, total), number - 1, replace=False))
            position += [t] * number
            # The rest, id V, is an id like any other to the code.
            ids += random.choice(VOCAB + 1, number, replace=False).tolist()
            counts += np.diff(np.concatenate([[0], cuts, [total]])).tolist()
    order = random.permutation(len(position))
    entries = RowEntries(*(np.array(x, np.int64)[order] for x in (position, ids, counts)))
    return predicted, entries, block_points.astype(np.uint16), points


def encode(
    tables: Vocabulary, entries: RowEntries, block_points: np.ndarray, points: int
) -> dict[str, np.ndarray]:
    columns = codec.encode_row(tables, entries, LENGTH, LENGTH * SLOTS, points)
    return {name: x[None] for name, x in columns.items()} | {"block_points": block_points[None]}


def as_dict(tables: Vocabulary, entries: codec.Entries, row: int = 0) -> dict[tuple, float]:
    """(position, id) → weight, with the order and the unused slots checked on the way."""
    position = codec.entry_positions(entries.head_count, entries.tail_count, BLOCK, BLOCK * SLOTS)
    found, ids = {}, entries.entry_id[row]
    for block in range(LENGTH // BLOCK):
        span = slice(block * BLOCK * SLOTS, (block + 1) * BLOCK * SLOTS)
        tokens = slice(block * BLOCK, (block + 1) * BLOCK)
        heads = int(entries.head_count[row, tokens].sum())
        used = heads + int(entries.tail_count[row, tokens].sum())
        keys = [(position[row, span][i], tables.rank[ids[span][i]]) for i in range(used)]
        assert keys[:heads] == sorted(keys[:heads])
        assert keys[heads:] == sorted(keys[heads:])
        assert (ids[span][used:] == -1).all()
        assert (entries.entry_weight[row, span][used:] == 0).all()
        assert (position[row, span][used:] == (block + 1) * BLOCK - 1).all()
        for i in range(used):
            key = (int(position[row, span][i]), int(ids[span][i]))
            assert key not in found
            found[key] = float(entries.entry_weight[row, span][i])
    return found


@settings(max_examples=200, deadline=None)
@given(rows())
def test_entries_come_back_with_their_points(row):
    predicted, entries, block_points, points = row
    tables = vocabulary()
    columns = encode(tables, entries, block_points, points)
    decoded = codec.decode_rows(tables, predicted[None], columns, BLOCK, BLOCK * SLOTS)
    per_position = np.repeat(block_points, BLOCK)
    wanted = {
        (int(t), int(i)): np.float32(p) * (np.float32(1) / np.float32(per_position[t]))
        for t, i, p in zip(entries.position, entries.id, entries.points, strict=True)
    }
    assert as_dict(tables, decoded) == pytest.approx(wanted, rel=1e-7)
    checked = codec.check_rows(tables, predicted[None], columns, BLOCK, BLOCK * SLOTS, 0)
    np.testing.assert_array_equal(checked.entry_id, decoded.entry_id)


def test_many_rows_decode_as_each_alone():
    tables = small_store.tables().vocabulary
    stored = small_store.target_rows()
    predicted = predicted_mask(small_store.token_rows()[1])
    args = (small_store.BLOCK, small_store.SLOTS)
    together = codec.decode_rows(tables, predicted, stored.columns(), *args)
    for row in range(small_store.ROWS):
        one = slice(row, row + 1)
        alone = codec.decode_rows(tables, predicted[one], stored.part(one).columns(), *args)
        for name in ("entry_id", "entry_weight", "head_count", "tail_count"):
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(together, name)[row])


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_columns_of_junk_give_entries_or_an_error(data):
    """Whatever a damaged row holds, decoding ends, in bounds, and says so."""
    tables = vocabulary()
    predicted, entries, block_points, points = data.draw(rows())
    columns = encode(tables, entries, block_points, points)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    for name in data.draw(st.sets(st.sampled_from(sorted(columns)), min_size=1)):
        x = columns[name]
        some = random.random(x.shape) < data.draw(st.sampled_from([0.02, 0.3, 1.0]))
        most = data.draw(st.sampled_from([2, 40, np.iinfo(x.dtype).max + 1]))
        x[some] = random.integers(0, most, x.shape)[some].astype(x.dtype)
    try:
        decoded = codec.decode_rows(tables, predicted[None], columns, BLOCK, BLOCK * SLOTS)
    except CorruptStoreError:
        return
    assert ((decoded.entry_id >= -1) & (decoded.entry_id <= VOCAB)).all()
    assert (decoded.entry_weight >= 0).all()
    used = decoded.head_count.sum(dtype=np.int64) + decoded.tail_count.sum(dtype=np.int64)
    assert (decoded.entry_id >= 0).sum() == used


def full_row() -> tuple[Vocabulary, np.ndarray, dict[str, np.ndarray]]:
    """Two entries of 4 + 3 points and one of 7 points at alternate positions."""
    position = np.repeat(np.arange(LENGTH), 2)
    ids = np.tile([10, 150, 3, 199], LENGTH // 2)
    points = np.tile([4, 3, 6, 1], LENGTH // 2)
    tables = vocabulary()
    block_points = np.full(LENGTH // BLOCK, POINTS, np.uint16)
    columns = encode(tables, RowEntries(position, ids, points), block_points, POINTS)
    return tables, np.ones((1, LENGTH), bool), columns


def _too_many(columns):
    columns["head_count"][0, 5] = 60_000


def _points_of_others(columns):
    columns["head_points"][0, 0] = 9


def _a_bucket_beyond(columns):
    columns["entry_bucket"][0, 1] = 60_000


def _more_points_than_there_are(columns):
    columns["block_points"][0, 1] = 60_000


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_too_many, "more entries than slots"),
        (_points_of_others, "more points than the position"),
        (_a_bucket_beyond, "beyond the vocabulary"),
        (_more_points_than_there_are, "more entries than slots"),
    ],
)
def test_what_breaks_a_rule_is_named(change, fault):
    tables, predicted, columns = full_row()
    codec.decode_rows(tables, predicted, columns, BLOCK, BLOCK * SLOTS)
    change(columns)
    with pytest.raises(CorruptStoreError, match=f"in row 0 .*{fault}"):
        codec.decode_rows(tables, predicted, columns, BLOCK, BLOCK * SLOTS)


def test_a_list_that_does_not_increase_is_refused():
    tables, predicted, columns = full_row()
    codec.check_rows(tables, predicted, columns, BLOCK, BLOCK * SLOTS, 7)
    columns["entry_bucket"][0, 1] = 0
    columns["entry_offset"][:] = 0
    with pytest.raises(ValueError, match=r"increase strictly in rank, .* but row 7"):
        codec.check_rows(tables, predicted, columns, BLOCK, BLOCK * SLOTS, 7)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_offsets_that_a_reader_would_run_beyond_are_named(length):
    tables, predicted, columns = full_row()
    columns["entry_offset"] = columns["entry_offset"][:, :length]
    with pytest.raises(CorruptStoreError, match="more offset bits than there are"):
        codec.decode_rows(tables, predicted, columns, BLOCK, BLOCK * SLOTS)


def test_offset_bits_that_end_too_soon_are_named():
    tables, predicted, columns = full_row()
    columns["entry_offset"] = columns["entry_offset"][:, :3]
    with pytest.raises(CorruptStoreError, match="more offset bits than there are"):
        codec.decode_rows(tables, predicted, columns, BLOCK, BLOCK * SLOTS)


@pytest.mark.parametrize("name", ["head_points", "entry_bucket", "entry_offset"])
def test_rows_that_differ_from_their_canonical_form_are_refused(name):
    """What a decoder never looks at must be 0 all the same: equal rows, equal bytes."""
    tables, predicted, columns = full_row()
    columns[name][0, -3 if name == "entry_offset" else -1] = 1
    codec.decode_rows(tables, predicted, columns, BLOCK, BLOCK * SLOTS)
    with pytest.raises(ValueError, match="Unused slots and bits hold 0, but row 40"):
        codec.check_rows(tables, predicted, columns, BLOCK, BLOCK * SLOTS, 40)


def test_the_bits_after_the_last_are_checked():
    tables, predicted, columns = full_row()
    extent = int((columns["entry_offset"][0] != 0).nonzero()[0].max())
    columns["entry_offset"][0, extent] |= 0x80
    with pytest.raises(ValueError, match="Unused slots and bits hold 0"):
        codec.check_rows(tables, predicted, columns, BLOCK, BLOCK * SLOTS, 0)


def test_an_id_among_heads_and_tails_is_refused():
    tables = vocabulary()
    entries = RowEntries(np.array([3, 3]), np.array([8, 8]), np.array([POINTS - 1, 1]))
    block_points = np.full(LENGTH // BLOCK, POINTS, np.uint16)
    columns = encode(tables, entries, block_points, POINTS)
    predicted = np.arange(LENGTH)[None] == 3
    codec.decode_rows(tables, predicted, columns, BLOCK, BLOCK * SLOTS)
    with pytest.raises(ValueError, match="one entry of each, but row 2"):
        codec.check_rows(tables, predicted, columns, BLOCK, BLOCK * SLOTS, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 128, 1000, 70_000])
def test_buckets_hold_every_id_once_and_are_of_about_equal_use(size):
    counts = (1e7 / np.arange(1, size + 1) ** 1.1).astype(np.int64)
    tables = codec.make_vocabulary(counts, 12)
    assert tables.fault(size) is None
    assert tables.bucket_bits.max() <= codec.MOST_BUCKET_BITS
    np.testing.assert_array_equal(tables.order[tables.rank], np.arange(size + 1))
    shares = np.add.reduceat((counts + 0.3) / (counts + 0.3).sum(), tables.bucket_first[:-2])
    several = tables.bucket_bits[:-1] > 0
    assert (shares[several] <= 1 / (20 * 12)).all()
    if size >= 1000:
        # All but the last few, which are powers of two down to what is left.
        assert np.median(shares[several]) > 1 / (20 * 12) / 4


def test_common_ids_come_first():
    tables = codec.make_vocabulary(np.array([5, 900, 0, 31, 900]), 4)
    assert tables.order.tolist() == [1, 4, 3, 0, 2, 5]


@pytest.mark.parametrize(
    ("order", "bits", "fault"),
    [
        ([0, 1, 1], [0, 0, 0], "not a permutation"),
        ([0, 1, 3], [0, 0, 0], "not a permutation"),
        ([0, 1, 2], [0, 0], "do not hold as many ids"),
        ([0, 1, 2], [0, 2], "do not hold as many ids"),
        ([0, 1, 2], [16], "more than 15 bits"),
        ([0, 1, 2], [], "more than 15 bits"),
    ],
)
def test_tables_that_do_not_fit_each_other_are_named(order, bits, fault):
    found = Vocabulary(np.array(order, np.uint32), np.array(bits, np.uint8)).fault(2)
    assert found is not None
    assert fault in found


def test_offset_bits_are_counted():
    tables, _, columns = full_row()
    ids = np.array([10, 150, 3, 199])
    wanted = sum(int(tables.bucket_bits[_bucket(tables, i)]) for i in ids)
    assert codec.offset_bits(tables, ids) == wanted > 0
    used = np.unpackbits(columns["entry_offset"][0], bitorder="little").nonzero()[0].max() + 1
    assert used <= wanted * LENGTH // 2


def _bucket(tables: Vocabulary, id_: int) -> int:
    return int(np.searchsorted(tables.bucket_first, tables.rank[id_], side="right")) - 1


def test_nats_are_rounded_without_bias_and_within_a_step():
    random = np.random.default_rng(0)
    values = np.concatenate([[0.0, 1e-4, 0.03], random.uniform(0, 60, 40)])
    draws = np.stack(
        [
            codec.decode_nats(codec.encode_nats(values, random.random(values.shape)))
            for _ in range(20_000)
        ]
    ).astype(np.float64)
    step = np.sqrt(values) / 16 + 1 / 1024
    assert (np.abs(draws - values) <= step + 1e-6).all()
    error = np.maximum(draws.std(axis=0) / len(draws) ** 0.5, 1e-7)
    assert (np.abs(draws.mean(axis=0) - values) < 5 * error).all()
    assert draws[:, 0].max() == 0


def test_nats_beyond_the_last_code_are_the_last():
    codes = codec.encode_nats(np.array([63.5, 70.0, 1e9]), np.full(3, 0.99))
    assert codes.tolist() == [255, 255, 255]
    assert codec.decode_nats(codes).tolist() == [np.float32(codec.LARGEST_NATS)] * 3


def test_memory_is_used_again_only_when_no_view_is_left():
    shape, dtype = (700, 1001), np.float32
    first = buffers.empty(shape, dtype)
    address = first.ctypes.data
    view = first[3:5]
    view[:] = 7
    del first
    other = buffers.empty(shape, dtype)
    assert other.ctypes.data != address
    other[:] = 1
    assert (view == 7).all()
    del view
    again = buffers.empty((1001, 700), np.int32)
    assert again.ctypes.data == address
    assert (other == 1).all()
