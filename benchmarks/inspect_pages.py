"""How long each page of the inspector takes on a store of a million sequences.

`python -m benchmarks.inspect_pages` writes a store of 1,048,576 sequences of 32 tokens in 256
shards (entries of one shard are used for all; tokens and statistics differ), serves it on loopback,
and asks for each page over HTTP: cold, as the first request to a new server, and warm, with other
sequences each time. Files are in the operating system's cache. Prints median and largest time, the
median of processor time, which other work on the machine hardly changes, and bytes of the answer.
`--keep FOLDER` keeps the store, and reads one that is there.
"""

import argparse
import http.client
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import uvicorn

from logit_store import codec, writer
from logit_store.codec import RowEntries
from logit_store.inspect.text import Pieces
from logit_store.inspect.web.app import make_app
from logit_store.inspect.web.server import listen
from logit_store.inspect.web.stores import Served
from logit_store.ledger import Ledger, plan_shards
from logit_store.rows import TargetRows
from schemas.manifest import (
    Corpus,
    SamplerSpec,
    TargetsManifest,
    TeacherInfo,
    TokenizerInfo,
    TokensManifest,
    identity,
)

LENGTH, VOCAB, POINTS, SLOTS = 32, 4096, 8, 4
SHARD_ROWS = 4096
LIMIT_SECONDS = 0.3


def make_store(url: str, shards: int, say: Callable[[str], None]) -> None:
    """A finished store; what is there is kept."""
    random = np.random.default_rng(0)
    corpus = Corpus(sources=(), splits=())
    shapes = {
        "num_sequences": shards * SHARD_ROWS,
        "sequence_tokens": LENGTH,
        "shard_sequences": SHARD_ROWS,
    }
    tokens = TokensManifest(
        **shapes,
        tokenizer=TokenizerInfo(sha256="0" * 64, vocab_size=VOCAB, bos_id=2, eos_id=1, pad_id=0),
        corpus=corpus.summary(),
        software={},
    )
    vocabulary = codec.make_vocabulary(np.arange(VOCAB)[::-1] + 1, SLOTS)
    tables = writer.Tables(vocabulary, np.arange(VOCAB, dtype=np.uint32))
    targets = TargetsManifest(
        **shapes,
        tokens_fingerprint=identity(tokens),
        teacher=TeacherInfo(
            name="made up", config_sha256="0", weights_sha256="0", vocab_size=VOCAB
        ),
        sampler=SamplerSpec(
            name="systematic", points=POINTS, slots_per_token=SLOTS, block_tokens=LENGTH
        ),
        vocabulary=tables.info(),
        seed=0,
        dtype="float32",
        batch_sequences=1,
        software={},
    )
    writer.create_tokens(url, tokens, corpus)
    writer.create_targets(url, "default", targets, tables)
    encoded = [_encoded(vocabulary, random) for _ in range(SHARD_ROWS)]
    columns = {name: np.stack([row[name] for row in encoded]) for name in encoded[0]}
    segments = np.ones((SHARD_ROWS, LENGTH), np.uint16)
    ledgers = [Ledger(url, None, tokens), Ledger(url, "default", targets)]
    pending = {spec.index for spec in ledgers[1].pending()}
    started = time.monotonic()
    for of_tokens, of_targets in zip(plan_shards(tokens), plan_shards(targets), strict=True):
        if of_tokens.index not in pending:
            continue
        drawn = np.random.default_rng(of_tokens.index)
        ids = drawn.integers(4, VOCAB, (SHARD_ROWS, LENGTH)).astype(np.int32)
        nats = drawn.gamma(2 + of_tokens.index % 7 / 10, 1, (SHARD_ROWS, 2, LENGTH))
        nats[:, :, -1] = 0
        stored = TargetRows(
            **columns,
            block_points=np.full((SHARD_ROWS, 1), POINTS, np.uint16),
            teacher_nats=codec.encode_nats(np.minimum(nats, 60), drawn.random(nats.shape)),
        )
        writer.TokensWriter(url).write(of_tokens, ids, segments)
        writer.TargetsWriter(url, "default").write(of_targets, ids, segments, stored)
        if of_tokens.index % 32 == 31:
            say(f"{of_tokens.index + 1} of {shards} shards, {time.monotonic() - started:.0f} s")
    for ledger in ledgers:
        ledger.compact()


def _encoded(vocabulary: codec.Vocabulary, random: np.random.Generator) -> dict[str, np.ndarray]:
    """A row with three ids at each predicted position."""
    position = np.arange(LENGTH - 1).repeat(3)
    ids = (random.integers(0, VOCAB, (LENGTH - 1, 1)) + np.array([0, 5, 90])) % VOCAB
    points = np.tile([POINTS - 3, 2, 1], LENGTH - 1)
    entries = RowEntries(position, ids.reshape(-1), points)
    return codec.encode_row(vocabulary, entries, LENGTH, LENGTH * SLOTS, POINTS)


def pieces() -> Pieces:
    """Made-up words."""
    names = [f" w{index}" for index in range(VOCAB)]
    return Pieces([name.encode() for name in names], names)


@contextmanager
def served(url: str) -> Iterator[int]:
    """A new server of the store, twice so that it can be compared with itself; yields the port."""
    stores = [Served(url, label, pieces()) for label in ("one", "two")]
    with listen("127.0.0.1", 0) as open_socket:
        config = uvicorn.Config(make_app(stores), log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [open_socket]})
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield open_socket.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


class Asked(NamedTuple):
    """Seconds until the whole page was there, seconds of all processors, bytes."""

    seconds: float
    cpu_seconds: float
    size: int


def ask(port: int, path: str) -> Asked:
    """Ask for a page of the server in this process. Raises unless it is one."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    start, cpu = time.perf_counter(), time.process_time()
    connection.request("GET", path)
    answer = connection.getresponse()
    raw = answer.read()
    elapsed, used = time.perf_counter() - start, time.process_time() - cpu
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"{path}: {answer.status} {raw[:500]!r}")
    return Asked(elapsed, used, len(raw))


PAGES: dict[str, str] = {
    "overview": "/s/0",
    "its distributions": "/s/0/figures",
    "its map of shards, by health": "/s/0/shards",
    "its map of shards, by entropy": "/s/0/shards?by=entropy",
    "its progress": "/s/0/progress",
    "a shard": "/s/0/shard/{shard}",
    "a sequence": "/s/0/sequence/{row}",
    "a token's candidates": "/s/0/sequence/{row}/position/7",
    "search, found": "/s/0/search?text=w{id}+&from={row}",
    "search, not found": "/s/0/search?text=nowhere&from={row}",
    "most surprising": "/s/0/find?by=surprise",
    "highest entropy": "/s/0/find?by=entropy",
    "worst captured mass": "/s/0/find?by=mass",
    "two stores compared": "/s/0/compare?sequence={row}&left=0.default&right=1.default",
}


def measure(url: str, rows: int, times: int) -> None:
    """Print a line of a table for each page."""
    random = np.random.default_rng(1)

    def path(template: str) -> str:
        return template.format(
            row=random.integers(rows * 9 // 10),
            shard=random.integers(rows // SHARD_ROWS),
            id=random.integers(4, VOCAB),
        )

    print("| page | cold, median | most | CPU | warm, median | most | CPU | kB |")
    print("|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for name, template in PAGES.items():
        cold = []
        for _ in range(times):
            with served(url) as port:
                cold.append(ask(port, path(template)))
        with served(url) as port:
            warm = [ask(port, path(template)) for _ in range(4 * times)][1:]
        cells = []
        for found in (cold, warm):
            seconds = [one.seconds for one in found]
            cells += [statistics.median(seconds), max(seconds)]
            cells.append(statistics.median(one.cpu_seconds for one in found))
        worst = max(worst, *cells)
        size = statistics.median(one.size for one in cold)
        text = " | ".join(f"{1e3 * cell:.0f} ms" for cell in cells)
        print(f"| {name} | {text} | {size / 1e3:.0f} |", flush=True)
    print(f"\nslowest: {1e3 * worst:.0f} ms; limit {1e3 * LIMIT_SECONDS:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=256, help=f"of {SHARD_ROWS} sequences")
    parser.add_argument("--times", type=int, default=5, help="new servers for each page")
    parser.add_argument("--keep", type=Path, help="folder of the store")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = str(arguments.keep or Path(folder) / "store")
        make_store(url, arguments.shards, lambda text: print(text, flush=True))
        start = time.monotonic()
        Served(url, "store", pieces())
        print(f"opened in {1e3 * (time.monotonic() - start):.0f} ms")
        measure(url, arguments.shards * SHARD_ROWS, arguments.times)


if __name__ == "__main__":
    main()
