"""A compiled step in the terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.compile import SHARE_OF_PEAK, Compiled

_GIB = 2**30


def view(found: Compiled) -> RenderableType:
    """Everything on one screen, in 80 columns."""
    config = found.config
    what = "teacher's step" if config.teacher else "training step"
    where = f"{config.slices} x {config.topology}" if config.slices > 1 else config.topology
    if config.teacher:
        where = f"{'one chip' if found.chips == 1 else f'{found.chips} chips'} of {where}"
    remat = "" if config.teacher else f"remat {config.remat}, "
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    return Group(
        Text(f"{what} of {config.model}, compiled for {where}", style="bold"),
        _pairs(
            [
                ("mesh", f"{mesh}: {found.chips:,} chips"),
                (
                    "step",
                    f"{found.tokens:,} tokens in rows of {config.sequence_tokens:,}, "
                    f"{config.dtype}, {remat}attention {found.attention}",
                ),
                ("versions", ", ".join(f"{k} {v}" for k, v in found.versions.items())),
                ("compiled in", f"{found.compile_seconds:,.0f} s"),
            ]
        ),
        *_memory(found),
        *_flops(found),
        *_collectives(found),
        *_predicted(found),
    )


def _memory(found: Compiled) -> list[RenderableType]:
    memory = found.memory
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    rows = [
        ("arguments", _gib(memory.arguments_bytes)),
        ("outputs", f"{_gib(memory.outputs_bytes)}, {_gib(memory.aliased_bytes)} in their place"),
        ("temporary", _gib(memory.temporary_bytes)),
        ("all", f"{_gib(memory.total_bytes)} of {_gib(memory.usable_bytes)}: {verdict}"),
    ]
    return [Text("memory of a chip", style="bold"), _pairs(rows)]


def _flops(found: Compiled) -> list[RenderableType]:
    rows = [
        ("needed", f"{found.model_flops / 1e12:,.2f} TFLOP, by the model's config"),
        (
            "computed",
            f"{found.program_flops / 1e12:,.2f} TFLOP, "
            f"{found.program_flops / found.model_flops:.2f} times as many: recomputation, masked "
            "pairs",
        ),
    ]
    return [Text("matrix products of a chip and step", style="bold"), _pairs(rows)]


def _collectives(found: Compiled) -> list[RenderableType]:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("  kind", "dtype", "mesh axes"):
        table.add_column(heading)
    for heading in ("times", "a chip sends"):
        table.add_column(heading, justify="right")
    for item in found.collectives:
        table.add_row(
            f"  {item.kind}",
            item.dtype,
            item.axes,
            f"{item.count:,}",
            f"{item.sent_bytes / 1e6:,.1f} MB",
        )
    if not found.collectives:
        table.add_row("  none", "", "", "", "")
    return [Text("collectives of a step", style="bold"), table]


def _predicted(found: Compiled) -> list[RenderableType]:
    predicted = found.predicted
    rows = [
        (
            "step",
            f"{predicted.hidden_seconds:,.3f} s, MFU {predicted.hidden_mfu:.2f}, if collectives "
            f"hide behind products; {predicted.exposed_seconds:,.3f} s, MFU "
            f"{predicted.exposed_mfu:.2f}, if not at all",
        ),
        ("products", f"{predicted.products_seconds:,.3f} s at {SHARE_OF_PEAK} of the peak"),
        ("state", f"{predicted.state_seconds:,.3f} s to read and write it once"),
        ("collectives", f"{predicted.slice_seconds:,.3f} s in a slice, "
         f"{predicted.network_seconds:,.3f} s between slices"),
        (
            "assumed",
            f"{SHARE_OF_PEAK} of the peak, which nothing here measured on a TPU; collectives use "
            "all of a chip's links at the datasheet's rate; all else (norms, loss, sampler) costs "
            "nothing",
        ),
    ]  # fmt: skip
    return [Text("time (predicted, not measured)", style="bold"), _pairs(rows)]


def _pairs(rows: list[tuple[str, str]]) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(Text(f"  {key}"), Text(value))
    return table


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:,.2f} GiB"
