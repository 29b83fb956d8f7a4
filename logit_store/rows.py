"""Rows as they are stored: their columns, the rules that they obey, and their sums.

Pure. The writer checks rows against these rules, the verifier checks stored rows against them, and
the reader decodes what obeys them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from logit_store import codec
from logit_store.codec import Entries, Vocabulary
from logit_store.layout import predicted_mask
from schemas.manifest import ShardStatistics, TargetsManifest, TokensManifest

# Rows whose entries are decoded at once: bounds memory, whatever the size of a shard.
_SLICE_ROWS = 32


@dataclass(frozen=True)
class TargetRows:
    """Encoded targets of R rows, dtypes as stored; E slots a row.

    head_count uint16 [R, L]; head_points uint8 or uint16 [R, E]; entry_bucket uint16 [R, E];
    entry_offset uint8 [R, E + 2]; block_points uint16 [R, blocks]; teacher_nats uint8 [R, 2, L],
    codes of the entropy and of less the next token's log-probability.
    """

    head_count: np.ndarray
    head_points: np.ndarray
    entry_bucket: np.ndarray
    entry_offset: np.ndarray
    block_points: np.ndarray
    teacher_nats: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def part(self, rows: slice) -> "TargetRows":
        """Some of the rows."""
        return TargetRows(**{name: values[rows] for name, values in self.columns().items()})


def decode_entries(
    manifest: TargetsManifest, vocabulary: Vocabulary, segment_ids: np.ndarray, rows: TargetRows
) -> Entries:
    """Ids, positions and weights of rows with segment ids [R, L]. Raises CorruptStoreError."""
    return codec.decode_rows(
        vocabulary,
        predicted_mask(segment_ids),
        rows.columns(),
        manifest.sampler.block_tokens,
        manifest.sampler.slots_per_block,
    )


def row_slices(rows: int) -> Iterator[slice]:
    """Slices of a few rows each that cover `rows`."""
    for start in range(0, rows, _SLICE_ROWS):
        yield slice(start, min(start + _SLICE_ROWS, rows))


def check_tokens(
    manifest: TokensManifest, tokens: np.ndarray, segment_ids: np.ndarray, first_row: int
) -> None:
    """Raise ValueError naming the first row [L] of tokens and segment ids that breaks a rule."""
    vocab_size = manifest.tokenizer.vocab_size
    _refuse(
        (tokens < 0) | (tokens >= vocab_size),
        f"Tokens are ids in [0, {vocab_size})",
        first_row,
        tokens,
    )
    numbers = segment_ids.astype(np.int64)
    step = np.diff(numbers, axis=1)
    wrong = np.zeros(numbers.shape, bool)
    wrong[:, 0] = numbers[:, 0] > 1
    wrong[:, 1:] = (step != 0) & (step != 1) & (numbers[:, 1:] != 0)
    wrong[:, 1:] |= (numbers[:, :-1] == 0) & (step != 0)
    _refuse(
        wrong,
        "Segment ids count a row's documents from 1, and 0 is padding at the end",
        first_row,
        segment_ids,
    )


def tokens_statistics(segment_ids: np.ndarray) -> ShardStatistics:
    """What a tokens shard's record sums up, of segment ids [R, L]."""
    return ShardStatistics(
        tokens=int(np.count_nonzero(segment_ids)),
        predicted_tokens=int(np.count_nonzero(predicted_mask(segment_ids))),
    )


def check_targets(
    manifest: TargetsManifest,
    vocabulary: Vocabulary,
    segment_ids: np.ndarray,
    targets: TargetRows,
    first_row: int,
) -> ShardStatistics:
    """What a targets shard's record sums up, of R rows that obey the format's rules.

    Raises ValueError naming the first row that breaks one.
    """
    found = ShardStatistics(tokens=0)
    for rows in row_slices(len(segment_ids)):
        part = _check_slice(
            manifest, vocabulary, segment_ids[rows], targets.part(rows), first_row + rows.start
        )
        found = found.plus(part)
    return found


def _refuse(bad: np.ndarray, rule: str, first_row: int, values: np.ndarray) -> None:
    """bad [R, ...] of the shape of `values`: raise ValueError for the first that is True."""
    if bad.any():
        where = tuple(np.argwhere(bad)[0])
        raise ValueError(
            f"{rule}, but row {first_row + int(where[0])} breaks this rule: it holds "
            f"{values[where]}."
        )


def _check_slice(
    manifest: TargetsManifest,
    vocabulary: Vocabulary,
    segment_ids: np.ndarray,
    targets: TargetRows,
    first_row: int,
) -> ShardStatistics:
    predicted = predicted_mask(segment_ids)
    points = manifest.sampler.points
    for bad, values, rule in (
        (
            ~predicted & (targets.head_count > 0),
            targets.head_count,
            "Only a position whose next token is of the same document may have entries",
        ),
        (
            (targets.block_points < 1) | (targets.block_points > points),
            targets.block_points,
            f"A block's points lie in [1, {points}]",
        ),
        (
            ~predicted[:, None] & (targets.teacher_nats != 0),
            targets.teacher_nats,
            "Entropy and log-probability are 0 where the next token is not of the same document",
        ),
    ):
        _refuse(bad, rule, first_row, values)
    entries = codec.check_rows(
        vocabulary,
        predicted,
        targets.columns(),
        manifest.sampler.block_tokens,
        manifest.sampler.slots_per_block,
        first_row,
    )
    rest = entries.entry_id == manifest.teacher.vocab_size
    if manifest.sampler.name != "top_k":
        _refuse(
            rest,
            f"Only top_k stores the rest, id {manifest.teacher.vocab_size}",
            first_row,
            entries.entry_id,
        )
    used = entries.entry_id >= 0
    nats = codec.decode_nats(targets.teacher_nats).sum(axis=(0, 2), dtype=np.float64)
    return ShardStatistics(
        tokens=int(np.count_nonzero(segment_ids)),
        predicted_tokens=int(np.count_nonzero(predicted)),
        entries=int(np.count_nonzero(used)),
        max_entries=int((entries.head_count.astype(np.int64) + entries.tail_count).max(initial=0)),
        mass_sum=float(entries.entry_weight[used & ~rest].sum(dtype=np.float64)),
        entropy_sum_nats=float(nats[0]),
        label_logprob_sum_nats=-float(nats[1]),
    )
