"""Whether what is stored has the teacher's probabilities as its mean, on real distributions.

`python -m benchmarks.sampling_bias --states DIR/states` samples the same 128 positions of the small
teacher under many seeds, for systematic sampling, multinomial sampling and top-k. Each draw is
settled, encoded and decoded as in a store. For each class of ids (head: p >= 1/points; tail; rank
beyond 1,000 by frequency) the mean of the decoded mass is held against the exact one, position by
position, in its own standard errors: without bias the z-scores have a root mean square near 1 and
a mean near 0. top_k is there because it must fail. `--thin` gives blocks too few slots.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.states import States, StatesTeacher
from logit_store import codec
from logit_store.codec import RowEntries
from schemas.manifest import SamplerSpec
from teacher_dump import samplers, teacher
from teacher_dump.targets import settle_row

TOKENS = 128
CLASSES = ("head", "tail", "rank > 1000")


def one_draw(
    spec: SamplerSpec, vocab: int, tile: samplers.Tile, table: jax.Array, key: jax.Array
) -> samplers.Candidates:
    """A tile's candidates with all their points, and an axis in front."""
    draft = samplers.propose(spec, vocab, tile, table, key)
    return samplers.settle(jax.tree.map(lambda x: x[None], draft))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=400)
    parser.add_argument("--temperature", type=float, default=0.985)
    parser.add_argument("--thin", action="store_true", help="A third of the slots.")
    arguments = parser.parse_args()
    states = States(arguments.states, 1)
    order = states.similar
    small = StatesTeacher(states, order)
    params, config, vocab = small.params, small.config, small.info.vocab_size
    where = slice(2048, 2048 + TOKENS)
    predicted = states.predicted[0, where]
    tile, _ = teacher.score_tile(
        params,
        config,
        states.hidden[0, where],
        jnp.asarray(predicted),
        arguments.temperature,
        vocab,
    )
    p = np.asarray(jnp.exp(tile.scores() - tile.log_total[:, None]), np.float64)[:, :vocab]
    p[~predicted] = 0.0
    common = np.zeros(vocab, bool)
    common[np.argsort(-states.counts, kind="stable")[:1000]] = True
    column_is_common = common[order]
    slots = 6 if arguments.thin else 18
    tables = codec.make_vocabulary(states.counts, slots)
    for name, points in (("systematic", 24), ("multinomial", 24), ("top_k", 1000)):
        spec = SamplerSpec(
            name=name, points=points, slots_per_token=slots, block_tokens=TOKENS,
            temperature=arguments.temperature,
        )  # fmt: skip

        draw = jax.jit(partial(one_draw, spec, vocab))
        is_head = p * 24 >= 1
        masks = (is_head, ~is_head, np.broadcast_to(~column_is_common, p.shape))
        exact = [np.where(mask, p, 0.0).sum(axis=1) for mask in masks]
        place = np.empty(vocab + 1, np.int64)
        place[np.append(order, vocab)] = np.arange(vocab + 1)
        sums = np.zeros((len(CLASSES), TOKENS))
        squares = np.zeros_like(sums)
        fewest = points
        for seed in range(arguments.seeds):
            position, column, drawn = (
                np.asarray(x[0]) for x in draw(tile, params["embedding"], jax.random.key(seed))
            )
            ids = np.append(order, vocab)[column]
            entries, block_points = settle_row(
                tables, RowEntries(position, ids, drawn), spec, TOKENS,
                np.random.default_rng(seed), "the tile",
            )  # fmt: skip
            fewest = min(fewest, int(block_points.min()))
            row = codec.encode_row(tables, entries, TOKENS, TOKENS * slots, points)
            columns = {key: values[None] for key, values in row.items()}
            columns["block_points"] = block_points[None]
            found = codec.decode_rows(tables, predicted[None], columns, TOKENS, TOKENS * slots)
            at = codec.entry_positions(found.head_count, found.tail_count, TOKENS, TOKENS * slots)
            used = (found.entry_id[0] >= 0) & (found.entry_id[0] < vocab)
            at, stored = at[0][used], place[found.entry_id[0][used]]
            weight = found.entry_weight[0][used].astype(np.float64)
            for index, mask in enumerate(masks):
                chosen = mask[at, stored]
                mass = np.bincount(at[chosen], weight[chosen], minlength=TOKENS)
                sums[index] += mass
                squares[index] += mass**2
        print(f"{name}, {points} points ({fewest} where thinned most), {arguments.seeds} seeds")
        for index, what in enumerate(CLASSES):
            mean = sums[index] / arguments.seeds
            variance = np.maximum(squares[index] / arguments.seeds - mean**2, 0.0)
            error = np.sqrt(variance / arguments.seeds)
            # Where a class is hit or missed a few times only, its error cannot be told.
            expected = exact[index] * points * arguments.seeds
            there = predicted & (np.minimum(expected, points * arguments.seeds - expected) >= 10)
            there &= error > 1e-6
            z = (mean - exact[index])[there] / error[there]
            print(
                f"  {what:12} exact {exact[index][predicted].mean():.5f}, "
                f"mean {mean[predicted].mean():.5f}; z: mean {z.mean():+.2f} "
                f"± {1 / np.sqrt(len(z)):.2f}, root mean square {np.sqrt((z**2).mean()):.2f}, "
                f"most {np.abs(z).max():.1f} of {len(z)}"
            )


if __name__ == "__main__":
    main()
