"""What a training run would be, in the terminal: `retort train --dry-run`."""

from rich.console import Group, RenderableType

from pipelines.words import duration, pairs, size, title
from schemas.runs import TrainConfig
from student_train.dry_run import DryRun


def view(found: DryRun, config: TrainConfig) -> RenderableType:
    """Everything on one screen, in 80 columns."""
    return Group(
        title(f"dry run: {config.model} on {config.store}, nothing was written"),
        pairs([*_run(found, config), *_store(found), *_device(found), *_time(found)]),
    )


def _run(found: DryRun, config: TrainConfig) -> list[tuple[str, str]]:
    accumulate = f" in {config.accumulate} micro-batches" if config.accumulate > 1 else ""
    rows = [
        (
            "model",
            f"{found.parameters:,} parameters, {found.embedding_parameters:,} of them embedding",
        ),
        ("run", f"{found.steps:,} steps of {found.tokens_per_step:,} tokens{accumulate}"),
        ("tokens", f"{found.tokens:,}, padding included"),
    ]
    if found.entropy_cut_nats is not None:
        cut = f"below {found.entropy_cut_nats:.4g} nats of teacher entropy"
        rows.append(("routing", f"labels alone {cut}"))
    return rows


def _store(found: DryRun) -> list[tuple[str, str]]:
    coverage = found.coverage
    committed = f"{coverage.committed_token_shards:,} of {coverage.shards:,} shards of tokens"
    if coverage.committed_target_shards is not None:
        committed += f", {coverage.committed_target_shards:,} of targets"
    used = f"{coverage.share_of_rows:.1%} of the rows drawn from"
    return [("committed", committed), ("read", f"{coverage.epochs:,.2f} epochs: {used}")]


def _device(found: DryRun) -> list[tuple[str, str]]:
    memory = found.memory
    parts = (
        f"state {size(memory.state)}, batch {size(memory.batch)}, working {size(memory.working)}"
    )
    total = size(memory.total)
    if memory.available is not None:
        total += f" of {size(memory.available)}"
    if not memory.fits:
        total += ", which does NOT fit"
    return [
        ("devices", f"{found.devices} x {found.device}"),
        ("memory", f"{total} on each: {parts}"),
        (
            "per token",
            f"{found.flops_per_token / 1e9:.3g} GFLOP, {found.head_flops_per_token / 1e9:.3g} of "
            "them for the vocabulary head",
        ),
    ]


def _time(found: DryRun) -> list[tuple[str, str]]:
    if found.step_seconds is None or found.seconds is None:
        return [("time", "not measured, as no step can be run")]
    rates, mfu = found.rates, found.rates["mfu"]
    speed = f"{rates['tokens_per_second']:,.0f} tokens/s, "
    speed += f"{rates['model_tflops_per_second']:,.3g} model TFLOP/s per device"
    if mfu is not None:
        speed += f", MFU {mfu:.1%}"
    return [
        ("step", f"{found.step_seconds:,.3f} s, median of {len(found.losses)}: {speed}"),
        ("loss", ", ".join(f"{loss:.4f}" for loss in found.losses)),
        (
            "time",
            f"{duration(found.seconds)} for all steps, and {duration(found.compile_seconds)} to "
            "compile; evaluations and checkpoints come on top",
        ),
    ]
