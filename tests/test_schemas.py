"""The contracts: strict, canonical, and printed as JSON Schema."""

from pathlib import Path

import pytest

from schemas import export
from schemas.errors import ConfigError
from schemas.manifest import LedgerRecord, SamplerSpec, ShardSpec, ShardStatistics
from schemas.model import ModelConfig
from schemas.runs import TrainConfig


def test_the_printed_schemas_are_current():
    """If this fails: python -m schemas.export docs/schemas."""
    folder = Path(__file__).parents[1] / "docs" / "schemas"
    assert {path.name: path.read_text() for path in folder.iterdir()} == export.schemas()


def test_an_unknown_key_is_named():
    with pytest.raises(ConfigError, match=r"here: stpes is not a known field; remove it"):
        TrainConfig.parse({"store": "s", "out": "o", "stpes": 3}, "here")


def test_documents_are_frozen_and_equal_ones_have_equal_fingerprints():
    spec = SamplerSpec(entries_per_token=5)
    with pytest.raises(ValueError, match="frozen"):
        spec.entries_per_token = 6
    assert spec.fingerprint() == SamplerSpec(name="threshold", entries_per_token=5).fingerprint()
    assert spec.fingerprint() != SamplerSpec(entries_per_token=6).fingerprint()


def test_a_record_that_was_altered_is_not_intact():
    spec = ShardSpec(manifest_fingerprint="f", index=0, first_row=0, stop_row=2)
    record = LedgerRecord(
        spec=spec, tokens_sha256="0", files=(), statistics=ShardStatistics(tokens=3)
    ).sealed()
    assert record.is_intact()
    assert not record.model_copy(update={"statistics": ShardStatistics(tokens=4)}).is_intact()
    assert len(spec.canonical_json()) < 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "must be even.*it is 3"),
        ({"num_kv_heads": 3}, "3 does not divide 4"),
        ({"head_size": 7}, "even for rotary halves; it is 7"),
    ],
)
def test_models_that_cannot_be_are_refused(change, message):
    good = {
        "vocab_size": 8,
        "d_model": 8,
        "num_layers": 2,
        "mlp_width": 8,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 8,
        "query_scalar": 8,
    }
    ModelConfig.parse(good, "model")
    with pytest.raises(ConfigError, match=message):
        ModelConfig.parse(good | change, "model")
