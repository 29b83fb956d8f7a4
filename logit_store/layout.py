"""Where everything of a store lies and how its arrays are encoded: keys, shapes, exact metadata.

Pure: nothing here reads or writes, and nothing decides what is written when.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from logit_store import codec, seals
from schemas.manifest import Manifest, TargetsManifest, TokensManifest

GROUP_KEY = "zarr.json"
LEDGER = "ledger/"
TARGETS = "targets/"
CORPUS = "corpus/"
DOCUMENTS = "documents/"
DEAD_LETTERS = "dead_letters/"
REPORT_KEY = "corpus_report.json"
COPIES = "copies/"
REPORTS = "reports/"
"""What runs say of themselves: no part of the format, and left out where stores are compared."""
"""Of all that a store cannot lose and that nothing else tells, for `retort repair`."""
MANIFEST_ATTRIBUTE = "retort"
CHECKSUM_ATTRIBUTE = "retort_sha256"


@dataclass(frozen=True)
class ArraySpec:
    """One array: name, dtype, shape, and how it is cut.

    Rows [N, width] are sharded by `shard_sequences`, one row to an inner chunk. A table [size]
    (`shard_sequences` None) is one chunk in one file.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    shard_sequences: int | None
    shuffle: bool

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of what a row holds, apart from a seal."""
        if self.name in seals.CARRIERS:
            return (self.shape[1] - seals.WIDTH,)
        return self.shape[1:]

    def metadata(self) -> dict[str, Any]:
        """The Zarr v3 metadata, complete: what `zarr.json` holds."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        size = self.dtype.itemsize
        blosc = {
            "name": "blosc",
            "configuration": {
                "cname": "zstd",
                "clevel": 5,
                "shuffle": "shuffle" if self.shuffle else "noshuffle",
                "typesize": size,
                "blocksize": 0,
            },
        }
        inner = [{"name": "bytes"} if size == 1 else little, blosc, {"name": "crc32c"}]
        if self.shard_sequences is None:
            chunk, codecs = list(self.shape), inner
        else:
            chunk = [self.shard_sequences, *self.shape[1:]]
            sharding = {
                "chunk_shape": [1, *self.shape[1:]],
                "codecs": inner,
                "index_codecs": [little, {"name": "crc32c"}],
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": codecs,
        }

    def shard_key(self, index: int) -> str:
        """Key of a shard, relative to the array's group; a table's only key is that of shard 0."""
        return f"{self.name}/c/{index}" + "/0" * (len(self.shape) - 1)


def row_arrays(manifest: Manifest) -> dict[str, ArraySpec]:
    """The arrays of a group whose rows are the store's sequences, by name, as seals take them."""
    length = manifest.sequence_tokens
    if isinstance(manifest, TokensManifest):
        # Token ids repeat as whole numbers; taken apart into bytes they compress less well.
        return _rows(
            manifest,
            [
                ("tokens", "int32", length, False),
                ("segment_ids", "uint16", length + seals.WIDTH, True),
            ],
        )
    slots = manifest.slots_per_sequence
    return _rows(
        manifest,
        [
            ("head_count", "uint16", length, True),
            ("head_points", codec.points_dtype(manifest.sampler.points), slots, True),
            ("entry_bucket", "uint16", slots, True),
            ("entry_offset", "uint8", codec.offset_bytes(slots), False),
            ("block_points", "uint16", manifest.blocks_per_sequence + seals.WIDTH, True),
            ("teacher_nats", "uint8", (2, length), False),
        ],
    )


def table_arrays(manifest: Manifest) -> dict[str, ArraySpec]:
    """The arrays of a group that every row is read by, by name."""
    if isinstance(manifest, TokensManifest):
        return {}
    vocab_size = manifest.teacher.vocab_size
    sizes = [
        ("vocabulary_order", "uint32", vocab_size + 1),
        ("bucket_bits", "uint8", manifest.vocabulary.num_buckets),
        ("sampling_order", "uint32", vocab_size),
    ]
    return {
        name: ArraySpec(name, np.dtype(dtype), (size,), None, dtype != "uint8")
        for name, dtype, size in sizes
    }


def arrays(manifest: Manifest) -> dict[str, ArraySpec]:
    """All arrays of the group that the manifest describes."""
    return row_arrays(manifest) | table_arrays(manifest)


def table_digest(values: np.ndarray) -> str:
    """SHA-256 of a table's values, little-endian."""
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<")).tobytes()).hexdigest()


def table_digests(manifest: TargetsManifest) -> dict[str, str]:
    """What the manifest says of each table."""
    found = manifest.vocabulary
    return {
        "vocabulary_order": found.order_sha256,
        "bucket_bits": found.buckets_sha256,
        "sampling_order": found.sampling_sha256,
    }


def _rows(
    manifest: Manifest, columns: list[tuple[str, str, int | tuple[int, int], bool]]
) -> dict[str, ArraySpec]:
    sequences = manifest.num_sequences
    shard = min(manifest.shard_sequences, sequences)
    return {
        name: ArraySpec(
            name,
            np.dtype(dtype),
            (sequences, *((width,) if isinstance(width, int) else width)),
            shard,
            shuffle and dtype != "uint8",
        )
        for name, dtype, width, shuffle in columns
    }


def predicted_mask(segment_ids: np.ndarray) -> np.ndarray:
    """bool [..., L]: True where the next token is of the same document, and so is a label."""
    mask = np.zeros(segment_ids.shape, bool)
    mask[..., :-1] = (segment_ids[..., :-1] == segment_ids[..., 1:]) & (segment_ids[..., :-1] != 0)
    return mask


def group_path(name: str | None) -> str:
    """Path inside the store of the root group (None) or of a set of targets."""
    return "" if name is None else f"{TARGETS}{name}/"


def manifest_copy_key(name: str | None) -> str:
    """Key of the second copy of a group's `zarr.json`; these name the sets of targets."""
    return f"{COPIES}tokens.json" if name is None else f"{COPIES}{TARGETS}{name}.json"


def table_copy_key(name: str, table: str) -> str:
    """Key of the second copy of a table's only chunk."""
    return f"{COPIES}{TARGETS}{name}/{table}"


def corpus_key(manifest: TokensManifest) -> str:
    """Key of the list of source files; named by its content, so that no two drivers share one."""
    return f"{CORPUS}{manifest.corpus.sha256}.json"


def documents_key(split: int) -> str:
    """Key of a split's records: uint32 tokens of each, then uint8 how often each is taken."""
    return f"{DOCUMENTS}{split:08d}.bin"


def dead_letters_key(split: int) -> str:
    """Key of a split's dead letters, a JSON document a line."""
    return f"{DEAD_LETTERS}{split:08d}.jsonl"


# A process asks for the same few again and again, and JSON with an indent is written in Python.
@lru_cache(maxsize=256)
def array_json(spec: ArraySpec) -> bytes:
    """The exact bytes of an array's zarr.json."""
    return json.dumps(spec.metadata(), indent=2, sort_keys=True).encode()


def group_json(manifest: Manifest | None) -> bytes:
    """The exact bytes of a group's zarr.json."""
    attributes = {}
    if manifest is not None:
        # Without the checksum a flipped digit of a seed or of a version would be another manifest.
        attributes = {
            MANIFEST_ATTRIBUTE: manifest.model_dump(mode="json"),
            CHECKSUM_ATTRIBUTE: manifest.fingerprint(),
        }
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False).encode()
