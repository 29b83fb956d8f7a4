"""Whether stored targets are a teacher's: some rows computed again and held against the store.

On the hardware that made them, rows come out the same to the bit; elsewhere they agree as far as
the teacher agrees with itself. Both are looked at, and the teacher's own difference between two
runs in different batches, as a control.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from logit_store import codec
from logit_store.layout import predicted_mask
from logit_store.reader import TargetBatch, TargetsReader, read_table
from logit_store.rows import decode_entries
from schemas.manifest import TargetsManifest
from teacher_dump.targets import begin_rows
from teacher_dump.teacher import Teacher

# Nats that a row's means may be off whatever the control says, without their sign and as a KL: a
# bfloat16 teacher differs by less from itself on other hardware, another teacher by more. Assumed.
_ALLOWED_NATS = 0.1
_ALLOWED_KL_NATS = 0.02
_TIMES_CONTROL = 4.0
_DEVIATIONS = 5.0
_TINY = 1e-12


@dataclass(frozen=True)
class RowAudit:
    """One row against its teacher; means over its predicted positions, in nats where not said.

    changed: positions whose entries or nats are not the same as computed again. kl: an unbiased
    estimate, from the stored sample, of the KL from what was sampled to the teacher now, and its
    standard error. entropy_error, label_error: difference to the stored numbers. stored_mass:
    weight of the stored ids; fresh_mass: what the teacher gives these ids now. control_*: the same
    between two runs of the teacher. fault: why it is not the teacher's.
    """

    row: int
    shard: int
    predicted: int
    changed: int
    kl: float
    kl_error: float
    entropy_error: float
    label_error: float
    stored_mass: float
    fresh_mass: float
    control_changed: int
    control_kl: float
    control_error: float
    fault: str | None = None


@dataclass(frozen=True)
class Audit:
    """What was found of a set of targets."""

    targets: str
    teacher: str
    same_weights: bool
    """Whether the folder's files are those that the manifest names; what they hold decides."""
    seed: int
    rows: list[RowAudit] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(row.fault for row in self.rows)

    @property
    def identical(self) -> int:
        """Rows that came out the same to the bit."""
        return sum(row.changed == 0 for row in self.rows)

    def mean(self, name: str) -> float:
        """Of one of the rows' numbers, over all predicted positions."""
        weights = [row.predicted for row in self.rows]
        values = [getattr(row, name) for row in self.rows]
        return float(np.average(values, weights=weights)) if sum(weights) else 0.0

    def as_dict(self) -> dict[str, Any]:
        means = ("kl", "stored_mass", "fresh_mass", "entropy_error", "label_error", "control_kl")
        return {
            "targets": self.targets,
            "teacher": self.teacher,
            "ok": self.ok,
            "same_weights": self.same_weights,
            "seed": self.seed,
            "identical_rows": self.identical,
            "means": {name: self.mean(name) for name in means},
            "rows": [asdict(row) for row in self.rows],
        }


def audit(url: str, name: str, teacher: Teacher, rows: int, seed: int) -> Audit:
    """Compute some committed rows of a set of targets again, chosen at random by `seed`.

    The teacher is in the manifest's dtype and backend. Raises as the reader does for rows that
    cannot be read.
    """
    targets = TargetsReader(url, name)
    manifest = targets.manifest
    shards = np.arange(manifest.num_sequences) // manifest.shard_sequences
    there = np.flatnonzero(targets.committed[shards])
    chosen = np.random.default_rng(seed).permutation(there)[:rows]
    teacher.arrange(read_table(url, name, manifest, "sampling_order"))
    found: list[RowAudit] = []
    size = manifest.batch_sequences
    for start in range(0, len(chosen), size):
        found += _audit_batch(targets, teacher, np.sort(chosen[start : start + size]))
    # That others come out the same to the bit says that this hardware repeats what was stored.
    repeats = 2 * sum(row.changed == 0 for row in found) >= len(found)
    if repeats:
        found = [_among_its_own(targets, teacher, row) for row in found]
    return Audit(
        targets=name,
        teacher=teacher.info.name,
        same_weights=teacher.info.weights_sha256 == manifest.teacher.weights_sha256,
        seed=seed,
        rows=[
            replace(row, fault=_fault(row, repeats and _is_steady(targets, teacher, row)))
            for row in found
        ],
    )


def _audit_batch(targets: TargetsReader, teacher: Teacher, rows: np.ndarray) -> list[RowAudit]:
    """Findings of a batch of rows, without their faults."""
    manifest, stored = targets.manifest, targets.rows(rows)
    size = manifest.batch_sequences
    # In other company: the rows in reverse, in a batch of another shape.
    other_size = 1 if size > 1 else 2
    fresh, other = (_compute(targets, teacher, stored, rows, n) for n in (size, other_size))
    position = targets.positions(stored)
    log_q, other_log_q = (
        _log_q(teacher, stored, position, manifest, n) for n in (size, other_size)
    )
    predicted = predicted_mask(stored.segment_ids)
    is_id = (stored.entry_id >= 0) & (stored.entry_id < manifest.teacher.vocab_size)
    weight = stored.entry_weight.astype(np.float64)
    found = []
    for i, row in enumerate(rows.tolist()):
        mask = predicted[i]
        count = max(int(mask.sum()), 1)
        kl = _kl(manifest, stored, i, position[i], log_q[i])[mask]
        found.append(
            RowAudit(
                row=row,
                shard=row // manifest.shard_sequences,
                predicted=int(mask.sum()),
                changed=_changed(manifest, stored, fresh, i),
                kl=float(kl.sum() / count),
                kl_error=float(np.std(kl) / np.sqrt(count)) if len(kl) else 0.0,
                entropy_error=_mean_error(stored.teacher_entropy, fresh.teacher_entropy, i, mask),
                label_error=_mean_error(stored.label_logprob, fresh.label_logprob, i, mask),
                stored_mass=float(weight[i][is_id[i]].sum() / count),
                fresh_mass=float(np.exp(log_q[i][is_id[i]]).sum() / count),
                control_changed=_changed(manifest, other, fresh, i),
                control_kl=float((weight[i] * (log_q[i] - other_log_q[i])).sum() / count),
                control_error=max(
                    _mean_error(other.teacher_entropy, fresh.teacher_entropy, i, mask),
                    _mean_error(other.label_logprob, fresh.label_logprob, i, mask),
                ),
            )
        )
    return found


def _compute(
    targets: TargetsReader, teacher: Teacher, stored: TargetBatch, rows: np.ndarray, size: int
) -> TargetBatch:
    """The rows' targets anew, in batches of `size`; of another than the set's, in reverse."""
    manifest = targets.manifest
    order = slice(None) if size == manifest.batch_sequences else slice(None, None, -1)
    wait = begin_rows(
        teacher,
        targets.vocabulary,
        stored.tokens[order],
        stored.segment_ids[order],
        rows[order],
        spec=manifest.sampler,
        seed=manifest.seed,
        batch_sequences=size,
    )
    found = wait().part(order)
    entries = decode_entries(manifest, targets.vocabulary, stored.segment_ids, found)
    return TargetBatch(
        tokens=stored.tokens,
        segment_ids=stored.segment_ids,
        entry_id=entries.entry_id,
        entry_weight=entries.entry_weight,
        head_count=entries.head_count,
        tail_count=entries.tail_count,
        teacher_entropy=codec.decode_nats(found.teacher_nats[:, 0]),
        label_logprob=-codec.decode_nats(found.teacher_nats[:, 1]),
    )


def _log_q(
    teacher: Teacher,
    stored: TargetBatch,
    position: np.ndarray,
    manifest: TargetsManifest,
    size: int,
) -> np.ndarray:
    """float64 [R, E]: what the teacher gives each stored entry now; of no entry, 0.

    Of the rest, which top_k stores, what it gives all ids that the position has no entry of.
    """
    count, vocab_size = len(position), manifest.teacher.vocab_size
    found = []
    for start in range(0, count, size):
        # Of one shape, the last batch padded.
        mine = np.minimum(np.arange(start, start + size), count - 1)
        ids = np.clip(stored.entry_id[mine], 0, vocab_size - 1)
        found.append(
            teacher.log_probabilities(
                stored.tokens[mine],
                stored.segment_ids[mine],
                position[mine],
                ids,
                manifest.sampler.temperature,
            )
        )
    log_q = np.concatenate(found)[:count].astype(np.float64)
    log_q[stored.entry_id < 0] = 0.0
    for row, column in np.argwhere(stored.entry_id == vocab_size):
        others = (position[row] == position[row, column]) & (stored.entry_id[row] >= 0)
        others[column] = False
        log_q[row, column] = np.log(max(1.0 - np.exp(log_q[row][others]).sum(), _TINY))
    return log_q


def _kl(
    manifest: TargetsManifest, stored: TargetBatch, i: int, position: np.ndarray, log_q: np.ndarray
) -> np.ndarray:
    """float64 [L]: an unbiased estimate of each position's KL from what was sampled to q.

    The sum of p log p is less the stored entropy, or of exact weights their own; that of p log q
    is had from the sample, whose weights have the mean p.
    """
    weight = stored.entry_weight[i].astype(np.float64)
    length = stored.tokens.shape[1]
    cross = -np.bincount(position, weight * log_q, length)
    if manifest.sampler.name in ("top_k", "full"):
        log_p = np.log(np.where(weight > 0, weight, 1.0))
        return cross + np.bincount(position, weight * log_p, length)
    return cross - stored.teacher_entropy[i]


def _changed(manifest: TargetsManifest, one: TargetBatch, other: TargetBatch, i: int) -> int:
    """Positions of row i at which two batches differ in anything."""
    base = manifest.teacher.vocab_size + 1
    sampler = manifest.sampler
    keys, weights = [], []
    for batch in (one, other):
        position = codec.entry_positions(
            batch.head_count[i : i + 1],
            batch.tail_count[i : i + 1],
            sampler.block_tokens,
            sampler.slots_per_block,
        )[0]
        used = batch.entry_id[i] >= 0
        keys.append(position[used].astype(np.int64) * base + batch.entry_id[i][used])
        weights.append(batch.entry_weight[i][used])
    both, first, second = np.intersect1d(keys[0], keys[1], return_indices=True)
    moved = both[weights[0][first] != weights[1][second]]
    differs = (one.teacher_entropy[i] != other.teacher_entropy[i]) | (
        one.label_logprob[i] != other.label_logprob[i]
    )
    differs[np.concatenate([np.setxor1d(keys[0], keys[1]), moved]) // base] = True
    return int(differs.sum())


def _mean_error(one: np.ndarray, other: np.ndarray, i: int, mask: np.ndarray) -> float:
    """Mean difference of row i's numbers; both were rounded by the same random numbers."""
    return float(np.abs(one[i][mask] - other[i][mask]).mean()) if mask.any() else 0.0


def _among_its_own(targets: TargetsReader, teacher: Teacher, row: RowAudit) -> RowAudit:
    """A changed row, if it comes out the same in the batch in which it was dumped: as unchanged.

    Kernels exist whose sums depend on where in a batch a row is, and on what lies beside it.
    """
    if row.changed == 0:
        return row
    size, per_shard = targets.manifest.batch_sequences, targets.manifest.shard_sequences
    first = row.shard * per_shard
    start = row.row - (row.row - first) % size
    stop = min(start + size, first + per_shard, targets.manifest.num_sequences)
    rows = np.arange(start, stop)
    stored = targets.rows(rows)
    fresh = _compute(targets, teacher, stored, rows, size)
    is_same = _changed(targets.manifest, stored, fresh, row.row - start) == 0
    return replace(row, changed=0) if is_same else row


def _is_steady(targets: TargetsReader, teacher: Teacher, row: RowAudit) -> bool:
    """Whether the teacher repeats a changed row's targets, in the same batch, to the bit."""
    if row.changed == 0:
        return True
    rows = np.array([row.row])
    stored = targets.rows(rows)
    size = targets.manifest.batch_sequences
    first, second = (_compute(targets, teacher, stored, rows, size) for _ in range(2))
    return _changed(targets.manifest, first, second, 0) == 0


def _fault(row: RowAudit, repeats: bool) -> str | None:
    """Why a row is not the teacher's, or None. `repeats`: this machine repeats it to the bit."""
    if row.changed == 0:
        return None
    if repeats:
        return (
            f"{row.changed} of its {row.predicted} positions are not what the teacher gives, which "
            "repeats other rows to the bit"
        )
    allowed = _ALLOWED_NATS + _TIMES_CONTROL * row.control_error
    allowed_kl = _ALLOWED_KL_NATS + _TIMES_CONTROL * abs(row.control_kl)
    for name, value, most in (
        ("KL to the teacher", abs(row.kl), allowed_kl + _DEVIATIONS * row.kl_error),
        ("entropy", row.entropy_error, allowed),
        ("next token's log-probability", row.label_error, allowed),
    ):
        if value > most:
            return f"its {name} is off by {value:.3f} nats, and {most:.3f} are allowed"
    return None
