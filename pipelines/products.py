"""FLOPs of a traced program: its matrix products, each times the trips of the loops around it.

The compiler's own count takes a loop's body once and a Pallas kernel for almost nothing.
"""

import math
from typing import Any

import numpy as np
from jax.extend import core

_FLOPS_PER_MULTIPLY_ADD = 2


def product_flops(traced: Any) -> float:
    """FLOPs over all devices of a `jax.stages.Traced`; one multiply-add is two.

    Counts what is computed: recomputation too, and of a Pallas kernel the blocks that it does not
    skip. A product outside of shard_map counts once however often the compiler repeats it.
    """
    jaxpr = traced.jaxpr.jaxpr
    known = dict(zip(jaxpr.constvars, traced.jaxpr.consts, strict=True))
    return _count(jaxpr, known)


def _count(jaxpr: Any, known: dict[Any, Any]) -> float:
    """known: values of variables that are constants, for the masks of Pallas kernels."""
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = [sub for value in equation.params.values() for sub in _jaxprs(value)]
        if name == "dot_general":
            total += _dot(equation)
        elif name == "pallas_call":
            total += _kernel_steps(equation, known) * _count(equation.params["jaxpr"], {})
        elif name == "cond":
            # One branch runs: of a kernel's, whether a block is skipped was asked above.
            total += max(_count(sub, _passed(equation.invars[1:], sub, known)) for sub in inner)
        elif name == "while":
            found = sum(_count(sub, {}) for sub in inner)
            if found:
                raise ValueError("a matrix product in a loop of unknown length cannot be counted")
        else:
            times = 1
            if name == "scan":
                times = equation.params["length"]
            elif name == "shard_map":
                times = equation.params["mesh"].size
            total += times * sum(_count(sub, _passed(equation.invars, sub, known)) for sub in inner)
    return total


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [sub for item in value for sub in _jaxprs(item)]
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    return [value] if isinstance(value, core.Jaxpr) else []


def _passed(arguments: Any, jaxpr: Any, known: dict[Any, Any]) -> dict[Any, Any]:
    """What is known of an inner jaxpr's arguments, where they are the equation's, one by one."""
    if len(arguments) != len(jaxpr.invars):
        return {}
    pairs = zip(arguments, jaxpr.invars, strict=True)
    return {
        inside: known[outside]
        for outside, inside in pairs
        if not isinstance(outside, core.Literal)
        and outside in known
        # A loop slices some of its arguments: those are not the constants themselves.
        and outside.aval.shape == inside.aval.shape
    }


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    over = math.prod(left.shape[axis] for axis in contracted)
    return float(_FLOPS_PER_MULTIPLY_ADD * math.prod(out.shape) * over)


def _kernel_steps(equation: Any, known: dict[Any, Any]) -> float:
    """Steps of a Pallas kernel's grid; of splash attention, those whose block is not masked."""
    mapping = equation.params["grid_mapping"]
    steps = float(math.prod(mapping.grid))
    if not equation.params["name"].startswith("splash"):
        return steps
    # Its scalars are the next block to load, then whether a block is masked: 0 if all of it is.
    mask = np.asarray(known[equation.invars[1]])
    return steps * int(np.count_nonzero(mask)) / mask.size
