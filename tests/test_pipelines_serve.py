"""`retort serve` as it is started: stores with their tokenizers, a student, an address."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_store
import web_server
from dump_world import TEACHER

from gemma2 import checkpoint, model
from logit_store.inspect.compare import cross_entropy
from logit_store.inspect.queries import targets_row, tokens_row
from logit_store.reader import TargetsReader, TokensReader
from pipelines import serving, student
from schemas.errors import ConfigError, ManifestMismatchError
from teacher_dump import tokenizer as tokenizers


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A store, a model of its vocabulary, and a tokenizer that is not the store's."""
    found = tmp_path_factory.mktemp("serve")
    small_store.write_store(str(found / "s"))
    params = model.init_params(TEACHER, jax.random.key(3))
    checkpoint.save(found / "run" / "export", TEACHER, params)
    library = Path(os.__file__).parent
    texts = [(library / name).read_text() for name in ("calendar.py", "textwrap.py")]
    texts.append("naïve 語 \U0001f600 text")
    tokenizers.train(texts, found / "other" / "tokenizer.model", vocab_size=512)
    return found


def test_a_students_predictions_are_its_softmax(folder):
    targets = TargetsReader(str(folder / "s"), "default")
    row = targets_row(targets, 1)
    found = student.load(folder / "run" / "export", str(folder / "s"))
    assert found.name == "run/export"
    said = found.predict(row)
    config, params = checkpoint.load(folder / "run" / "export")
    hidden = model.hidden_states(
        params,
        config,
        jnp.asarray(row.tokens[None]),
        jnp.asarray(row.segment_ids[None]),
        dtype=jnp.float32,
    )
    scores = np.asarray(model.logits(params, config, hidden))[0, :, : small_store.VOCAB]
    p = np.exp(scores.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    assert row.predictions is not None
    for t in np.flatnonzero(row.predicted):
        ids, weights = said.entries.of(int(t))
        assert said.entropy_nats[t] == pytest.approx(-(p[t] * np.log(p[t])).sum(), rel=1e-4)
        assert said.surprise_nats[t] == pytest.approx(-np.log(p[t, row.tokens[t + 1]]), rel=1e-4)
        given = dict(zip(ids.tolist(), weights.tolist(), strict=True))
        assert len(given) == len(ids)
        asked = set(row.predictions.entries.of(int(t))[0].tolist())
        top = set(np.argsort(-p[t])[:12].tolist())
        assert given.keys() == asked | top | {small_store.VOCAB}
        for i in asked | top:
            assert given[i] == pytest.approx(p[t, i], rel=1e-4)
        assert sum(given.values()) == pytest.approx(1, abs=1e-5)
        assert weights.tolist() == sorted(weights.tolist(), reverse=True)
    for t in np.flatnonzero(~row.predicted):
        assert said.entries.of(int(t))[0].size == 0
    # The cross-entropy takes the student's probability of each stored id.
    nats = cross_entropy(row.predictions.entries, said.entries, small_store.VOCAB)
    ids, weights = row.predictions.entries.of(3)
    assert nats[3] == pytest.approx(-(weights * np.log(p[3, ids])).sum(), rel=1e-4)
    bare = found.predict(tokens_row(TokensReader(str(folder / "s")), 1))
    assert bare.entropy_nats == pytest.approx(said.entropy_nats)


def test_a_student_is_compared_with_the_targets(folder):
    url = str(folder / "s")
    stores = web_server.opened(url)
    stores[0].student = student.load(folder / "run" / "export", url)
    with web_server.serving(stores) as address:
        for sides in ("", "&left=student&right=0.default", "&left=0.default&right=student"):
            status, _, text = web_server.ask(address, f"/s/0/compare?sequence=1{sides}")
            assert status == 200
            assert "student run/export" in text
            assert ("unbiased" in text) == ("left=student" not in sides)
        where = "/s/0/compare/1/position/3?left=0.default&right=student"
        assert "(all␣others)" in web_server.ask(address, where)[2]


def test_a_student_of_too_few_ids_is_refused(folder, tmp_path):
    small = TEACHER.model_copy(update={"vocab_size": 299})
    checkpoint.save(tmp_path / "m", small, model.init_params(small, jax.random.key(0)))
    with pytest.raises(ManifestMismatchError, match="has 299"):
        student.load(tmp_path / "m", str(folder / "s"))


def test_pieces_are_the_bytes_of_the_tokenizer(folder):
    tokenizer = tokenizers.Tokenizer.load(folder / "other" / "tokenizer.model")
    pieces = serving.pieces(tokenizer)
    text = "def naïve(self):\n    return 語 \U0001f600 12"
    spelled, begins = pieces.spell(tokenizer.encode(text))
    assert spelled.decode() == text
    assert begins[-1] == len(spelled)
    info = tokenizer.info
    assert pieces.spell(np.array([info.bos_id, info.eos_id, info.pad_id]))[0] == b"\xff" * 3
    assert [pieces.text(i) for i in range(512)] == [tokenizer.piece_text(i) for i in range(512)]


def test_a_tokenizer_beside_a_store_is_taken_and_another_refused(folder, tmp_path):
    url = str(tmp_path / "s")
    small_store.write_store(url)
    assert not serving.open_stores([url], None)[0].has_text
    other = folder / "other" / "tokenizer.model"
    with pytest.raises(ManifestMismatchError, match="give the tokenizer that made the store"):
        serving.open_stores([url], other)
    (tmp_path / "tokenizer.model").write_bytes(other.read_bytes())
    with pytest.raises(ManifestMismatchError, match="give the tokenizer that made the store"):
        serving.open_stores([url], None)
    with pytest.raises(ConfigError, match="must be readable"):
        serving.open_stores([url], tmp_path / "none.model")


@pytest.mark.parametrize(
    ("urls", "labels"),
    [
        (["/a/b/s.zarr"], ["s.zarr"]),
        (["a/s", "b/s/"], ["a/s", "b/s"]),
        (["gs://x/1/s", "gs://x/2/t"], ["s", "t"]),
        (["/a/s", "/a/s"], ["s", "s"]),
    ],
)
def test_stores_are_called_by_what_tells_them_apart(urls, labels):
    assert serving.labels(urls) == labels


def test_the_command_says_its_address_and_ends_with_ctrl_c(folder):
    """On an address that others can reach, with a token of its own."""
    command = [sys.executable, "-m", "pipelines.cli", "serve", str(folder / "s"), "--port", "0"]
    with subprocess.Popen(
        [*command, "--host", "0.0.0.0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[0].replace("0.0.0.0", "127.0.0.1")
        bare, _, token = address.partition("?token=")
        assert len(token) >= 32
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(bare)
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(address) as answer:
            assert answer.status == 200
            assert answer.url == f"{bare}s/0"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == "\nretort serve: ended; the stores are as they were.\n"
