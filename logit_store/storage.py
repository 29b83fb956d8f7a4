"""Reads and writes a store's objects and arrays, by URL.

A store is a local folder, `gs://bucket/path` or `s3://bucket/path`; all access goes through
TensorStore's key-value stores, whose local driver writes a file whole, syncs it and renames it.
What the objects mean is not known here.
"""

import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any

import tensorstore as ts

from logit_store import remote
from logit_store.layout import GROUP_KEY, ArraySpec
from schemas.errors import ConfigError, CorruptStoreError, StorageError

LOCK_SUFFIX = ".__lock"
# An object is hashed in ranges of so many bytes, whatever its size.
_RANGE_BYTES = 16 * 2**20


def kvstore_spec(url: str, path: str = "") -> dict[str, Any]:
    """TensorStore's spec for `path` (empty, or ending in a slash) under a store's URL."""
    spec = remote.bucket_spec(url, path)
    if spec is not None:
        return spec
    if "://" in url:
        raise ConfigError(
            f"A store must be a local folder, gs://… or s3://…, but it is {url}; use one of these."
        )
    return {"driver": "file", "path": f"{Path(url).absolute()}/{path}"}


def open_kvstore(url: str, path: str = "") -> Any:
    """A tensorstore.KvStore on `path` (empty, or ending in a slash) under the store."""
    spec = kvstore_spec(url, path)
    if spec["driver"] != "file":
        remote.first_contact(url, kvstore_spec(url), GROUP_KEY)
    return ts.KvStore.open(spec, context=remote.CONTEXT).result()


def open_array(url: str, group: str, spec: ArraySpec) -> Any:
    """An existing array for reading and writing. Raises CorruptStoreError if its metadata differs.

    Every shard is stored even where it holds only the fill value: a missing file is then damage,
    and reading it fails instead of giving zeros, which are tokens and ids like any other.
    """
    try:
        return ts.open(
            {
                "driver": "zarr3",
                "kvstore": kvstore_spec(url, f"{group}{spec.name}/"),
                "metadata": spec.metadata(),
                "store_data_equal_to_fill_value": True,
                "fill_missing_data_reads": False,
            },
            context=remote.CONTEXT,
            open=True,
            create=False,
        ).result()
    except (ValueError, OSError) as error:
        remote.raise_if_unanswered(url, error)
        raise CorruptStoreError(
            f"Array metadata must be as the manifest implies, but {group}{spec.name}/zarr.json of "
            f"{url} is not: {error}"
        ) from error


def read_bytes(store: Any, key: str) -> bytes | None:
    """An object's bytes, or None if there is none."""
    with remote.explained(store):
        result = store.read(key).result()
    return result.value if result.state == "value" else None


def fault(store: Any, key: str, size_bytes: int, sha256: str) -> str | None:
    """How an object differs from its recorded size and SHA-256, or None.

    One range of it is in memory at a time, whatever its size.
    """
    found = hashlib.sha256()
    with remote.explained(store):
        for start in range(0, size_bytes, _RANGE_BYTES):
            part = _read_range(store, key, start, min(start + _RANGE_BYTES, size_bytes))
            if part is None:
                return "the file is missing or shorter than recorded"
            found.update(part)
        if size_bytes == 0 and read_bytes(store, key) is None:
            return "the file is missing or shorter than recorded"
        if _read_range(store, key, size_bytes, size_bytes + 1) is not None:
            return "the file is longer than recorded"
    return None if found.hexdigest() == sha256 else "its bytes differ from their SHA-256"


def _read_range(store: Any, key: str, start: int, stop: int) -> bytes | None:
    """Some bytes of an object, or None if it is missing or ends before them."""
    try:
        result = store.read(key, byte_range=slice(start, stop)).result()
    except ValueError as error:
        if str(error).startswith("OUT_OF_RANGE"):
            return None
        raise
    return result.value if result.state == "value" else None


def write_bytes(store: Any, key: str, data: bytes) -> None:
    """Write an object, atomically, over whatever is there."""
    with remote.explained(store):
        store.write(key, data).result()


def delete(store: Any, key: str) -> None:
    """Delete an object, if there is one."""
    with remote.explained(store):
        store.write(key, None).result()


def write_new(store: Any, key: str, data: bytes) -> bytes:
    """Write an object unless it exists, atomically; returns the bytes that are stored then."""
    with remote.explained(store):
        found = store.read(key).result()
        if found.state == "missing":
            store.write(key, data, if_equal=found.stamp.generation).result()
            found = store.read(key).result()
    if found.state == "missing":
        raise StorageError(
            f"An object that was written must be there, but {key} of {remote.place(store)} is not; "
            "check the bucket and run again."
        )
    return found.value


def sweep_locks(url: str) -> int:
    """Delete lock files that killed writers of a local store left; returns how many.

    A lock that a live writer holds is left alone. Cloud stores have none.
    """
    spec = kvstore_spec(url)
    swept = 0
    if spec["driver"] != "file":
        return swept
    # TensorStore hides its locks from listings, so the folder itself is searched.
    for path in sorted(Path(spec["path"]).rglob(f"*{LOCK_SUFFIX}")):
        swept += _sweep_lock(path)
    return swept


def _sweep_lock(path: Path) -> bool:
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        # Its writer finished: locks are renamed into place.
        return False
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A writer that finished in between may be followed by one with a lock of its own.
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return False
        except (BlockingIOError, PermissionError, FileNotFoundError):
            return False
        path.unlink()
    return True


def list_keys(store: Any) -> list[str]:
    """All keys under a key-value store, sorted."""
    with remote.explained(store):
        keys = store.list().result()
        if not keys:
            # The gcs driver takes a refused listing for an empty one; it refuses a read aloud.
            store.read(GROUP_KEY).result()
    return sorted(key.decode() for key in keys)
