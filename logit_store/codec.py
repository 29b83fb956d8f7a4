"""The weight code: a weight in [floor, 1] as one or two bytes on a log scale, unbiased.

w = floor ** (1 - code / C), C = 255 or 65535: code 0 is the block's floor exactly, code C is 1. A
decoded weight is off by less than one step, relatively floor ** (-1 / C) - 1: for a floor of 0.01
that is 1.9 % of the weight with one byte and 0.007 % with two.
"""

import numpy as np

from schemas.manifest import WeightCode

_DTYPES: dict[WeightCode, np.dtype] = {
    "log_uint8": np.dtype(np.uint8),
    "log_uint16": np.dtype(np.uint16),
}
# A weight may miss [floor, 1] by this much, relatively: float32 rounding of its producer.
_SLACK = 1e-5


def code_dtype(code: WeightCode) -> np.dtype:
    """The stored dtype of a weight code."""
    return _DTYPES[code]


def encode_weights(
    weights: np.ndarray, floor: np.ndarray, uniforms: np.ndarray, code: WeightCode
) -> np.ndarray:
    """Codes of `weights`, rounded at random so that the mean of the decoded value is the weight.

    weights float [...] in [floor, 1]; floor float broadcastable to it, in (0, 1]; uniforms float
    [...] in [0, 1). Between neighbouring codes with values a < b, w becomes b with probability
    (w - a) / (b - a). Raises ValueError on a weight outside [floor, 1].
    """
    last = np.iinfo(_DTYPES[code]).max
    weights = np.asarray(weights, np.float64)
    floor = np.broadcast_to(np.asarray(floor, np.float64), weights.shape)
    bad = ~((weights >= floor * (1 - _SLACK)) & (weights <= 1 + _SLACK) & (floor > 0))
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"A weight must lie in [floor, 1] with floor > 0, but at {where} it is "
            f"{weights[where]} with floor {floor[where]}."
        )
    weights = np.clip(weights, floor, 1.0)
    log_floor = np.log(floor)
    # Where the floor is 1 every code means 1; any step would do.
    step = np.where(log_floor < 0, -log_floor / last, 1.0)
    lower = np.clip(np.floor((np.log(weights) - log_floor) / step), 0, last - 1)
    a = np.exp(log_floor * (1 - lower / last))
    b = np.exp(log_floor * (1 - (lower + 1) / last))
    gap = b - a
    # exp(log(floor)) may miss the floor by a bit, but a weight at the floor is code 0 for certain.
    rounds = (gap > 0) & (weights > floor)
    chance = np.divide(weights - a, gap, out=np.zeros_like(gap), where=rounds)
    return (lower + (uniforms < chance)).astype(_DTYPES[code])


def decode_weights(codes: np.ndarray, floor: np.ndarray, code: WeightCode) -> np.ndarray:
    """Weights float32 of the codes' shape; floor broadcasts to it."""
    last = np.iinfo(_DTYPES[code]).max
    exponent = np.float32(1) - codes.astype(np.float32) / np.float32(last)
    # A power, not exp of a product: x ** 1 is x and x ** 0 is 1 to the bit.
    return np.power(np.asarray(floor, np.float32), exponent)
