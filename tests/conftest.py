"""Every test runs on eight virtual CPU devices, with strict promotion rules, and offline."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A process takes a file at a time, in this order: the longest ones first, so that all end together.
LONGEST = (
    "test_pipelines_dump.py",
    "test_student_train_multihost.py",
    "test_student_train_mesh.py",
    "test_pipelines_engines.py",
    "test_pipelines_compile.py",
    "test_student_train_loop.py",
    "test_teacher_dump_unbiased.py",
    "test_student_train_resume.py",
    "test_gemma2_flash.py",
    "test_logit_store_machine.py",
    "test_student_train_guarded.py",
    "test_teacher_dump_transformers.py",
    "test_student_train_step.py",
    "test_teacher_dump_teacher.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def _with_options(options: dict[str, Any]) -> Iterator[None]:
    """JAX has these meanwhile, here and in the processes that a test starts."""
    before = {name: jax.config.values[name] for name in options}

    def use(values: dict[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        # A program in memory is found whatever it was compiled with.
        jax.clear_caches()

    use(options)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in options.items():
            environment.setenv(name.upper(), str(value))
        yield
    use(before)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `compile_once` keeps programs; each process that runs tests has its own."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compile_once(compiled: Path) -> Iterator[None]:
    """Equal programs are compiled once for all modules that ask for it.

    A process that may be killed while it writes a program must get a copy of `compiled`.
    """
    yield from _with_options(
        {
            "jax_compilation_cache_dir": str(compiled),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
        }
    )


@pytest.fixture(scope="module")
def compile_quickly() -> Iterator[None]:
    """Programs are compiled without LLVM's passes, in half the time; some run twice as long.

    XLA's own passes are run: fusion, sharding and the order of sums are what they always are. For
    tests that compare programs of ours with each other, not with the numbers of others.
    """
    yield from _with_options({"jax_disable_most_optimizations": True})
