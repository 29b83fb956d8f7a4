"""Versions of the packages whose behaviour a store depends on, for its manifest."""

import sys
from importlib.metadata import version

_PACKAGES = ("retort", "apache-beam", "jax", "numpy", "sentencepiece", "tensorstore")


def versions() -> dict[str, str]:
    """Package name to version; recorded beside a manifest, never compared."""
    return {"python": sys.version.split()[0]} | {name: version(name) for name in _PACKAGES}
