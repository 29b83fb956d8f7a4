"""What a stored byte is worth: the error of the stored targets q at equal bytes.

`python -m benchmarks.sampling_error --states DIR/states --student DIR2/states --temperature 0.985`
holds stores of the small teacher's targets against its exact distributions p: E||q - p||^2, and
the same of the gradient in the hidden states, W^T (q - p), for the embedding W of the teacher and
of a student of another width, seed and length of training. Everything goes through the package's
samplers, codec, writer and reader, so that what is judged is what a trainer gets, and bytes are
those on disk.

Systematic sampling is compared with multinomial sampling (random-sampling KD) in the same format,
at equal bytes: two numbers of draws are stored, and the error between them is taken on the line
through both in logarithms. Standard errors are jackknifed over blocks of 1,024 tokens.
"""

import argparse
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_matrix

from benchmarks.states import States, StatesTeacher, write_store
from logit_store.reader import TargetsReader
from logit_store.statistics import summary
from schemas.manifest import SamplerSpec
from teacher_dump import samplers, teacher

TILE = 512
JACKKNIFE_TOKENS = 1024
# Entries per token: points of systematic sampling, and two numbers of draws about as many bytes.
POINTS = {
    0.985: {12: (24, (24, 28)), 24: (58, (58, 66)), 56: (168, (165, 190))},
    0.645: {12: (77, (80, 96)), 24: (252, (260, 310)), 56: (1087, (1150, 1350))},
}
MEASURES = ("square", "teacher's gradient", "student's gradient")
ENTRY_ARRAYS = ("head_count", "head_points", "entry_bucket", "entry_offset", "block_points")


@dataclass(frozen=True)
class Case:
    """One set of targets: mean entries asked for, the sampler, a seed."""

    entries: int
    spec: SamplerSpec
    seed: int

    @property
    def name(self) -> str:
        return f"{self.spec.name}-{self.entries}-{self.spec.points}-{self.seed}"


def cases(temperature: float, seeds: int) -> list[Case]:
    found = []
    for entries, (points, draws) in POINTS[temperature].items():
        for name, number in (("systematic", points), *(("multinomial", n) for n in draws)):
            spec = SamplerSpec(
                name=name, points=number, slots_per_token=3 * entries // 2,
                block_tokens=1024, temperature=temperature,
            )  # fmt: skip
            found += [Case(entries, spec, seed) for seed in range(seeds)]
    return found


@dataclass
class Exact:
    """What is kept of a row's exact distributions.

    square [L] sum of p^2; means of the embeddings under p, [L, D] each; entropy, label [L]; and for
    each case the candidates (position, id, points) with their exact probabilities.
    """

    square: np.ndarray
    means: list[np.ndarray]
    entropy: np.ndarray
    label: np.ndarray
    candidates: dict[str, tuple[np.ndarray, ...]]


class Replayed:
    """A Teacher whose candidates were computed before."""

    def __init__(self, info: Any, rows: dict[int, Exact], case: Case):
        self.info, self._rows, self._case = info, rows, case

    def candidates(
        self,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        rows: np.ndarray,
        spec: SamplerSpec,
        seed: int,
    ) -> teacher.RowCandidates:
        (row,) = rows.tolist()
        found = self._rows[row]
        position, ids, points, _ = found.candidates[self._case.name]
        return teacher.RowCandidates(
            *(x[None] for x in (position, ids, points, found.entropy, found.label))
        )


def exact_rows(
    states: States, student: np.ndarray, temperature: float, todo: list[Case]
) -> tuple[dict[int, Exact], StatesTeacher]:
    """Exact distributions of all rows, tile by tile, and every case's candidates of each."""
    order = states.similar
    small = StatesTeacher(states, order)
    params, config, vocab = small.params, small.config, small.info.vocab_size
    tables = [jnp.asarray(states.table[order]), jnp.asarray(student[order])]
    place = np.empty(vocab, np.int32)
    place[order] = np.arange(vocab)

    @jax.jit
    def one_tile(hidden: Any, predicted: Any, labels: Any, keys: Any) -> Any:
        tile, entropy = teacher.score_tile(params, config, hidden, predicted, temperature, vocab)
        p = jnp.exp(tile.scores() - tile.log_total[:, None])[:, :vocab]
        p = jnp.where(predicted[:, None], p, 0.0)
        found = []
        for case, key in zip(todo, keys, strict=True):
            draft = samplers.propose(case.spec, vocab, tile, params["embedding"], key)
            c = jax.tree.map(
                lambda x: x[0], samplers.settle(jax.tree.map(lambda x: x[None], draft))
            )
            found.append((*c, p[c.position, c.id]))
        means = [jnp.matmul(p, table) for table in tables]
        label = teacher.label_log_probability(tile, labels)
        return jnp.sum(p * p, axis=1), means, entropy, label, found

    rows = {}
    for row in range(len(states.tokens)):
        begun = time.monotonic()
        labels = place[np.roll(states.tokens[row], -1)]
        parts = []
        for start in range(0, states.tokens.shape[1], TILE):
            where = slice(start, start + TILE)
            keys = [
                jax.random.fold_in(jax.random.key(case.seed), row * 1000 + start // TILE)
                for case in todo
            ]
            square, means, entropy, label, found = jax.tree.map(
                np.asarray,
                one_tile(
                    states.hidden[row, where], states.predicted[row, where], labels[where], keys
                ),
            )
            kept = []
            for position, column, points, p in found:
                used = points > 0
                kept.append((position[used] + start, order[column[used]], points[used], p[used]))
            parts.append((square, means, entropy, label, kept))
        rows[row] = Exact(
            np.concatenate([part[0] for part in parts]),
            [np.concatenate([part[1][i] for part in parts]) for i in range(len(tables))],
            np.concatenate([part[2] for part in parts]),
            np.concatenate([part[3] for part in parts]),
            {
                case.name: tuple(
                    np.concatenate([part[4][i][k] for part in parts]) for k in range(4)
                )
                for i, case in enumerate(todo)
            },
        )
        print(f"row {row}: {time.monotonic() - begun:.0f} s", flush=True)
    return rows, small


@dataclass
class Errors:
    """Of one stored set: squared errors [tokens] of q and of each gradient; bytes and entries."""

    squared: dict[str, np.ndarray]
    entry_bytes: float
    all_bytes: float
    entries: float


def errors(
    url: str, case: Case, states: States, student: np.ndarray, rows: dict[int, Exact]
) -> Errors:
    """Read a stored set back and hold it against the exact distributions."""
    reader = TargetsReader(url, case.name)
    vocab = len(states.table)
    squared: dict[str, list[np.ndarray]] = {name: [] for name in MEASURES}
    for row, exact in rows.items():
        batch = reader.rows([row])
        used = batch.entry_id[0] >= 0
        position = reader.positions(batch)[0][used].astype(np.int64)
        ids, weight = batch.entry_id[0][used], batch.entry_weight[0][used].astype(np.float64)
        at, id_at, _, p_at = exact.candidates[case.name]
        key = at.astype(np.int64) * vocab + id_at
        by_key = np.argsort(key, kind="stable")
        p = p_at[by_key[np.searchsorted(key[by_key], position * vocab + ids)]].astype(np.float64)
        change = np.bincount(
            position, weight * weight - 2 * weight * p, minlength=len(exact.square)
        )
        matrix = csr_matrix((weight, (position, ids)), shape=(len(exact.square), vocab))
        found = [exact.square + change]
        for table, mean in zip((states.table, student), exact.means, strict=True):
            found.append(((matrix @ table - mean) ** 2).sum(axis=1))
        for name, values in zip(MEASURES, found, strict=True):
            squared[name].append(values)
    stored = summary(url, case.name)
    return Errors(
        {name: np.concatenate(parts) for name, parts in squared.items()},
        sum(stored.array_bytes[name] for name in ENTRY_ARRAYS) / stored.tokens,
        stored.bytes_per_token,
        stored.entries_per_token,
    )


def ratio_at_equal_bytes(
    systematic: np.ndarray, few: np.ndarray, many: np.ndarray, share: float
) -> tuple[float, float]:
    """Error of systematic over that of multinomial sampling, and its standard error.

    Squared errors [tokens] of the three sets; `share` is where between the logarithms of the two
    multinomial sets' bytes those of the systematic set lie.
    """
    blocks = [x.reshape(-1, JACKKNIFE_TOKENS).sum(axis=1) for x in (systematic, few, many)]

    def ratio(keep: np.ndarray) -> float:
        one, low, high = (math.log(block[keep].sum()) for block in blocks)
        return math.exp(one - (low + share * (high - low)))

    count = len(blocks[0])
    every = np.ones(count, bool)
    left_out = np.array([ratio(np.arange(count) != i) for i in range(count)])
    return ratio(every), math.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())


def mean_over_seeds(found: list[Errors]) -> Errors:
    """One set in the place of several that differ in their seed."""
    return Errors(
        {name: np.mean([e.squared[name] for e in found], axis=0) for name in MEASURES},
        *(
            float(np.mean([getattr(e, name) for e in found]))
            for name in ("entry_bytes", "all_bytes", "entries")
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", required=True, type=Path)
    parser.add_argument("--student", required=True, type=Path)
    parser.add_argument("--temperature", type=float, choices=sorted(POINTS), default=0.985)
    parser.add_argument("--rows", type=int, default=12, help="Of 8,192 tokens each.")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    states = States(arguments.states, arguments.rows)
    student = (
        np.load(arguments.student / "table.npy")
        * (np.load(arguments.student / "table_scale.npy")[:, None])
    )
    todo = cases(arguments.temperature, arguments.seeds)
    rows, small = exact_rows(states, student, arguments.temperature, todo)
    entropy = np.concatenate([exact.entropy for exact in rows.values()])
    print(f"entropy {entropy[states.predicted.reshape(-1)].mean():.3f} nats, {entropy.size} tokens")
    with tempfile.TemporaryDirectory() as folder:
        url = f"{folder}/store"
        found: dict[tuple[str, int, int], list[Errors]] = {}
        for case in todo:
            replayed = Replayed(small.info, rows, case)
            write_store(url, states, {case.name: case.spec}, seed=case.seed, teacher=replayed)
            key = (case.spec.name, case.entries, case.spec.points)
            found.setdefault(key, []).append(errors(url, case, states, student, rows))
    sets = {key: mean_over_seeds(several) for key, several in found.items()}
    for (name, entries, points), e in sets.items():
        means = ", ".join(f"{measure} {e.squared[measure].mean():.5f}" for measure in MEASURES)
        print(
            f"{name} {points}: {e.entries:.2f} entries, {e.entry_bytes:.2f} B of entries, "
            f"{e.all_bytes:.2f} B of all (asked: {entries} entries); {means}"
        )
    for entries, (points, draws) in POINTS[arguments.temperature].items():
        one = sets[("systematic", entries, points)]
        few, many = (sets[("multinomial", entries, n)] for n in draws)
        share = math.log(one.entry_bytes / few.entry_bytes) / math.log(
            many.entry_bytes / few.entry_bytes
        )
        for measure in MEASURES:
            ratio, error = ratio_at_equal_bytes(
                one.squared[measure], few.squared[measure], many.squared[measure], share
            )
            print(f"{entries} entries, {measure}: {ratio:.3f} ± {error:.3f} of multinomial")


if __name__ == "__main__":
    main()
