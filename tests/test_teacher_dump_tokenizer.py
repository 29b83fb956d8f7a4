"""The tokenizer: nothing of a text is lost, bytes add up, training is deterministic."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ConfigError
from teacher_dump import tokenizer as tokenizers
from teacher_dump.tokenizer import Tokenizer, train

HARD_TEXTS = [
    "def f(x):\n\tif x == 1234:\r\n        return 'é😀'\n\n\n  end",
    "    four\n            twelve\n                                              many",
    "  leads and trails  ",
    "\t\t\n\n\n\r\n\r",
    "東京 ﬁ ½ \uff21\u00a0\u200b\u0301 \x00\x0b\x0c",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    " ",
    "",
]


def sources() -> list[str]:
    folder = Path(tokenizers.__file__).parents[1]
    texts = [
        path.read_text()
        for room in ("teacher_dump", "schemas")
        for path in sorted((folder / room).glob("*.py"))
    ]
    # A number so frequent that it would be one piece, were digits not split.
    return [*texts, "n = 12345\n" * 500]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "model" / "small.model"
    train(sources(), path, vocab_size=700)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_file: Path) -> Tokenizer:
    return Tokenizer.load(model_file)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes()[ids].sum() == len(text.encode())


# "▁" is how SentencePiece writes a space: the one character that does not survive.
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60))
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes()[ids].sum() == len(text.encode())


def test_sentencepiece_itself_decodes_to_the_same(model_file: Path, tokenizer: Tokenizer) -> None:
    peer = spm.SentencePieceProcessor(model_file=str(model_file))
    for text in HARD_TEXTS:
        assert peer.decode(tokenizer.encode(text).tolist()) == text


def test_special_ids_are_gemmas(tokenizer: Tokenizer) -> None:
    info = tokenizer.info
    assert (info.pad_id, info.eos_id, info.bos_id, info.vocab_size) == (0, 1, 2, 700)
    document = tokenizer.encode_document("x = 1\n")
    assert document.dtype == np.int32
    assert (document[0], document[-1]) == (2, 1)
    np.testing.assert_array_equal(document[1:-1], tokenizer.encode("x = 1\n"))
    assert tokenizer.piece_bytes()[[0, 1, 2, 3]].tolist() == [0, 0, 0, 0]
    assert tokenizer.decode(document) == "x = 1\n"


def test_pieces_split_digits_and_hold_white_space(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.piece_text(int(i)) for i in tokenizer.encode("12345")]
    assert pieces == list("12345")
    for piece in ("\n", "\n\n", "\t", "    ", "        "):
        assert [tokenizer.piece_text(int(i)) for i in tokenizer.encode(piece)] == [piece]
    assert tokenizer.piece_text(2) == "<s>"
    assert tokenizer.piece_text(int(tokenizer.encode("😀")[0])) == "<0xF0>"


def test_equal_texts_give_an_equal_model(tmp_path: Path, model_file: Path) -> None:
    train(iter(sources()), tmp_path / "again.model", vocab_size=700)
    assert (tmp_path / "again.model").read_bytes() == model_file.read_bytes()


def test_training_reads_an_even_share_of_a_large_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "_TRAINING_BYTES", 1000)
    lines = tokenizers._lines(f"line {n:04d}\n\n" for n in range(1000))
    assert 800 < sum(len(line) for line in lines) < 1200
    numbers = [int(line.split()[1]) for line in lines]
    assert len(set(np.diff(numbers))) == 1
    assert numbers[-1] > 980


def test_a_changed_file_is_read_again(tmp_path: Path, model_file: Path) -> None:
    path = tmp_path / "t.model"
    shutil.copy(model_file, path)
    before = Tokenizer.load(path)
    assert Tokenizer.load(path) is before
    train(sources(), path, vocab_size=600)
    assert Tokenizer.load(path).info.vocab_size == 600


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be large enough for a tokenizer of 5000 pieces"):
        train(["a b c"], tmp_path / "x.model", vocab_size=5000)
    assert not (tmp_path / "x.model").exists()


def test_a_missing_or_wrong_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be readable, but .*absent\.model is not"):
        Tokenizer.load(tmp_path / "absent.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(
        ConfigError, match=r"must be a SentencePiece model, but .*bad\.model is not"
    ):
        Tokenizer.load(tmp_path / "bad.model")


def test_a_model_without_padding_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tokenizers._OPTIONS, "pad_id", -1)
    train(sources(), tmp_path / "x.model", vocab_size=700)
    with pytest.raises(ConfigError, match=r"x\.model has no pad_id; use one trained with it"):
        Tokenizer.load(tmp_path / "x.model")
