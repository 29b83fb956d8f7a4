"""The ledger: one small record per committed shard, written after its data and never changed.

A shard counts only once its record exists, so a reader never meets half a shard and a writer that
was killed leaves nothing that is taken for data.
"""

from pydantic import ValidationError

from logit_store import layout
from schemas.errors import CorruptStoreError
from schemas.manifest import LedgerRecord, Manifest, ShardSpec, identity


def plan_shards(manifest: Manifest) -> list[ShardSpec]:
    """A spec for every shard, in order."""
    fingerprint = identity(manifest)
    rows, step = manifest.num_sequences, manifest.shard_sequences
    return [
        ShardSpec(
            manifest_fingerprint=fingerprint,
            index=index,
            first_row=index * step,
            stop_row=min((index + 1) * step, rows),
        )
        for index in range(manifest.num_shards)
    ]


def committed_indices(url: str, name: str | None) -> set[int]:
    """Indices of the shards that have a record; one listing, no reads."""
    keys = layout.list_keys(layout.open_kvstore(url, layout.group_path(name) + layout.LEDGER))
    return {int(key.removesuffix(".json")) for key in keys if _is_record_key(key)}


def pending(url: str, name: str | None) -> list[ShardSpec]:
    """The shards that have no record yet."""
    done = committed_indices(url, name)
    return [spec for spec in plan_shards(layout.read_manifest(url, name)) if spec.index not in done]


def read_record(url: str, name: str | None, index: int) -> LedgerRecord | None:
    """A shard's record, or None. Raises CorruptStoreError if it fails its own checksum."""
    path = layout.group_path(name)
    key = layout.ledger_key(index)
    raw = layout.read_bytes(layout.open_kvstore(url, path), key)
    if raw is None:
        return None
    try:
        record = LedgerRecord.model_validate_json(raw)
        # Byte for byte, so that not even white space can change unseen.
        intact = record.is_intact() and record_bytes(record) == raw
    except (ValidationError, UnicodeDecodeError):
        intact = False
    if not intact:
        raise CorruptStoreError(
            f"A ledger record must match its own checksum, but {path}{key} of {url} does not; "
            f"delete it and shard {index} is computed again."
        )
    return record


def read_committed(url: str, name: str | None) -> dict[int, LedgerRecord]:
    """Every committed shard's record by index."""
    records = {}
    for index in sorted(committed_indices(url, name)):
        record = read_record(url, name, index)
        if record is not None:
            records[index] = record
    return records


def commit(url: str, name: str | None, record: LedgerRecord) -> LedgerRecord:
    """Write a record; the caller has written and read back all its data before.

    If another writer was first, its record stands and is returned. Raises CorruptStoreError if it
    vouches for other bytes: then the two have overwritten each other's data.
    """
    sealed = record.sealed()
    index = sealed.spec.index
    store = layout.open_kvstore(url, layout.group_path(name))
    if layout.write_new(store, layout.ledger_key(index), record_bytes(sealed)) == record_bytes(
        sealed
    ):
        return sealed
    first = read_record(url, name, index)
    if first is None or _data(first) != _data(sealed):
        key = layout.group_path(name) + layout.ledger_key(index)
        raise CorruptStoreError(
            f"Writers of one shard must produce equal bytes, but two of shard {index} of {url} did "
            f"not; use one kind of hardware, delete {key} and run again."
        )
    return first


def _data(record: LedgerRecord) -> tuple[object, ...]:
    """What a record says of the stored bytes; sums may differ in the last bit between machines."""
    return record.spec, record.tokens_sha256, record.files


def record_bytes(record: LedgerRecord) -> bytes:
    """The exact bytes of a stored record."""
    return (record.canonical_json() + "\n").encode()


def _is_record_key(key: str) -> bool:
    return key.endswith(".json") and key.removesuffix(".json").isdigit()
