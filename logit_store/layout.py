"""Where everything of a store lies and how its arrays are encoded; opens it by URL.

Nothing here decides what is written when. A store is a local folder, `gs://bucket/path` or
`s3://bucket/path`; all access goes through TensorStore's key-value stores, whose local driver
writes a file whole, syncs it and renames it.
"""

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from logit_store import remote
from logit_store.codec import code_dtype
from schemas.base import canonical_json
from schemas.errors import (
    ConfigError,
    CorruptStoreError,
    FormatVersionError,
    StorageError,
    StoreNotFoundError,
)
from schemas.manifest import (
    FORMAT_VERSION,
    Manifest,
    TargetsManifest,
    TokensManifest,
)

GROUP_KEY = "zarr.json"
LEDGER = "ledger/"
TARGETS = "targets/"
LOCK_SUFFIX = ".__lock"
UNUSED_ID = 0xFFFFFFFF
_ATTRIBUTE = "retort"
_CHECKSUM = "retort_sha256"


@dataclass(frozen=True)
class ArraySpec:
    """One array: name, dtype and shape; inner chunks are one sequence, shards are many."""

    name: str
    dtype: np.dtype
    shape: tuple[int, int]
    shard_sequences: int

    def metadata(self) -> dict[str, Any]:
        """The Zarr v3 metadata, complete: what `zarr.json` holds."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        size = self.dtype.itemsize
        blosc = {
            "name": "blosc",
            "configuration": {
                "cname": "zstd",
                "clevel": 5,
                "shuffle": "shuffle" if size > 1 else "noshuffle",
                "typesize": size,
                "blocksize": 0,
            },
        }
        plain = {"name": "bytes"} if size == 1 else little
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "fill_value": 0,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.shard_sequences, self.shape[1]]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [1, self.shape[1]],
                        "codecs": [plain, blosc, {"name": "crc32c"}],
                        "index_codecs": [little, {"name": "crc32c"}],
                        "index_location": "end",
                    },
                }
            ],
        }

    def shard_key(self, index: int) -> str:
        """Key of a shard, relative to the array's group."""
        return f"{self.name}/c/{index}/0"


def tokens_arrays(manifest: TokensManifest) -> dict[str, ArraySpec]:
    """The arrays of the root group by name."""
    return _arrays(
        manifest,
        {
            "tokens": (np.int32, manifest.sequence_tokens),
            "segment_ids": (np.uint16, manifest.sequence_tokens),
        },
    )


def targets_arrays(manifest: TargetsManifest) -> dict[str, ArraySpec]:
    """The arrays of a targets group by name."""
    length, entries = manifest.sequence_tokens, manifest.entries_per_sequence
    return _arrays(
        manifest,
        {
            "entry_count": (np.uint16, length),
            "entry_id": (np.uint32, entries),
            "entry_weight": (code_dtype(manifest.weight_code), entries),
            "weight_floor": (np.float32, manifest.blocks_per_sequence),
            "teacher_entropy": (np.float16, length),
            "label_logprob": (np.float16, length),
        },
    )


def arrays(manifest: Manifest) -> dict[str, ArraySpec]:
    """The arrays of whichever group the manifest describes."""
    if isinstance(manifest, TokensManifest):
        return tokens_arrays(manifest)
    return targets_arrays(manifest)


def _arrays(manifest: Manifest, columns: dict[str, tuple[Any, int]]) -> dict[str, ArraySpec]:
    return {
        name: ArraySpec(
            name,
            np.dtype(dtype),
            (manifest.num_sequences, width),
            min(manifest.shard_sequences, manifest.num_sequences),
        )
        for name, (dtype, width) in columns.items()
    }


def predicted_mask(segment_ids: np.ndarray) -> np.ndarray:
    """bool [..., L]: True where the next token is of the same document, and so is a label."""
    mask = np.zeros(segment_ids.shape, bool)
    mask[..., :-1] = (segment_ids[..., :-1] == segment_ids[..., 1:]) & (segment_ids[..., :-1] != 0)
    return mask


def group_path(name: str | None) -> str:
    """Path inside the store of the root group (None) or of a set of targets."""
    return "" if name is None else f"{TARGETS}{name}/"


def ledger_key(index: int) -> str:
    return f"{LEDGER}{index:08d}.json"


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


def array_json(spec: ArraySpec) -> bytes:
    """The exact bytes of an array's zarr.json."""
    return json.dumps(spec.metadata(), indent=2, sort_keys=True).encode()


def group_json(manifest: Manifest | None) -> bytes:
    """The exact bytes of a group's zarr.json."""
    attributes = {}
    if manifest is not None:
        # Without the checksum a flipped digit of a seed or of a version would be another manifest.
        attributes = {
            _ATTRIBUTE: manifest.model_dump(mode="json"),
            _CHECKSUM: manifest.fingerprint(),
        }
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False).encode()


def read_manifest(url: str, name: str | None) -> Manifest:
    """The manifest of the tokens (name None) or of a set of targets.

    Raises StoreNotFoundError, FormatVersionError or CorruptStoreError.
    """
    path = group_path(name)
    raw = read_bytes(open_kvstore(url, path), GROUP_KEY)
    what = "tokens" if name is None else f"targets '{name}'"
    if raw is None:
        known = "" if name is None else f"; it has {', '.join(list_targets(url)) or 'none'}"
        raise StoreNotFoundError(
            f"A store must have been created before it is read, but {url} holds no {what}{known}; "
            f"check the path or run `retort {'tokenize' if name is None else 'dump'}` first."
        )
    where = f"{url}: {path}{GROUP_KEY}"
    try:
        attributes = json.loads(raw)["attributes"]
        document = attributes[_ATTRIBUTE]
        version = document["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(
            f"A group's zarr.json must hold a retort manifest, but {where} does not ({error!r}); "
            "restore it or make the store again."
        ) from error
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"This retort reads format version {FORMAT_VERSION}, but {where} is of version "
            f"{version}; upgrade retort or use the version that wrote it."
        )
    if attributes.get(_CHECKSUM) != hashlib.sha256(canonical_json(document).encode()).hexdigest():
        raise CorruptStoreError(
            f"A manifest must match its {_CHECKSUM}, but that of {where} does not; restore the "
            "file or make the store again."
        )
    kind = TokensManifest if name is None else TargetsManifest
    try:
        return kind.parse(document, where)
    except ConfigError as error:
        raise CorruptStoreError(f"A stored manifest must be valid, but {error}") from error


def read_bytes(store: Any, key: str) -> bytes | None:
    """An object's bytes, or None if there is none."""
    with remote.explained(store):
        result = store.read(key).result()
    return result.value if result.state == "value" else None


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


def list_targets(url: str) -> list[str]:
    """Names of the sets of targets that have a manifest, sorted."""
    suffix = f"/{GROUP_KEY}"
    keys = list_keys(open_kvstore(url, TARGETS))
    return [
        key.removesuffix(suffix) for key in keys if key.count("/") == 1 and key.endswith(suffix)
    ]
