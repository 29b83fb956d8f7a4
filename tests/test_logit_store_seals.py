"""Seals: rows in another's place are refused, though all of their checksums hold."""

import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_store
import zarr

from logit_store import layout, reader, seals
from logit_store.verify import verify
from schemas.errors import CorruptStoreError

DATA = [
    layout.group_path(name) + spec.name
    for name, manifest in (
        (None, small_store.tokens_manifest()),
        ("default", small_store.targets_manifest()),
    )
    for spec in layout.row_arrays(manifest).values()
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sealed") / "store"
    small_store.write_store(str(path))
    return path


@pytest.fixture
def store(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def shard_file(store: Path, array: str, shard: int) -> Path:
    folder = store / array / "c" / str(shard)
    return folder / "0" / "0" if array.endswith("teacher_nats") else folder / "0"


def exchange(store: Path, array: str, one: int, other: int) -> None:
    first, second = shard_file(store, array, one), shard_file(store, array, other)
    raw = first.read_bytes()
    assert raw != second.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(raw)


def crc32c(data: bytes) -> int:
    """Bit by bit, as RFC 3720 has it: the Castagnoli polynomial, reflected."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def test_seals_are_as_the_format_says(store):
    """Of plain zarr arrays, by another implementation of the checksum."""
    assert crc32c(b"123456789") == 0xE3069283
    group = zarr.open_group(str(store), mode="r")
    for row in range(small_store.ROWS):
        start = row
        for carrier, names in (
            ("segment_ids", DATA[:2]),
            ("targets/default/block_points", DATA[2:]),
        ):
            raw = start.to_bytes(8, "little")
            for name in names:
                values = group[name][row]
                raw += (values[:-2] if name == carrier else values).tobytes()
            start = crc32c(raw)
            low, high = group[carrier][row][-2:].tolist()
            assert low + (high << 16) == start


@pytest.mark.parametrize("array", DATA)
@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 0)])
def test_a_file_in_another_shards_place_is_refused(store, array, one, other):
    """Copied over the other's or exchanged with it: the shards with others' rows are named."""
    targets = reader.TargetsReader(str(store), "default")
    before = targets.rows(range(small_store.ROWS))
    first, second = shard_file(store, array, one), shard_file(store, array, other)
    raw = second.read_bytes()
    second.write_bytes(first.read_bytes())
    for exchanged in (False, True):
        if exchanged:
            first.write_bytes(raw)
        bad = sorted({one, other}) if exchanged else [other]
        with pytest.raises(CorruptStoreError, match=re.escape(f"in shards {bad}")) as found:
            targets.rows(range(small_store.ROWS))
        assert array in str(found.value)
        assert {p.shard for p in verify(str(store)).problems} == set(bad)
        kept = [row for row in range(small_store.ROWS) if row // 2 not in bad]
        after = targets.rows(kept)
        np.testing.assert_array_equal(after.entry_id, before.entry_id[kept])


@pytest.mark.parametrize("group", [slice(0, 2), slice(2, None)], ids=["tokens", "targets"])
def test_whole_shards_in_each_others_place_are_refused(store, group):
    """All arrays of a group at once, which fit each other and not the place."""
    for array in DATA[group]:
        exchange(store, array, 0, 1)
    with pytest.raises(CorruptStoreError, match=r"rows \[0, 3\] .* in shards \[0, 1\]"):
        reader.TargetsReader(str(store), "default").rows([3, 4, 0])


def test_tokens_alone_are_refused_too(store):
    for array in DATA[:2]:
        exchange(store, array, 0, 1)
    tokens = reader.TokensReader(str(store))
    with pytest.raises(CorruptStoreError, match=r"rows \[1\] .* in shards \[0\]"):
        tokens.rows([1, 4])


def test_every_value_of_a_row_counts():
    columns = small_store.target_rows().columns()
    start = np.arange(small_store.ROWS)
    before = seals.seal(start, columns)
    assert len(set(before.tolist())) == small_store.ROWS
    for name, values in columns.items():
        flat = values[2].reshape(-1)
        for place in {0, len(flat) // 2, len(flat) - 1}:
            flat[place] ^= 1
            assert (seals.seal(start, columns) != before).tolist() == [False, False, True] + [
                False
            ] * 2, name
            flat[place] ^= 1
    assert (seals.seal(start + 1, columns) != before).all()


def test_seals_do_not_depend_on_how_arrays_lie_in_memory():
    columns = small_store.target_rows().columns()
    start = np.arange(small_store.ROWS)
    before = seals.seal(start, columns)
    big = {name: values.astype(values.dtype.newbyteorder(">")) for name, values in columns.items()}
    strided = {name: np.repeat(values, 2, axis=-1)[..., ::2] for name, values in columns.items()}
    for other, there in itertools.product((big, strided), (start, start.astype(np.uint32))):
        np.testing.assert_array_equal(seals.seal(there, other), before)
    kept, carried = seals.detach(seals.attach(columns, before))
    np.testing.assert_array_equal(carried, before)
    for name, values in columns.items():
        np.testing.assert_array_equal(kept[name], values)
