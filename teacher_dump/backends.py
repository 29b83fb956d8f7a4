"""Which code computes a teacher: ours in JAX for Gemma 2, transformers for any other causal model.

What a driver asks of a folder before anything is computed is here too. PyTorch is imported only
where it computes or is asked about a model.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gemma2 import checkpoint
from schemas.errors import CheckpointError, ConfigError, ManifestMismatchError
from schemas.manifest import Backend, TeacherDtype, TeacherInfo, TokenizerInfo
from schemas.model import TOKENIZER_FILE
from teacher_dump.teacher import Gemma2Teacher, Teacher, check_ids

_GEMMA2 = "gemma2"
_TOKENIZER_JSON = "tokenizer.json"
# What transformers notes down of a save, and says nothing of the model.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


def choose(wanted: Literal["auto", "jax", "transformers"], folder: str | Path) -> Backend:
    """The backend for a folder. Raises CheckpointError if it has no readable config."""
    if wanted != "auto":
        return wanted
    return "jax" if _stored_config(folder).get("model_type") == _GEMMA2 else "transformers"


def check_dtype(backend: Backend, dtype: TeacherDtype) -> None:
    """Raise ConfigError if a backend does not have this arithmetic."""
    if backend == "transformers" and dtype == "float8":
        raise ConfigError(
            "dtype float8 is for Gemma 2 teachers in JAX, but the backend is transformers; use "
            "bfloat16."
        )


def describe(backend: Backend, folder: str | Path, vocab_size: int) -> TeacherInfo:
    """Who the teacher in a folder is, without loading it; reads all its bytes.

    Raises CheckpointError if it is none for this backend, and, before weights are read, ConfigError
    if its config says that it has fewer ids than `vocab_size`.
    """
    ids = _config_ids(backend, folder)
    if ids is not None:
        check_ids(folder, ids, vocab_size)
    if backend == "jax":
        config_sha256, weights_sha256 = checkpoint.fingerprint(folder)
    else:
        stored = _stored_config(folder)
        kept = {key: value for key, value in stored.items() if key not in _NOT_THE_MODEL}
        text = json.dumps(kept, sort_keys=True)
        config_sha256 = hashlib.sha256(text.encode()).hexdigest()
        weights_sha256 = checkpoint.weights_fingerprint(folder)
    return TeacherInfo(
        name=Path(folder).resolve().name,
        config_sha256=config_sha256,
        weights_sha256=weights_sha256,
        vocab_size=vocab_size,
        backend=backend,
    )


def load(
    backend: Backend, folder: str | Path, dtype: str, vocab_size: int, devices: int = 1
) -> Teacher:
    """The teacher in a folder, in `dtype`, on so many of this process's devices.

    Raises CheckpointError, ConfigError if the teacher knows fewer ids or cannot be shared so, and
    MissingDependencyError.
    """
    if backend == "jax":
        return Gemma2Teacher.load(folder, dtype, vocab_size, devices)
    from teacher_dump.transformers_teacher import TransformersTeacher

    info = describe(backend, folder, vocab_size)
    return TransformersTeacher.load(info, folder, dtype, devices)


def load_embedding(backend: Backend, folder: str | Path) -> np.ndarray:
    """What the head multiplies hidden states with, [V, D] as stored. Raises CheckpointError."""
    if backend == "jax":
        return checkpoint.load_embedding(folder)
    from teacher_dump.transformers_teacher import head_names

    names = head_names(folder)
    found = checkpoint.load_tensor(folder, names)
    if found is None or found.ndim != 2:
        raise CheckpointError(
            f"A teacher must have a matrix from hidden states to ids, but {folder} has none of "
            f"{', '.join(names)}; the sampler systematic needs it, multinomial does not."
        )
    return found


def check_tokenizer(folder: str | Path, tokenizer: TokenizerInfo) -> None:
    """Raise ManifestMismatchError if the folder's tokenizer is not the store's.

    `tokenizer.model` and `tokenizer.json` are compared with the store's by SHA-256, one of them
    must be it. A `tokenizer.json` alone, which no SentencePiece file equals, must have as many ids.
    A folder with neither is taken at its word.
    """
    paths = [Path(folder) / name for name in (TOKENIZER_FILE, _TOKENIZER_JSON)]
    found = {path: path.read_bytes() for path in paths if path.is_file()}
    digests = {path.name: hashlib.sha256(raw).hexdigest() for path, raw in found.items()}
    if not found or tokenizer.sha256 in digests.values():
        return
    sizes = ""
    if TOKENIZER_FILE not in digests:
        ids = _json_ids(paths[1], found[paths[1]])
        if ids == tokenizer.vocab_size:
            return
        sizes = f" ({ids} ids)"
    name, digest = next(iter(digests.items()))
    raise ManifestMismatchError(
        f"A teacher must have the store's tokenizer, but {name} in {folder} is {digest}{sizes} and "
        f"the store was tokenized with {tokenizer.sha256} ({tokenizer.vocab_size} ids); give the "
        "teacher that belongs to the tokens, or tokenize with its tokenizer."
    )


def _json_ids(path: Path, raw: bytes) -> int:
    """How many ids a `tokenizer.json` has."""
    try:
        stored = json.loads(raw)
        pieces = stored["model"]["vocab"]
        ids = pieces.values() if isinstance(pieces, dict) else range(len(pieces))
        return 1 + max([*ids, *(token["id"] for token in stored.get("added_tokens", []))])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path.name} must be a tokenizer's, with a vocabulary, but {path} is not ({error!r}); "
            "restore it."
        ) from error


def _config_ids(backend: Backend, folder: str | Path) -> int | None:
    """How many ids a folder's config says that its model has; None if it leaves that open."""
    if backend == "jax":
        return checkpoint.load_config(folder).vocab_size
    stored = _stored_config(folder)
    # Models that also see or hear keep what is the language model's in a section of its own.
    text = stored.get("text_config")
    found = (text if isinstance(text, dict) else stored).get("vocab_size")
    return found if isinstance(found, int) else None


def _stored_config(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / checkpoint.CONFIG_FILE
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"A teacher must be a folder with {checkpoint.CONFIG_FILE}, but {path} cannot be read "
            f"({error}); check the path."
        ) from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"A teacher's {path.name} must hold key: value pairs: {path}.")
    return stored
