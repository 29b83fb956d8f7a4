"""The training step and the evaluation step: plain functions to jit, and the state they change.

Both are made from static descriptions alone, so that they compile ahead of time for devices that
are not there. Labels and masks are made here, from tokens and segment ids.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma2 import attention
from gemma2 import model as gemma2
from gemma2.model import Execution
from gemma2.placement import ROW_AXES, Placement, axes_of, fsdp_dimension, partition
from schemas.manifest import TargetsManifest
from schemas.model import ModelConfig
from schemas.runs import TrainConfig
from student_train import mesh as meshes
from student_train import schedules
from student_train.average import averaged
from student_train.batch import Batch
from student_train.entries import entry_positions
from student_train.guard import Guard, judge, new_guard, norm_limit
from student_train.loss import Head, Losses, Targets, resolve_kernel, sparse_target_loss
from student_train.optimizer import last_update_norm, make_optimizer


class State(NamedTuple):
    """All that a step changes; what decides a run's next step is here, in its batch or constant."""

    params: Any
    """float32 master weights."""
    opt_state: Any
    step: jax.Array
    """int32 [], steps done, skipped ones included."""
    guard: Guard
    ema: Any = None
    """The average of the parameters, float32; None without `ema_decay`."""

    @property
    def result(self) -> Any:
        """The parameters that are evaluated and exported."""
        return self.params if self.ema is None else self.ema


class BatchMeans(NamedTuple):
    """float32 scalars, means over the predicted positions of a whole batch, in nats."""

    loss: jax.Array
    kd: jax.Array
    """Cross-entropy against the stored targets, m·logsumexp - Σ p̂ s."""
    ce: jax.Array
    """Cross-entropy of the next token."""
    teacher_entropy: jax.Array
    teacher_ce: jax.Array
    """The teacher's own cross-entropy of the next token."""
    routed_share: jax.Array
    """Share of the positions that learn from their label alone."""


class StepMetrics(NamedTuple):
    """float32 scalars of one step; BatchMeans says what the first six are."""

    loss: jax.Array
    kd: jax.Array
    ce: jax.Array
    kl: jax.Array
    """kd less the teacher's entropy: for unbiased targets of mean KL(teacher || student)."""
    teacher_entropy: jax.Array
    teacher_ce: jax.Array
    routed_share: jax.Array
    alpha: jax.Array
    learning_rate: jax.Array
    grad_norm: jax.Array
    """Before clipping."""
    grad_norm_limit: jax.Array
    """Above this the step is skipped; infinite while too little is known."""
    bad_in_a_row: jax.Array
    """Steps skipped since the last good one, this one included: 0 if it was good."""


class Norms(NamedTuple):
    """float32 scalars of a state."""

    param_norm: jax.Array
    update_norm: jax.Array
    """Of what the last step that was not skipped added to the parameters."""


class RowScores(NamedTuple):
    """Of each row of a batch of held-out rows; the host adds them up exactly."""

    nats: jax.Array
    """float32 [B], cross-entropy of the row's labels."""
    labels: jax.Array
    """int32 [B], predicted positions."""
    label_bytes: jax.Array
    """int32 [B], UTF-8 bytes of the labels."""


def predicted(segment_ids: jax.Array) -> jax.Array:
    """bool [B, L], True where the next token is of the same document, as the store defines it."""
    same = (segment_ids[:, :-1] == segment_ids[:, 1:]) & (segment_ids[:, :-1] != 0)
    return jnp.pad(same, ((0, 0), (0, 1)))


def next_tokens(tokens: jax.Array) -> jax.Array:
    """int32 [B, L], the label of each position; of the last one its own token, never used."""
    return jnp.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)


def make_head(
    config: ModelConfig, valid_vocab: int, targets: TargetsManifest | None, chunk_tokens: int
) -> Head:
    """The loss's static description for a store's targets, or for labels alone."""
    return Head(
        valid_vocab=valid_vocab,
        final_cap=config.final_cap,
        block_tokens=1 if targets is None else targets.sampler.block_tokens,
        chunk_tokens=chunk_tokens,
        kernel="auto",
    )


def make_state(model: ModelConfig, config: TrainConfig, key: jax.Array) -> State:
    """The state before the first step; jit it with `out_shardings`, or take its eval_shape."""
    params = gemma2.init_params(model, key)
    return init_state(params, config)


def init_state(params: Any, config: TrainConfig) -> State:
    """The state before the first step, from given float32 parameters."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    # A copy: the state is donated, and no array can be donated twice.
    ema = None if config.ema_decay is None else jax.tree.map(jnp.copy, params)
    return State(params, optimizer.init(params), jnp.zeros((), jnp.int32), new_guard(), ema)


def abstract_state(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of the state. Raises ConfigError as `mesh.partition` does."""
    shapes = jax.eval_shape(partial(make_state, model, config), jax.random.key(0))
    return meshes.abstract(shapes, meshes.state_shardings(shapes, mesh))


def abstract_batch(batch: int, tokens: int, targets: TargetsManifest | None, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a global batch."""
    entries = 0 if targets is None else targets.slots_per_sequence
    where = meshes.rows_sharding(mesh)

    def array(width: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((batch, width), dtype, sharding=where)

    return Batch(
        tokens=array(tokens, jnp.int32),
        segment_ids=array(tokens, jnp.int32),
        entry_id=array(entries, jnp.int32),
        entry_weight=array(entries, jnp.float32),
        head_count=array(tokens, jnp.uint16),
        tail_count=array(tokens, jnp.uint16),
        teacher_entropy=array(tokens, jnp.float32),
        label_logprob=array(tokens, jnp.float32),
    )


def make_loss(
    head: Head, mesh: Mesh, table_path: tuple[Any, ...] = ("embedding",)
) -> Callable[[jax.Array, jax.Array, Targets], Losses]:
    """`sparse_target_loss` over a mesh: (hidden, table, targets) → the loss over all devices.

    Each device forms the logits of its own rows, and of its own part of the vocabulary if `model`
    cuts it, against the table gathered over fsdp in the compute dtype; logits never leave their
    device.
    """
    by_rows: Any = P(ROW_AXES)
    one: Any = P()

    def loss(hidden: jax.Array, table: jax.Array, targets: Targets) -> Losses:
        where = partition(table_path, table.shape, mesh)
        gathered = fsdp_dimension(where)
        vocab_axis = "model" if "model" in axes_of(where, 0) else None
        rows, width = table.shape
        local = resolve_kernel(
            head,
            attention.device_kind(mesh.devices.flat[0]),
            dtype=hidden.dtype,
            table_shape=(rows if vocab_axis is None else rows // mesh.shape[vocab_axis], width),
        )._replace(
            table_axis=None if gathered is None else "fsdp",
            table_dimension=gathered or 0,
            vocab_axis=vocab_axis,
            batch_axes=ROW_AXES,
        )
        return jax.shard_map(
            partial(sparse_target_loss, head=local),
            mesh=mesh,
            in_specs=(by_rows, where, Targets(*[by_rows] * len(Targets._fields))),
            out_specs=Losses(one, by_rows, by_rows),
        )(hidden, table, targets)

    return loss


def make_objective(
    model: ModelConfig, config: TrainConfig, head: Head, mesh: Mesh
) -> Callable[[Any, Batch, Any, jax.Array | None], tuple[jax.Array, BatchMeans]]:
    """(params, batch, alpha, positions=None) → (loss, means), differentiable.

    Sums over the batch are divided by `positions`, float32 []: its predicted positions, or those of
    the whole of which it is a part. Of a position that is routed off by the teacher's entropy the
    label gets all the weight, whatever alpha is.
    """
    loss = make_loss(head, mesh)
    rows = meshes.rows_sharding(mesh)
    device = mesh.devices.flat[0]
    kernel = attention.resolve(config.attention, model, device, dtype=config.dtype, backward=True)

    def objective(
        params: Any, batch: Batch, alpha: Any, positions: jax.Array | None = None
    ) -> tuple[jax.Array, BatchMeans]:
        hidden = gemma2.hidden_states(
            params,
            model,
            jnp.asarray(batch.tokens),
            jnp.asarray(batch.segment_ids),
            dtype=jnp.dtype(config.dtype),
            remat=config.remat,
            execution=Execution(kernel, Placement(mesh), is_unrolled(config, device)),
        )
        hidden = jax.lax.with_sharding_constraint(hidden, rows)
        weight = predicted(jnp.asarray(batch.segment_ids)).astype(jnp.float32)
        entropy = jnp.asarray(batch.teacher_entropy)
        routed = weight * is_routed(config, entropy)
        target_weight = alpha * (weight - routed)
        targets = Targets(
            labels=next_tokens(jnp.asarray(batch.tokens)),
            label_weight=weight - target_weight,
            entry_id=jnp.asarray(batch.entry_id),
            entry_position=entry_positions(
                jnp.asarray(batch.head_count),
                jnp.asarray(batch.tail_count),
                head.block_tokens,
                batch.entry_id.shape[1],
            ),
            entry_weight=jnp.asarray(batch.entry_weight),
            entry_scale=target_weight,
        )
        losses = loss(hidden, gemma2.embedding(params), targets)
        means = BatchMeans(
            loss=losses.loss,
            kd=jnp.sum(weight * losses.position_kd),
            ce=jnp.sum(weight * losses.position_ce),
            teacher_entropy=jnp.sum(weight * entropy),
            teacher_ce=-jnp.sum(weight * batch.label_logprob),
            routed_share=jnp.sum(routed),
        )
        count = predicted_positions(batch) if positions is None else positions
        means = BatchMeans(*(total / count for total in means))
        return means.loss, means

    return objective


def is_unrolled(config: TrainConfig, device: Any) -> bool:
    """Whether the layers are laid out one after the other, on a kind of device."""
    asked = config.unroll_layers
    return device.platform == "gpu" if asked is None else asked


def is_routed(config: TrainConfig, teacher_entropy: jax.Array) -> jax.Array:
    """float32 of the entropy's shape, 1 where a position learns from its label alone."""
    below = config.routing.below_nats
    if below is None:
        return jnp.zeros_like(teacher_entropy)
    return (teacher_entropy < below).astype(jnp.float32)


def predicted_positions(batch: Batch) -> jax.Array:
    """float32 [], at least 1: a batch of padding alone has no position, and no gradient."""
    return jnp.maximum(jnp.sum(predicted(jnp.asarray(batch.segment_ids)), dtype=jnp.float32), 1.0)


def split_rows(batch: Batch, parts: int, mesh: Mesh) -> Batch:
    """The batch's arrays as [parts, B / parts, ...]: each device's own rows, cut into parts."""
    devices = math.prod(mesh.shape[axis] for axis in meshes.ROW_AXES)
    where = NamedSharding(mesh, P(None, meshes.ROW_AXES))

    def split(array: jax.Array) -> jax.Array:
        rest = array.shape[1:]
        rows = len(array) // (devices * parts)
        array = jnp.moveaxis(array.reshape(devices, parts, rows, *rest), 1, 0)
        return jax.lax.with_sharding_constraint(array.reshape(parts, devices * rows, *rest), where)

    return jax.tree.map(split, batch)


def make_gradients(
    model: ModelConfig, config: TrainConfig, head: Head, mesh: Mesh
) -> Callable[[Any, Batch, Any], tuple[Any, BatchMeans]]:
    """(params, batch, alpha) → (float32 gradients of the mean loss, means over the batch).

    With `accumulate`, micro-batch by micro-batch. Each is divided by the predicted positions of the
    whole batch, so that the sums are its means however unevenly padding is spread.
    """
    objective = jax.grad(make_objective(model, config, head, mesh), has_aux=True)

    def gradients(params: Any, batch: Batch, alpha: Any) -> tuple[Any, BatchMeans]:
        where = meshes.state_shardings(params, mesh)
        positions = predicted_positions(batch)

        def of(part: Batch) -> tuple[Any, BatchMeans]:
            found, means = objective(params, part, alpha, positions)
            return jax.lax.with_sharding_constraint(found, where), means

        if config.accumulate == 1:
            return of(batch)

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of(part)), None

        parts = split_rows(batch, config.accumulate, mesh)
        zeros = jax.tree.map(jnp.zeros_like, params)
        zeros = jax.lax.with_sharding_constraint(zeros, where)
        nothing = BatchMeans(*[jnp.zeros(())] * len(BatchMeans._fields))
        return jax.lax.scan(add, (zeros, nothing), parts)[0]

    return gradients


def make_train_step(
    model: ModelConfig, config: TrainConfig, head: Head, mesh: Mesh
) -> Callable[[State, Batch], tuple[State, StepMetrics]]:
    """The step, jitted with explicit shardings: (state, batch) → (state, metrics).

    The state is donated. A step that the guard finds bad changes nothing but the guard and the
    number of steps. For compilation ahead of time:
    `make_train_step(...).lower(abstract_state(...), abstract_batch(...)).compile()`.
    """
    gradients_of = make_gradients(model, config, head, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, config, mesh))
    everywhere = NamedSharding(mesh, P())

    def train_step(state: State, batch: Batch) -> tuple[State, StepMetrics]:
        alpha = schedules.alpha(config, state.step)
        gradients, means = gradients_of(state.params, batch, alpha)
        grad_norm = optax.global_norm(gradients)
        limit = norm_limit(state.guard, config.spike_factor)
        is_good, guard = judge(state.guard, means.loss, grad_norm, limit)

        def if_good(new: Any, old: Any) -> Any:
            return jax.tree.map(partial(jnp.where, is_good), new, old)

        updates, opt_state = optimizer.update(
            gradients, state.opt_state, state.params, step=state.step
        )
        params = if_good(optax.apply_updates(state.params, updates), state.params)
        ema = state.ema
        if config.ema_decay is not None:
            ema = if_good(averaged(ema, params, config.ema_decay, state.step), ema)
        opt_state = if_good(opt_state, state.opt_state)
        metrics = StepMetrics(
            **means._asdict(),
            kl=means.kd - means.teacher_entropy,
            alpha=alpha,
            learning_rate=schedules.learning_rate(config.optimizer, config.steps, state.step),
            grad_norm=grad_norm,
            grad_norm_limit=limit,
            bad_in_a_row=guard.bad_in_a_row.astype(jnp.float32),
        )
        return State(params, opt_state, state.step + 1, guard, ema), metrics

    return jax.jit(
        train_step,
        in_shardings=(where, meshes.rows_sharding(mesh)),
        out_shardings=(where, everywhere),
        donate_argnums=0,
        compiler_options=_compiler_options(mesh),
    )


def _compiler_options(mesh: Mesh) -> dict[str, bool] | None:
    """On several GPUs, weights and gradients are on their way while others are computed with."""
    if mesh.size == 1 or mesh.devices.flat[0].platform != "gpu":
        return None
    return {"xla_gpu_enable_latency_hiding_scheduler": True}


def make_norms(config: TrainConfig) -> Callable[[State], Norms]:
    """The norms of a state after a step, jitted; in each step they would be 1 % of its time."""

    def norms(state: State) -> Norms:
        return Norms(
            optax.global_norm(state.params),
            last_update_norm(
                config.optimizer, config.steps, state.opt_state, state.params, state.step - 1
            ),
        )

    return jax.jit(norms)


def make_eval_step(
    model: ModelConfig, dtype: str, head: Head, mesh: Mesh
) -> Callable[[Any, Any, Batch], RowScores]:
    """(params, int32 [V] bytes of each id, batch) → scores of each row; targets are ignored."""
    loss = make_loss(head._replace(block_tokens=1), mesh)
    rows = meshes.rows_sharding(mesh)
    kernel = attention.resolve("auto", model, mesh.devices.flat[0], dtype=dtype, backward=False)

    def eval_step(params: Any, piece_bytes: jax.Array, batch: Batch) -> RowScores:
        tokens, segment_ids = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)
        hidden = gemma2.hidden_states(
            params,
            model,
            tokens,
            segment_ids,
            dtype=jnp.dtype(dtype),
            execution=Execution(kernel, Placement(mesh)),
        )
        hidden = jax.lax.with_sharding_constraint(hidden, rows)
        labels, mask = next_tokens(tokens), predicted(segment_ids)
        weight = mask.astype(jnp.float32)
        none = jnp.zeros((tokens.shape[0], 0), jnp.int32)
        targets = Targets(labels, weight, none, none, none.astype(jnp.float32), weight)
        losses = loss(hidden, gemma2.embedding(params), targets)
        return RowScores(
            nats=jnp.sum(weight * losses.position_ce, axis=1),
            labels=jnp.sum(mask, axis=1, dtype=jnp.int32),
            label_bytes=jnp.sum(jnp.where(mask, piece_bytes[labels], 0), axis=1),
        )

    return jax.jit(
        eval_step, in_shardings=(None, None, rows), out_shardings=NamedSharding(mesh, P())
    )
