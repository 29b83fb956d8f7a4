"""A small corpus, a tokenizer and a random teacher, and jobs over them."""

import hashlib
import os
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


def make_world(folder: Path) -> Path:
    """Fill a folder with them; returns it."""
    corpus = folder / "corpus"
    corpus.mkdir()
    library = Path(os.__file__).parent
    names = ("abc.py", "bisect.py", "calendar.py", "heapq.py", "json/decoder.py", "textwrap.py")
    for number, name in enumerate(names):
        (corpus / f"{number}.py").write_bytes((library / name).read_bytes())
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    tokenizers.train(texts, folder / "tokenizer.model", vocab_size=512)
    params = model.init_params(TEACHER, jax.random.key(0))
    checkpoint.save(folder / "teacher", TEACHER, params)
    return folder


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
