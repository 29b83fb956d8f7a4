"""Figures about a store: means from its ledger alone, distributions from a sample of its rows."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from logit_store import layout, ledger, reader

_PERCENTILES = (1, 10, 50, 90, 99, 100)


@dataclass(frozen=True)
class Summary:
    """A set of targets, or the tokens alone, as its ledger sums it up; sizes are bytes on disk.

    Bytes per token count everything: tokens, targets, metadata and ledger, over the tokens that are
    not padding.
    """

    sequences: int
    shards: int
    committed_shards: int
    tokens: int
    predicted_tokens: int
    entries_per_token: float
    max_entries: int
    mean_mass: float
    mean_entropy_nats: float
    mean_label_logprob_nats: float
    array_bytes: dict[str, int]
    metadata_bytes: int
    bytes_per_token: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summary(url: str, name: str | None) -> Summary:
    """Sum up the tokens (name None) or the tokens and one set of targets, from ledgers alone."""
    manifest = layout.read_manifest(url, name)
    records = ledger.read_committed(url, name)
    groups = [None] if name is None else [None, name]
    array_bytes: dict[str, int] = {}
    metadata = 0
    tokens = 0
    for group in groups:
        group_records = records if group == name else ledger.read_committed(url, group)
        group_manifest = layout.read_manifest(url, group)
        metadata += len(layout.group_json(group_manifest))
        metadata += sum(len(layout.array_json(a)) for a in layout.arrays(group_manifest).values())
        for record in group_records.values():
            metadata += len(ledger.record_bytes(record))
            for file in record.files:
                array = file.key.split("/")[0]
                array_bytes[array] = array_bytes.get(array, 0) + file.size_bytes
        if group is None:
            tokens = sum(record.statistics.tokens for record in group_records.values())
    statistics = [record.statistics for record in records.values()]
    predicted = sum(s.predicted_tokens for s in statistics)
    covered = sum(s.tokens for s in statistics)

    def mean(total: float, count: int) -> float:
        return total / count if count else 0.0

    return Summary(
        sequences=manifest.num_sequences,
        shards=manifest.num_shards,
        committed_shards=len(records),
        tokens=tokens,
        predicted_tokens=predicted,
        entries_per_token=mean(sum(s.entries for s in statistics), covered),
        max_entries=max((s.max_entries for s in statistics), default=0),
        mean_mass=mean(sum(s.mass_sum for s in statistics), predicted),
        mean_entropy_nats=mean(sum(s.entropy_sum_nats for s in statistics), predicted),
        mean_label_logprob_nats=mean(sum(s.label_logprob_sum_nats for s in statistics), predicted),
        array_bytes=array_bytes,
        metadata_bytes=metadata,
        bytes_per_token=mean(sum(array_bytes.values()) + metadata, tokens),
    )


@dataclass(frozen=True)
class Distribution:
    """Percentiles and mean of one quantity over predicted positions."""

    mean: float
    percentiles: dict[int, float]


def distributions(url: str, name: str, max_sequences: int = 1024) -> dict[str, Distribution]:
    """Distributions over committed rows, evenly thinned to `max_sequences`.

    entries per token; stored mass; teacher entropy and label log-probability in nats; weight of the
    stored label (0 where the label was not sampled).
    """
    targets = reader.TargetsReader(url, name)
    step = targets.manifest.shard_sequences
    rows = np.concatenate(
        [
            np.arange(i * step, min((i + 1) * step, targets.manifest.num_sequences))
            for i in sorted(targets.committed)
        ]
        or [np.zeros(0, np.int64)]
    )
    if rows.size == 0:
        return {}
    rows = rows[np.unique(np.linspace(0, rows.size - 1, min(max_sequences, rows.size)).astype(int))]
    columns: dict[str, list[np.ndarray]] = {}
    for start in range(0, rows.size, 64):
        for key, values in _columns(targets.rows(rows[start : start + 64])).items():
            columns.setdefault(key, []).append(values)
    found = {}
    for key, parts in columns.items():
        values = np.concatenate(parts)
        if values.size:
            found[key] = Distribution(
                float(values.mean()),
                {p: float(np.percentile(values, p)) for p in _PERCENTILES},
            )
    return found


def _columns(batch: reader.TargetBatch) -> dict[str, np.ndarray]:
    rows, length = batch.tokens.shape
    predicted = layout.predicted_mask(batch.segment_ids)
    flat = (batch.entry_position + np.arange(rows)[:, None] * length).reshape(-1)
    weights = batch.entry_weight.reshape(-1)
    labels = np.roll(batch.tokens, -1, axis=1).reshape(-1)
    is_label = batch.entry_id.reshape(-1) == labels[flat]

    def per_position(values: np.ndarray) -> np.ndarray:
        return np.bincount(flat, values, minlength=rows * length).reshape(rows, length)[predicted]

    return {
        "entries per token": batch.entry_count[predicted],
        "stored mass": per_position(weights),
        "stored weight of the label": per_position(weights * is_label),
        "teacher entropy (nats)": batch.teacher_entropy[predicted],
        "label log-probability (nats)": batch.label_logprob[predicted],
    }
