"""The contracts: strict, canonical, and printed as JSON Schema."""

from pathlib import Path

import pytest

from schemas import export
from schemas.errors import ConfigError
from schemas.manifest import LedgerRecord, ShardSpec, ShardStatistics
from schemas.model import ModelConfig
from schemas.runs import SamplerConfig, TrainConfig


def test_the_printed_schemas_are_current():
    """If this fails: python -m schemas.export docs/schemas."""
    folder = Path(__file__).parents[1] / "docs" / "schemas"
    assert {path.name: path.read_text() for path in folder.iterdir()} == export.schemas()


def test_an_unknown_key_is_named():
    with pytest.raises(ConfigError, match=r"here: stpes is not a known field; remove it"):
        TrainConfig.parse({"store": "s", "out": "o", "stpes": 3}, "here")


def test_documents_are_frozen_and_equal_ones_have_equal_fingerprints():
    spec = SamplerConfig(entries_per_token=5)
    with pytest.raises(ValueError, match="frozen"):
        spec.entries_per_token = 6
    assert spec.fingerprint() == SamplerConfig(name="systematic", entries_per_token=5).fingerprint()
    assert spec.fingerprint() != SamplerConfig(entries_per_token=6).fingerprint()


@pytest.mark.parametrize(
    ("name", "points", "slots"),
    [("systematic", 40, 18), ("multinomial", 40, 18), ("top_k", 65_535, 13), ("full", 65_535, 99)],
)
def test_a_sampler_is_made_definite(name, points, slots):
    spec = SamplerConfig(name=name, entries_per_token=12).spec(40, 2048, 99)
    assert (spec.points, spec.slots_per_token, spec.block_tokens) == (points, slots, 1024)
    assert SamplerConfig(name=name).spec(40, 100, 99).block_tokens == 100


def test_points_are_for_samplers_that_have_them():
    with pytest.raises(ConfigError, match="points must be given for systematic or multinomial"):
        SamplerConfig.parse({"name": "top_k", "points": 3}, "here")


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
