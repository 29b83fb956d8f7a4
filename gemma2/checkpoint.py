"""Gemma 2 checkpoints in Hugging Face's form: `config.json` and safetensors, one file or sharded.

Loading reads one tensor at a time; saving writes a whole folder and renames it into place.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gemma2.model import Params, init_params
from gemma2.placement import ALONE, Placement
from schemas.errors import CheckpointError
from schemas.model import TOKENIZER_FILE, ModelConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD_FILE = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

# Ours in a layer -> (theirs, whether theirs is transposed).
_LAYER_TENSORS = {
    ("attention", "query", "kernel"): ("self_attn.q_proj.weight", True),
    ("attention", "key", "kernel"): ("self_attn.k_proj.weight", True),
    ("attention", "value", "kernel"): ("self_attn.v_proj.weight", True),
    ("attention", "output", "kernel"): ("self_attn.o_proj.weight", True),
    ("mlp", "gate", "kernel"): ("mlp.gate_proj.weight", True),
    ("mlp", "up", "kernel"): ("mlp.up_proj.weight", True),
    ("mlp", "down", "kernel"): ("mlp.down_proj.weight", True),
    ("pre_attention_norm", "weight"): ("input_layernorm.weight", False),
    ("post_attention_norm", "weight"): ("post_attention_layernorm.weight", False),
    ("pre_mlp_norm", "weight"): ("pre_feedforward_layernorm.weight", False),
    ("post_mlp_norm", "weight"): ("post_feedforward_layernorm.weight", False),
}
_LAYERS_OF_PAIR = ("local_layer", "global_layer")
# Ours -> theirs in config.json, one to one.
_CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "mlp_width": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "query_scalar": "query_pre_attn_scalar",
    "window_tokens": "sliding_window",
    "attention_cap": "attn_logit_softcapping",
    "final_cap": "final_logit_softcapping",
    "norm_epsilon": "rms_norm_eps",
    "max_tokens": "max_position_embeddings",
}
_FIXED_CONFIG = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_cache": True,
}


def load(
    folder: str | Path, dtype: DTypeLike | None = None, placement: Placement = ALONE
) -> tuple[ModelConfig, Params]:
    """The configuration and parameters of a checkpoint, in `dtype` (default: as stored).

    Each tensor goes where the placement says as soon as it is read, a part to each device, and is
    turned, cast and put into its stack of layers there: the host never holds more than one.

    Raises CheckpointError naming what is missing, unexpected or of another shape.
    """
    folder = Path(folder)
    config = load_config(folder)
    files = _tensor_files(folder)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    expected = _names(config)
    missing = sorted(name for names in expected.values() for name, _ in names if name not in files)
    if missing:
        raise CheckpointError(
            f"A checkpoint must hold every tensor of its config, but {folder} lacks "
            f"{len(missing)}: {', '.join(missing[:4])}; restore the files."
        )
    known = {name for names in expected.values() for name, _ in names} | {"lm_head.weight"}
    unexpected = sorted(files.keys() - known)
    if unexpected:
        raise CheckpointError(
            f"A checkpoint must hold Gemma 2's tensors and no others, but {folder} has "
            f"{', '.join(unexpected[:4])}; check that config.json belongs to the weights."
        )
    flat = dict(jax.tree_util.tree_flatten_with_path(shapes)[0])
    wanted_dtype = None if dtype is None else jnp.dtype(dtype)
    leaves = []
    for path, shape in flat.items():
        key = _path(path)
        where = placement.sharding(path, shape.shape)
        if key[0] == "pairs":
            leaves.append(_load_stack(shape.shape, expected[key], files, wanted_dtype, where))
            continue
        [(name, transposed)] = expected[key]
        value = _read(files[name], name, shape.shape, transposed)
        leaf = jnp.asarray(value) if where is None else jax.device_put(value, where)
        leaves.append(leaf if wanted_dtype is None else leaf.astype(wanted_dtype))
    return config, jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _load_stack(
    shape: tuple[int, ...],
    names: list[tuple[str, bool]],
    files: dict[str, Path],
    dtype: np.dtype | None,
    where: NamedSharding | None,
) -> Array:
    """The tensors of these names and whether they are transposed, on a first axis of their own."""
    stack = None
    for index, (name, transposed) in enumerate(names):
        part = jax.device_put(
            _read(files[name], name, shape[1:], transposed, as_stored=True),
            None if where is None else _of_part(where, len(shape), transposed),
        )
        if stack is None:
            stack = jnp.zeros(shape, dtype or part.dtype, device=where)
        stack = _writer(transposed, where)(stack, part, jnp.int32(index))
        # Else the host would read on while devices take what it has read.
        stack.block_until_ready()
    assert stack is not None
    return stack


def _of_part(where: NamedSharding, dimensions: int, transposed: bool) -> NamedSharding:
    """Where one of a stack's tensors lies, in the orientation in which it is stored."""
    cuts = [*where.spec, *[None] * (dimensions - len(where.spec))][1:]
    return NamedSharding(where.mesh, PartitionSpec(*(reversed(cuts) if transposed else cuts)))


@lru_cache
def _writer(
    transposed: bool, where: NamedSharding | None
) -> Callable[[Array, Array, Array], Array]:
    """put(stack, part, index): the stack, in its own memory, with the part at an index."""

    def put(stack: Array, part: Array, index: Array) -> Array:
        part = part.T if transposed else part
        return lax.dynamic_update_index_in_dim(stack, part.astype(stack.dtype), index, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=where)


def load_embedding(folder: str | Path) -> np.ndarray:
    """The embedding [V, D] alone, as stored. Raises CheckpointError."""
    config = load_config(folder)
    [(name, transposed)] = _names(config)[("embedding",)]
    files = _tensor_files(Path(folder))
    if name not in files:
        raise CheckpointError(f"A checkpoint must hold {name}, but {folder} lacks it; restore it.")
    return _read(files[name], name, (config.vocab_size, config.d_model), transposed)


def load_config(folder: str | Path) -> ModelConfig:
    """The configuration of a checkpoint. Raises CheckpointError if it is not a Gemma 2."""
    path = Path(folder) / CONFIG_FILE
    try:
        stored = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(
            f"A checkpoint must be a folder with {CONFIG_FILE}, but {path} cannot be read "
            f"({error.strerror}); check the path."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{CONFIG_FILE} must be JSON, but {path} is not: {error}") from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"{CONFIG_FILE} must hold key: value pairs, but {path} does not.")
    for key in ("model_type", "hidden_activation", "tie_word_embeddings", "attention_bias"):
        if stored.get(key, _FIXED_CONFIG[key]) != _FIXED_CONFIG[key]:
            raise CheckpointError(
                f"A teacher or student must be a Gemma 2 with {key} = {_FIXED_CONFIG[key]}, but "
                f"{path} has {stored[key]}; give a Gemma 2 checkpoint."
            )
    wanted = _layer_types(stored.get("num_hidden_layers", 0))
    if stored.get("layer_types") not in (None, wanted):
        raise CheckpointError(
            f"Layers must alternate sliding and full attention, sliding first, but {path} has "
            f"{stored['layer_types'][:4]}…; give a Gemma 2 checkpoint."
        )
    rope = stored.get("rope_parameters") or {}
    values = {ours: stored[theirs] for ours, theirs in _CONFIG_KEYS.items() if theirs in stored}
    values["rope_base"] = rope.get("rope_theta", stored.get("rope_theta", 10_000.0))
    return ModelConfig.parse(values, str(path))


def save(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Path | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a folder that transformers opens: config, weights in their dtype, `tokenizer.model`.

    The folder appears whole or not at all; an existing one is replaced if all that it holds was
    written by this function, and otherwise refused by CheckpointError: it may be the user's.
    """
    folder = Path(folder)
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        dtype = jax.tree.leaves(params)[0].dtype.name
        (work / CONFIG_FILE).write_text(json.dumps(_hf_config(config, dtype), indent=2) + "\n")
        _save_weights(work, config, params, max_shard_bytes)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, work / TOKENIZER_FILE)
        for file in work.iterdir():
            _sync(file)
        _sync(work)
        work.chmod(0o755)
        if folder.exists():
            # Moved away, not deleted, first: at every moment one whole checkpoint is on disk.
            old = work.with_name(f"{work.name}-old")
            os.replace(folder, old)
            os.replace(work, folder)
            shutil.rmtree(old)
        else:
            os.replace(work, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def fingerprint(folder: str | Path) -> tuple[str, str]:
    """SHA-256 of the config (as this code understands it) and of the weight files' bytes."""
    return load_config(folder).fingerprint(), weights_fingerprint(folder)


def weights_fingerprint(folder: str | Path) -> str:
    """SHA-256 of the weight files' bytes, of whatever model. Raises CheckpointError."""
    digest = hashlib.sha256()
    for file in sorted(set(_tensor_files(Path(folder)).values())):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def load_tensor(folder: str | Path, names: Iterable[str]) -> np.ndarray | None:
    """The first of these tensors that a folder of whatever model holds, as stored, or None."""
    files = _tensor_files(Path(folder))
    found = next((name for name in names if name in files), None)
    return None if found is None else _tensor(files[found], found)


def _hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    values = config.model_dump()
    return (
        _FIXED_CONFIG
        | {theirs: values[ours] for ours, theirs in _CONFIG_KEYS.items()}
        | {
            "layer_types": _layer_types(config.num_layers),
            "rope_theta": config.rope_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "dtype": dtype,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        }
    )


def _layer_types(num_layers: int) -> list[str]:
    return ["sliding_attention", "full_attention"] * (num_layers // 2)


def _names(config: ModelConfig) -> dict[tuple[str, ...], list[tuple[str, bool]]]:
    """For each of our tensors, theirs in stacking order and whether they are transposed."""
    names: dict[tuple[str, ...], list[tuple[str, bool]]] = {
        ("embedding",): [("model.embed_tokens.weight", False)],
        ("final_norm", "weight"): [("model.norm.weight", False)],
    }
    for offset, layer in enumerate(_LAYERS_OF_PAIR):
        for ours, (theirs, transposed) in _LAYER_TENSORS.items():
            names[("pairs", layer, *ours)] = [
                (f"model.layers.{index}.{theirs}", transposed)
                for index in range(offset, config.num_layers, 2)
            ]
    return names


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name to file. Raises CheckpointError if a file is missing or damaged."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            stored = json.loads(index.read_text())["weight_map"]
            files = {name: folder / file for name, file in stored.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{INDEX_FILE} must hold a weight_map, but {index} does not ({error!r}); restore "
                "it."
            ) from error
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise CheckpointError(
                    f"Every file of {INDEX_FILE} must be there, but {file} is not; restore it."
                )
        return files
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(
            f"A checkpoint must hold {WEIGHTS_FILE} or {INDEX_FILE}, but {folder} holds neither; "
            "convert the weights to safetensors."
        )
    return {name: path for name in _keys(path)}


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="np") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"Weights must be a whole safetensors file, but {path} is not ({error}); restore it."
        ) from error


def _read(
    path: Path, name: str, shape: tuple[int, ...], transposed: bool, as_stored: bool = False
) -> np.ndarray:
    """One tensor, which in our orientation has `shape`; in ours, or as it is stored."""
    value = _tensor(path, name)
    wanted = shape[::-1] if transposed else shape
    if value.shape != wanted:
        raise CheckpointError(
            f"Tensors must have the shape that {CONFIG_FILE} implies, {wanted} for {name}, but "
            f"in {path} it is {value.shape}; check that config and weights belong together."
        )
    return value.T if transposed and not as_stored else value


def _tensor(path: Path, name: str) -> np.ndarray:
    try:
        with safe_open(path, framework="np") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"Weights must be a whole safetensors file with {name}, but {path} is not ({error}); "
            "restore it."
        ) from error


def _tensors(config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors in the order of their layers, made one at a time."""
    flat = {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    for key, names in _names(config).items():
        value = np.asarray(flat[key])
        for index, (name, transposed) in enumerate(names):
            part = value[index] if key[0] == "pairs" else value
            yield name, np.ascontiguousarray(part.T if transposed else part)


def _save_weights(folder: Path, config: ModelConfig, params: Params, max_shard_bytes: int) -> None:
    shards: list[dict[str, int]] = [{}]
    size = total = 0
    for name, value in _tensors(config, params):
        if shards[-1] and size + value.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value.nbytes
        size += value.nbytes
        total += value.nbytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        save_file(dict(_tensors(config, params)), folder / WEIGHTS_FILE, metadata=metadata)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        chosen = {name: value for name, value in _tensors(config, params) if name in shard}
        save_file(chosen, folder / file, metadata=metadata)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _path(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(entry.key for entry in path)


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(
            f"A checkpoint is a folder, but {folder} is a file; choose another path."
        )
    ours = {CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, TOKENIZER_FILE}
    foreign = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name not in ours and not _SHARD_FILE.fullmatch(entry.name)
    )
    if foreign:
        raise CheckpointError(
            f"Only a checkpoint may be replaced, but {folder} also holds {', '.join(foreign[:4])}; "
            "choose another folder or remove it yourself."
        )


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
