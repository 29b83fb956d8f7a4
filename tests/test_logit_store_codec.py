"""The weight code: exact ends, stated error, no bias."""

import numpy as np
import pytest

from logit_store import codec

CODES = ["log_uint8", "log_uint16"]


@pytest.mark.parametrize("code", CODES)
def test_the_ends_are_exact(code):
    floor = np.float32([0.003, 0.2, 1.0])
    last = np.iinfo(codec.code_dtype(code)).max
    for uniform in (0.0, 0.999):
        noise = np.full(3, uniform)
        ends = codec.encode_weights(floor, floor, noise, code)
        np.testing.assert_array_equal(codec.decode_weights(ends, floor, code), floor)
        assert (ends[:2] == 0).all()
        tops = codec.encode_weights(np.ones(2), floor[:2], noise[:2], code)
        assert (tops == last).all()
    np.testing.assert_array_equal(codec.decode_weights(np.array([last]), floor[:1], code), 1.0)


@pytest.mark.parametrize("code", CODES)
def test_a_weight_at_its_floor_is_code_0_whatever_the_noise(code):
    """Most entries of a threshold sample are at the floor, and exp(log(floor)) may miss it."""
    floor = np.random.default_rng(0).uniform(1e-6, 0.99, 20_000).astype(np.float32)
    assert (codec.encode_weights(floor, floor, np.zeros(floor.size), code) == 0).all()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("floor", [1e-6, 0.01, 0.5])
def test_the_mean_of_decoded_weights_is_the_weight(code, floor):
    """Nearest rounding fails this: its error is a tenth of a step, hundreds of standard errors."""
    draws = 40_000
    rng = np.random.default_rng(0)
    for weight in floor ** rng.uniform(0, 1, 6):
        weights = np.full(draws, weight)
        codes = codec.encode_weights(weights, np.float64(floor), rng.random(draws), code)
        decoded = codec.decode_weights(codes, np.float32(floor), code).astype(np.float64)
        assert len(np.unique(codes)) <= 2
        error = max(decoded.std() / draws**0.5, 2e-7 * weight)
        assert abs(decoded.mean() - weight) < 5 * error


@pytest.mark.parametrize(("code", "bound"), [("log_uint8", 0.0556), ("log_uint16", 2.2e-4)])
def test_a_decoded_weight_is_within_one_step(code, bound):
    """One step of ln(1e6) / 255, and of ln(1e6) / 65535: relative, at a floor of 1e-6."""
    rng = np.random.default_rng(1)
    weights = 1e-6 ** rng.uniform(0, 1, 20_000)
    codes = codec.encode_weights(weights, np.float64(1e-6), rng.random(20_000), code)
    decoded = codec.decode_weights(codes, np.float32(1e-6), code)
    error = np.max(np.abs(decoded / weights - 1))
    assert bound / 2 < error < bound


@pytest.mark.parametrize("weight", [0.009, 1.1, np.nan])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match=r"must lie in \[floor, 1\].*with floor 0.01"):
        codec.encode_weights(np.array([0.5, weight]), np.float64(0.01), np.zeros(2), "log_uint8")
