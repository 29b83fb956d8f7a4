"""The model's configuration: everything that decides Gemma 2's shape and arithmetic."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.base import NAMES_NONE, Document

Remat = Annotated[Literal["none", "dots", "attention", "full"], NAMES_NONE]

# The SentencePiece model beside a model's weights or beside a store.
TOKENIZER_FILE = "tokenizer.model"


class ModelConfig(Document):
    """A Gemma 2 decoder (arXiv 2408.00118); `gemma2.presets` has the published sizes."""

    vocab_size: int = Field(gt=0, description="Rows of the tied embedding.")
    d_model: int = Field(gt=0)
    num_layers: int = Field(gt=0, description="Even: local and global layers alternate.")
    mlp_width: int = Field(gt=0, description="Width of gate and of up, each.")
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_size: int = Field(gt=0, description="Even, for rotary halves.")
    query_scalar: int = Field(gt=0, description="Queries are scaled by query_scalar ** -0.5.")
    window_tokens: int = Field(
        4096, gt=0, description="Keys a local layer sees, the query's own position included."
    )
    attention_cap: float | None = Field(50.0, gt=0)
    final_cap: float | None = Field(30.0, gt=0)
    rope_base: float = Field(10_000.0, gt=0)
    norm_epsilon: float = Field(1e-6, gt=0)
    max_tokens: int = Field(8192, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_layers % 2:
            raise ValueError(
                f"num_layers must be even, as layers alternate in pairs; it is {self.num_layers}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads; {self.num_kv_heads} does not divide "
                f"{self.num_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size must be even for rotary halves; it is {self.head_size}")
        return self
