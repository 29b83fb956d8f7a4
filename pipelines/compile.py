"""A step of training, or of a teacher, compiled for a TPU pod that is not there: what it takes.

The program is the one that `train` and `dump` run. Memory, collectives and FLOPs are those of the
compiled program; times are predicted from them.
"""

import re
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2 import attention, flops, presets
from gemma2 import model as gemma2
from gemma2.model import Execution
from gemma2.placement import Placement
from pipelines import collectives, topology
from pipelines.collectives import Collective
from pipelines.products import product_flops
from schemas.accelerators import ACCELERATORS
from schemas.errors import DeviceMemoryError
from schemas.manifest import SamplerSpec, TargetsManifest, TeacherInfo, VocabularyInfo
from schemas.model import ModelConfig
from schemas.runs import CompileConfig, SamplerConfig, TrainConfig
from student_train import mesh as meshes
from student_train.step import abstract_batch, abstract_state, make_head, make_train_step
from teacher_dump import teacher

# Assumed, not measured on any TPU: of the peak, what products reach, attention's among them.
SHARE_OF_PEAK = 0.7
_OUT_OF_MEMORY = re.compile(r"Ran out of memory (?:on HBM|in memory space hbm)[^\n]*(?=\.)")
# What the sampler is asked for changes no shape.
_POINTS = 32


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip."""

    arguments_bytes: int
    outputs_bytes: int
    aliased_bytes: int
    """Outputs that take the place of arguments."""
    temporary_bytes: int
    usable_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.arguments_bytes + self.outputs_bytes - self.aliased_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.usable_bytes


@dataclass(frozen=True)
class Prediction:
    """Of one step, in seconds; the collectives are hidden behind products, or not at all."""

    products_seconds: float
    state_seconds: float
    """To read and write all arguments and outputs once: the optimizer's pass over its state."""
    slice_seconds: float
    """Collectives within a slice."""
    network_seconds: float
    """Collectives between slices."""
    hidden_seconds: float
    exposed_seconds: float
    hidden_mfu: float
    exposed_mfu: float


@dataclass(frozen=True)
class Compiled:
    """What was compiled, and what was found."""

    config: CompileConfig
    mesh: dict[str, int]
    attention: str
    chips: int
    tokens: int
    """Of one step over all chips."""
    memory: Memory
    model_flops: float
    """Per chip and step, counted from the model's config: what is needed."""
    program_flops: float
    """Per chip and step, counted in the traced program: what is computed."""
    collectives: list[Collective]
    predicted: Prediction
    compile_seconds: float
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["config"] = self.config.model_dump(mode="json")
        data["memory"] |= {"total_bytes": self.memory.total_bytes, "fits": self.memory.fits}
        return data


def compile_step(config: CompileConfig) -> Compiled:
    """Compile. Raises ConfigError for a topology, mesh or kernel that is none, DeviceMemoryError.

    A program a little too large may compile all the same; its memory says that it does not fit.
    """
    model = presets.resolve(config.model)
    devices = topology.devices(config.topology, config.slices)
    if config.teacher:
        devices = devices[: config.mesh.model]
    mesh = meshes.make_mesh(config.mesh, devices)
    kernel = attention.resolve(
        config.attention, model, devices[0], dtype=config.dtype, backward=not config.teacher
    )
    groups = mesh.size // mesh.shape["model"]
    rows = config.sequences_per_group * groups
    tokens = rows * config.sequence_tokens
    started = time.perf_counter()
    traced = (
        _teacher_step(config, model, Execution(kernel, Placement(mesh, is_table_whole=True)))
        if config.teacher
        else _train_step(config, model, mesh, rows)
    )
    compiled = _compile(traced)
    seconds = time.perf_counter() - started
    chip = topology.CHIPS[devices[0].device_kind]
    needed = flops.forward_flops_per_token(model, config.sequence_tokens).total
    if not config.teacher:
        needed *= flops.TRAINING_TO_FORWARD
    found = collectives.read(compiled.as_text(), dict(mesh.shape))
    memory = _memory(compiled.memory_analysis(), chip)
    model_flops = needed * tokens / mesh.size
    program_flops = product_flops(traced) / mesh.size
    return Compiled(
        config=config,
        mesh=dict(mesh.shape),
        attention=kernel,
        chips=mesh.size,
        tokens=tokens,
        memory=memory,
        model_flops=model_flops,
        program_flops=program_flops,
        collectives=found,
        predicted=_predict(chip, memory, model_flops, program_flops, found),
        compile_seconds=seconds,
        versions={name: version(name) for name in ("jax", "jaxlib", "libtpu")},
    )


def _compile(traced: Any) -> Any:
    try:
        return traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = _OUT_OF_MEMORY.search(str(error))
        if found is None:
            raise
        raise DeviceMemoryError(
            f"A step must fit a chip's memory, but the compiler r{found[0][1:]}; give fewer "
            "sequences_per_group, a larger mesh.fsdp or mesh.model, or another remat."
        ) from error


def _train_step(config: CompileConfig, model: ModelConfig, mesh: Mesh, rows: int) -> Any:
    run = TrainConfig(
        store="",
        out=Path(),
        model=config.model,
        batch_sequences=rows,
        dtype=config.dtype,
        remat=config.remat,
        attention=config.attention,
        loss_chunk_tokens=config.loss_chunk_tokens,
        mesh=config.mesh,
    )
    targets = _targets(config, model)
    head = make_head(model, model.vocab_size, targets, config.loss_chunk_tokens)
    step: Any = make_train_step(model, run, head, mesh)
    batch = abstract_batch(rows, config.sequence_tokens, targets, mesh)
    return step.trace(abstract_state(model, run, mesh), batch)


def _teacher_step(config: CompileConfig, model: ModelConfig, execution: Execution) -> Any:
    placement = execution.placement
    dtype = jnp.dtype(config.dtype)

    def array(shape: tuple[int, ...], kind: Any, path: tuple[Any, ...] = ()) -> Any:
        where = placement.sharding(path, shape)
        return jax.ShapeDtypeStruct(shape, kind, sharding=where)

    shapes = jax.eval_shape(lambda: gemma2.init_params(model, jax.random.key(0), dtype))
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: array(leaf.shape, leaf.dtype, path), shapes
    )
    rows = (config.sequences_per_group, config.sequence_tokens)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return teacher.candidates_step.jitted("tpu").trace(
        params,
        array(rows, jnp.int32),
        array(rows, jnp.int32),
        array(rows, jnp.bool_),
        array(rows[:1], jnp.int32),
        array(key.shape, key.dtype),
        config=model,
        dtype=dtype,
        spec=_sampler(config, model),
        vocab_size=model.vocab_size,
        execution=execution,
    )


def _sampler(config: CompileConfig, model: ModelConfig) -> SamplerSpec:
    sampler = SamplerConfig(slots_per_token=config.slots_per_token)
    return sampler.spec(_POINTS, config.sequence_tokens, model.vocab_size)


def _targets(config: CompileConfig, model: ModelConfig) -> TargetsManifest:
    """A stand-in for a store's targets, of which only the shapes matter."""
    return TargetsManifest(
        tokens_fingerprint="",
        num_sequences=1,
        sequence_tokens=config.sequence_tokens,
        shard_sequences=1,
        teacher=TeacherInfo(
            name="", config_sha256="", weights_sha256="", vocab_size=model.vocab_size
        ),
        sampler=_sampler(config, model),
        vocabulary=VocabularyInfo(
            num_buckets=1, order_sha256="", buckets_sha256="", sampling_sha256=""
        ),
        seed=0,
        dtype=config.dtype,
        batch_sequences=1,
        software={},
    )


def _memory(analysis: Any, chip: topology.Chip) -> Memory:
    return Memory(
        arguments_bytes=analysis.argument_size_in_bytes,
        outputs_bytes=analysis.output_size_in_bytes,
        aliased_bytes=analysis.alias_size_in_bytes,
        temporary_bytes=analysis.temp_size_in_bytes,
        usable_bytes=chip.usable_bytes,
    )


def _predict(
    chip: topology.Chip,
    memory: Memory,
    model_flops: float,
    program_flops: float,
    found: list[Collective],
) -> Prediction:
    peak = ACCELERATORS[chip.accelerator].peak_flops_per_second
    network_bytes = sum(c.sent_bytes for c in found if c.axes == collectives.SLICES)
    slice_bytes = sum(c.sent_bytes for c in found) - network_bytes
    products = program_flops / (peak * SHARE_OF_PEAK)
    state_bytes = memory.arguments_bytes + memory.outputs_bytes
    state = state_bytes / chip.memory_bytes_per_second
    within = slice_bytes / chip.link_bytes_per_second
    network = network_bytes / chip.network_bytes_per_second
    hidden = max(products, within, network) + state
    exposed = products + within + network + state
    return Prediction(
        products_seconds=products,
        state_seconds=state,
        slice_seconds=within,
        network_seconds=network,
        hidden_seconds=hidden,
        exposed_seconds=exposed,
        hidden_mfu=model_flops / (hidden * peak),
        exposed_mfu=model_flops / (exposed * peak),
    )
