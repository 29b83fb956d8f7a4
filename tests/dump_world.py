"""A small corpus, a tokenizer and a random teacher, and jobs over them."""

import gzip
import hashlib
import json
import os
import random
from pathlib import Path

import jax

from gemma2 import checkpoint, model
from schemas.model import ModelConfig
from schemas.runs import CorpusConfig, DumpConfig, SamplerConfig, TokenizeConfig
from teacher_dump import tokenizer as tokenizers

TEACHER = ModelConfig(
    vocab_size=520,
    d_model=32,
    num_layers=2,
    mlp_width=64,
    num_heads=2,
    num_kv_heads=1,
    head_size=16,
    query_scalar=16,
    window_tokens=16,
    max_tokens=64,
)


def make_tokenizer(folder: Path) -> Path:
    """Fill a folder with a corpus and a tokenizer; returns it."""
    corpus = folder / "corpus"
    corpus.mkdir()
    library = Path(os.__file__).parent
    names = ("abc.py", "bisect.py", "calendar.py", "heapq.py", "json/decoder.py", "textwrap.py")
    for number, name in enumerate(names):
        (corpus / f"{number}.py").write_bytes((library / name).read_bytes())
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    tokenizers.train(texts, folder / "tokenizer.model", vocab_size=512)
    return folder


def make_world(folder: Path) -> Path:
    """Fill a folder with all three; returns it."""
    make_tokenizer(folder)
    params = model.init_params(TEACHER, jax.random.key(0))
    checkpoint.save(folder / "teacher", TEACHER, params)
    return folder


POISON = (
    b'{"text": "bad \xff"}\n{"text": oops}\n{"body": "no text"}\n{"text": ""}\n'
    b'{"text": "\\ud83d"}\n{"text": "a\\u0000b"}\n{"text": "' + b"x" * 30_000 + b'"}\n'
)


def rich_corpus(world: Path) -> CorpusConfig:
    """A mixture of good, bad, repeated and unwanted documents, with every filter on."""
    folder = world / "rich"
    if not folder.exists():
        folder.mkdir()
        lines = (Path(os.__file__).parent / "argparse.py").read_text().split("\n")
        texts = ["\n".join(lines[at : at + 20]) for at in range(0, 1200, 20)]
        near = [texts[number].replace("self", "this", 1) for number in range(10, 20)]
        mail = [f"{texts[30]} by someone{n}@example.com from 192.0.2.{n}" for n in range(3)]
        evaluated = "the answer to the forty second question of this set is always the same word"
        odd = ["blocked word " * 9, f"It is said that {evaluated} and so on.", "s" * 40, "tiny"]
        odd.append("a short but fine text, no more")
        documents = [*texts, *texts[:5], *near, *mail, *odd]
        random.Random(1).shuffle(documents)
        good = [json.dumps({"a": {"text": text}}) + "\n" for text in documents]
        nested = b"".join(b'{"a": ' + line + b"}\n" for line in POISON.splitlines())
        (folder / "lines.jsonl").write_bytes("".join(good[:40]).encode() + nested)
        (folder / "more.jsonl.gz").write_bytes(gzip.compress("".join(good[40:]).encode()))
        cut = gzip.compress("".join(good[:9]).encode(), mtime=0)
        (folder / "cut.jsonl.gz").write_bytes(cut[:-100])
        (world / "evaluation.txt").write_text(evaluated)
        (world / "blocked.txt").write_text("# words\nblocked word\n")
    return CorpusConfig.model_validate(
        {
            "mixture": [
                {"paths": [str(world / "corpus"), f"{folder}/more.*"], "weight": 2},
                {"paths": [f"{folder}/[a-l]*.jsonl*"], "weight": 1},
            ],
            "mixture_seed": 5,
            "mixture_epochs": 1.5,
            "text_field": "a.text",
            "max_document_bytes": 28_000,
            "min_characters": 10,
            "quality": {"max_word_characters": 30},
            "language": {"min_probability": 0.1},
            "blocklist": {"file": str(world / "blocked.txt"), "max_hits": 2},
            "scorer": {"function": "builtins:len", "threshold": 50},
            "decontamination": {"paths": [str(world / "evaluation.txt")], "ngram_words": 8},
            "masking": {"kinds": ["email", "ip"]},
            "duplicates": {"exact": True, "near": True},
        }
    )


def tokenize_config(world: Path, store: Path, **changes: object) -> TokenizeConfig:
    return TokenizeConfig(
        store=str(store),
        corpus=CorpusConfig(paths=(str(world / "corpus"),)),
        tokenizer=world / "tokenizer.model",
        sequence_tokens=64,
        shard_sequences=16,
        split_bytes=16_000,
    ).model_copy(update=changes)


def dump_config(world: Path, store: Path, **changes: object) -> DumpConfig:
    return DumpConfig(
        store=str(store),
        teacher=world / "teacher",
        sampler=SamplerConfig(entries_per_token=4, block_tokens=32),
        batch_sequences=4,
        dtype="float32",
    ).model_copy(update=changes)


def digest(store: Path) -> dict[str, str]:
    """SHA-256 of every file, but for what runs say of themselves, which has times in it."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.relative_to(store).parts[0] != "reports"
    }


def flags(document: TokenizeConfig | DumpConfig) -> list[str]:
    found = []
    for key, value in document.model_dump(mode="json", exclude_defaults=True).items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        for inner, item in nested:
            for single in item if isinstance(item, list | tuple) else [item]:
                found.append(f"--{key}.{inner}={single}" if inner else f"--{key}={single}")
    return found
