"""The published Gemma 2 sizes, small ones for tests and machines without accelerators, and files.

Widths are those that give the technical report's parameter counts to the unit (arXiv 2408.00118).
"""

from pathlib import Path

from schemas.base import load_yaml
from schemas.errors import ConfigError
from schemas.model import ModelConfig

VOCAB_ROWS = 256_128

PRESETS: dict[str, ModelConfig] = {
    "gemma2-2.6b": ModelConfig(
        vocab_size=VOCAB_ROWS,
        d_model=2304,
        num_layers=26,
        mlp_width=9216,
        num_heads=8,
        num_kv_heads=4,
        head_size=256,
        query_scalar=256,
    ),
    "gemma2-9b": ModelConfig(
        vocab_size=VOCAB_ROWS,
        d_model=3584,
        num_layers=42,
        mlp_width=14336,
        num_heads=16,
        num_kv_heads=8,
        head_size=256,
        query_scalar=256,
    ),
    "gemma2-27b": ModelConfig(
        vocab_size=VOCAB_ROWS,
        d_model=4608,
        num_layers=46,
        mlp_width=36864,
        num_heads=32,
        num_kv_heads=16,
        head_size=128,
        query_scalar=4608 // 32,
    ),
    "tiny": ModelConfig(
        vocab_size=512,
        d_model=64,
        num_layers=2,
        mlp_width=128,
        num_heads=2,
        num_kv_heads=1,
        head_size=32,
        query_scalar=32,
        window_tokens=16,
        max_tokens=128,
    ),
    "mini": ModelConfig(
        vocab_size=4096,
        d_model=128,
        num_layers=4,
        mlp_width=384,
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        query_scalar=32,
        window_tokens=128,
        max_tokens=1024,
    ),
    "small": ModelConfig(
        vocab_size=8192,
        d_model=256,
        num_layers=6,
        mlp_width=768,
        num_heads=8,
        num_kv_heads=4,
        head_size=32,
        query_scalar=32,
        window_tokens=256,
        max_tokens=2048,
    ),
}


def resolve(name_or_path: str) -> ModelConfig:
    """A preset by name, or a ModelConfig from a YAML or JSON file. Raises ConfigError."""
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    if Path(name_or_path).is_file():
        return ModelConfig.parse(load_yaml(name_or_path), name_or_path)
    raise ConfigError(
        f"model must be a preset ({', '.join(PRESETS)}) or a YAML or JSON file, but "
        f"'{name_or_path}' is neither; correct the name or the path."
    )
