"""Collectives of a compiled program, read from its HLO text: kind, mesh axis, bytes, how often."""

import math
import re
import string
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(calls|body|condition|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_OPERATION = re.compile(
    r"= (?P<shape>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|"
    r"collective-permute|collective-broadcast|send)(?P<start>-start)?\("
)
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_INTEGER = re.compile(r"= s32\[\]\S* constant\((\d+)\)")

SLICES = "slices"
"""In place of axes: through the hosts to another slice, the runtime's part of a collective."""


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind, dtype and mesh axis in one execution of a program."""

    kind: str
    dtype: str
    axes: str
    """Mesh axes over which chips of a slice talk, joined by +, or SLICES."""
    count: int
    """Executions: those in a loop once for each trip."""
    sent_bytes: int
    """That each chip sends, by the ring algorithm."""


def read(hlo: str, mesh_shape: dict[str, int]) -> list[Collective]:
    """The collectives of an HLO module's text, largest first.

    mesh_shape: axes and sizes; devices are numbered in the mesh's order. An operation that the
    compiler cut into asynchronous parts, which share a channel, counts once.
    """
    computations = dict(_computations(hlo))
    times = _times(computations)
    found: dict[tuple[str, str], tuple[str, str, str, int, int]] = {}
    for name, lines in computations.items():
        for line in lines:
            operation = _OPERATION.search(line)
            if operation is None:
                continue
            kind, group = operation["kind"], _group(line)
            dtype, size = _moved(operation["shape"], kind, operation["start"] is not None)
            if kind == "send" and "megascale" not in line:
                continue
            if kind == "reduce-scatter":
                size *= len(group)
            elif name.startswith("all-reduce-scatter"):
                # A fusion of an all-reduce and the part that a chip keeps.
                kind = "reduce-scatter"
            channel = _CHANNEL.search(line)
            key = (kind, channel[1] if channel else f"{name} {line}")
            sent = _sent_bytes(kind, size, len(group))
            axes = SLICES if kind == "send" else _axes(group, mesh_shape)
            entry = (kind, dtype, axes, times[name], sent)
            if key not in found or entry[3:] > found[key][3:]:
                found[key] = entry
    sums: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for kind, dtype, axes, count, sent in found.values():
        if sent:
            sums[kind, dtype, axes][0] += count
            sums[kind, dtype, axes][1] += count * sent
    found_sums = [Collective(*key, *values) for key, values in sums.items()]
    return sorted(found_sums, key=lambda collective: -collective.sent_bytes)


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    name = ""
    lines: list[str] = []
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name, lines = header[2], []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _times(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs; a callee stands before its callers, the entry is last."""
    times = dict.fromkeys(computations, 0)
    times[next(reversed(computations))] = 1
    for name, lines in reversed(computations.items()):
        for line in lines:
            called = dict(_CALLED.findall(line))
            trips = _trips(computations[called["condition"]]) if "condition" in called else 1
            names = [*called.values()]
            for branches in _BRANCHES.findall(line):
                names += [branch.strip().lstrip("%") for branch in branches.split(",")]
            for callee in names:
                if callee in times:
                    times[callee] += times[name] * trips
    return times


def _trips(condition: list[str]) -> int:
    """Trips of a loop that counts from 0 to a constant, as a scan does."""
    bounds = [int(found[1]) for line in condition if (found := _INTEGER.search(line))]
    if len(bounds) != 1:
        raise ValueError(f"a loop must count to one constant, but it has {bounds}")
    return bounds[0]


def _moved(shape: str, kind: str, is_start: bool) -> tuple[str, int]:
    """dtype and bytes of what an operation makes; of a combined one, of all that it makes.

    The result of an asynchronous start holds its operands first: as many as there are results.
    """
    sizes = []
    for dtype, dimensions in _SHAPE.findall(shape):
        bits = int(re.sub(r"\D.*", "", dtype.lstrip(string.ascii_lowercase)) or 8)
        elements = math.prod(int(size) for size in dimensions.split(",") if size)
        sizes.append((dtype, elements * max(bits, 8) // 8))
    if kind == "send" or (is_start and kind == "collective-permute"):
        sizes = sizes[:1]  # then its result, and counters
    elif is_start and kind != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]
    dtype, _ = max(sizes, key=lambda item: item[1])
    return dtype, sum(size for _, size in sizes)


def _group(line: str) -> np.ndarray:
    """Devices of the first group that talks."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = [int(size) for size in re.findall(r"=(\d+)", found[1])]
        names = re.findall(r"'([^']*)'", found[1])
        over = re.findall(r"'([^']*)'", found[2])
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        return ids[tuple(slice(None) if name in over else 0 for name in names)].reshape(-1)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?", line):
        sizes = [int(size) for size in found[3].split(",")]
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        if found[4]:
            ids = ids.transpose([int(axis) for axis in found[4].split(",")])
        return ids.reshape(int(found[1]), int(found[2]))[0]
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", line):
        return np.array([int(device) for device in found[1].split(",")])
    return np.zeros(0, int)


def _axes(group: np.ndarray, mesh_shape: dict[str, int]) -> str:
    """Names of the axes along which a group's devices differ; no group means all devices."""
    sizes = tuple(mesh_shape.values())
    if not len(group):
        return "+".join(axis for axis, size in mesh_shape.items() if size > 1)
    coordinates = np.stack(np.unravel_index(group, sizes))
    varies = (coordinates != coordinates[:, :1]).any(axis=1)
    return "+".join(axis for axis, differs in zip(mesh_shape, varies, strict=True) if differs)


def _sent_bytes(kind: str, size: int, members: int) -> int:
    """Of a ring of `members` chips; size is of the result, of a reduce-scatter of its operand."""
    if kind in ("send", "collective-permute", "collective-broadcast") or not members:
        return size
    passes = 2 if kind == "all-reduce" else 1
    return passes * size * (members - 1) // members
