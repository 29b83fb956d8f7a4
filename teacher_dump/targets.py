"""Rows of tokens to rows as they are stored: batches of one shape, sampling, weight codes."""

import numpy as np

from logit_store.codec import encode_weights
from logit_store.decode import TargetRows
from logit_store.layout import UNUSED_ID
from schemas.errors import BudgetError
from schemas.manifest import SamplerSpec, WeightCode
from teacher_dump import samplers
from teacher_dump.teacher import RowTargets, Teacher


def compute_rows(
    teacher: Teacher,
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    rows: np.ndarray,
    *,
    spec: SamplerSpec,
    seed: int,
    weight_code: WeightCode,
    batch_sequences: int,
) -> TargetRows:
    """Targets of tokens and segment ids [R, L], which are the store's `rows` [R].

    The teacher always gets `batch_sequences` rows, the last batch padded, so that one program is
    compiled and results do not depend on how many rows are asked for. Raises BudgetError if the
    sampler's entries do not fit a block.
    """
    samplers.check(spec, teacher.info.vocab_size)
    parts = []
    for start in range(0, len(rows), batch_sequences):
        chosen = np.arange(start, start + batch_sequences)
        padded = np.minimum(chosen, len(rows) - 1)
        result = teacher.targets(tokens[padded], segment_ids[padded], rows[padded], spec, seed)
        real = int((chosen < len(rows)).sum())
        parts.append(_encode(result, rows[padded[:real]], spec, seed, weight_code))
    return TargetRows(
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in TargetRows.__dataclass_fields__
        }
    )


def _encode(
    result: RowTargets, rows: np.ndarray, spec: SamplerSpec, seed: int, weight_code: WeightCode
) -> TargetRows:
    """The first len(rows) rows of a batch, as stored."""
    real = len(rows)
    blocks = {name: np.asarray(x)[:real] for name, x in result.blocks._asdict().items()}
    if blocks["overflow"].any():
        row, block = np.argwhere(blocks["overflow"])[0]
        raise BudgetError(
            f"A block's entries must fit its {spec.entries_per_block} slots, but those of the "
            f"{spec.name} sampler do not in block {block} of row {rows[row]}; raise "
            "sampler.entries_per_token."
        )
    most = np.iinfo(np.uint16).max
    if blocks["entry_count"].max(initial=0) > most:
        raise BudgetError(
            f"A token has at most {most} entries, but one of rows {rows.tolist()[:8]} has "
            f"{blocks['entry_count'].max()}; lower sampler.entries_per_token or block_tokens."
        )
    ids = blocks["entry_id"]
    used = ids >= 0
    floor = np.where(used.any(axis=2), blocks["floor"], np.float32(1.0))
    # An unused slot gets the block's floor: its code is then 0, whatever the noise.
    weights = np.where(used, blocks["entry_weight"], floor[..., None])
    codes = encode_weights(
        weights, floor[..., None], _uniforms(rows, seed, weights.shape[1:]), weight_code
    )
    return TargetRows(
        entry_count=blocks["entry_count"].reshape(real, -1).astype(np.uint16),
        entry_id=np.where(used, ids.astype(np.uint32), np.uint32(UNUSED_ID)).reshape(real, -1),
        entry_weight=codes.reshape(real, -1),
        weight_floor=floor.astype(np.float32),
        teacher_entropy=np.asarray(result.teacher_entropy)[:real].astype(np.float16),
        label_logprob=np.asarray(result.label_logprob)[:real].astype(np.float16),
    )


def _uniforms(rows: np.ndarray, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Rounding noise in [0, 1), [R, *shape], a function of the seed and the row alone."""
    return np.stack(
        [np.random.Generator(np.random.Philox(key=[seed, int(row)])).random(shape) for row in rows]
    )
