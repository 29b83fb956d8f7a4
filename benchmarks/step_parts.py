"""Where the time of a compiled step goes: kernels of a profile, by the part of the model.

A kernel's part is found from the metadata of the compiled program's text (the named scopes of
model, loss and step), whether it is a matrix product from the program itself. Nothing is measured
here.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PHASES = ("forward", "recomputed", "backward")
ATTENTION = "attention"
LINEAR = "linear layers: products"
WEIGHTS = "linear layers: casts, slices, sums"
ELEMENTWISE = "norms, rotary, GeGLU, residuals"
HEAD = "head: products"
HEAD_ELEMENTWISE = "head: softmax, entries"
EMBEDDING = "embedding"
OPTIMIZER = "optimizer, norms of gradients"
OTHER = "stacks of the scan, copies, other"
EXPOSED = "communication, nothing beside it"
PARTS = (
    ATTENTION, LINEAR, WEIGHTS, ELEMENTWISE, HEAD, HEAD_ELEMENTWISE, EMBEDDING, OPTIMIZER, OTHER,
    EXPOSED,
)  # fmt: skip

_SCOPE = re.compile(r"\b(attention|linear|norm|rotary|mlp|head|targets|embedding)\b(?!')")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_PRODUCT_TARGET = re.compile(r"gemm|matmul|dot", re.IGNORECASE)
_PRODUCT_KERNEL = re.compile(r"gemm|nvjet|xmma|cutlass_\d+", re.IGNORECASE)
_ATTENTION_KERNEL = re.compile(r"flash|kernel_cutlass|fmha|attention", re.IGNORECASE)
_COLLECTIVE_KERNEL = re.compile(r"nccl", re.IGNORECASE)
_BACKWARD_KERNEL = re.compile(r"bwd|backward|dkdv|_dq", re.IGNORECASE)
_MOVES = ("dynamic_update_slice", "dynamic_slice", "copy", "squeeze", "while", "broadcast_in_dim")


@dataclass
class Operation:
    """An instruction of the program."""

    opcode: str
    op_name: str
    called: str | None
    is_product: bool
    operands: list[str]


class Program:
    """The instructions of a compiled program's text, by name."""

    def __init__(self, text: str):
        self.operations: dict[str, Operation] = {}
        self._computations: dict[str, list[Operation]] = defaultdict(list)
        computation = ""
        for line in text.splitlines():
            if (header := _COMPUTATION.match(line)) is not None:
                computation = header[1]
            elif (found := _INSTRUCTION.match(line)) is not None:
                operation = _operation(found[2])
                if operation is not None:
                    self.operations[found[1]] = operation
                    self._computations[computation].append(operation)
        self._users: dict[str, list[str]] = defaultdict(list)
        for name, operation in self.operations.items():
            for operand in operation.operands:
                self._users[operand].append(name)
        # Kernels are called as the instruction, but with what a symbol may hold.
        self._by_symbol = {_symbol(name): name for name in self.operations}

    def find(self, *names: str) -> str | None:
        """The first of `names` that is an instruction, or the symbol of one."""
        for name in names:
            if name in self.operations:
                return name
            if _symbol(name) in self._by_symbol:
                return self._by_symbol[_symbol(name)]
        return None

    def describe(self, name: str) -> tuple[str, bool]:
        """(op_name, whether it is a matrix product) of an instruction, or of what it calls."""
        operation = self.operations[name]
        inner = list(self._within(operation.called))
        products = [one for one in (operation, *inner) if one.is_product]
        if products:
            names = [one.op_name for one in (*products, operation, *inner) if one.op_name]
            return (names[0] if names else ""), True
        if operation.op_name:
            return operation.op_name, False
        named = [one.op_name for one in inner if _SCOPE.search(one.op_name)]
        named = named or [one.op_name for one in inner if one.op_name]
        return (max(named, key=named.count) if named else self._named_user(name)), False

    def _named_user(self, name: str, depth: int = 4) -> str:
        """The op_name of what first uses an instruction that the compiler gave none."""
        for user in self._users[name]:
            found = self.operations[user].op_name
            if not found and depth:
                found = self._named_user(user, depth - 1)
            if found:
                return found
        return ""

    def _within(self, computation: str | None, depth: int = 4) -> Iterator[Operation]:
        for operation in self._computations.get(computation or "", ()):
            yield operation
            if depth:
                yield from self._within(operation.called, depth - 1)


def _operation(text: str) -> Operation | None:
    opcode = _OPCODE.search(" " + text)
    if opcode is None:
        return None
    op_name, called, target = (p.search(text) for p in (_OP_NAME, _CALLED, _TARGET))
    is_product = opcode[1] == "dot" or (
        target is not None and _PRODUCT_TARGET.search(target[1]) is not None
    )
    return Operation(
        opcode=opcode[1],
        op_name=op_name[1] if op_name else "",
        called=called[1] if called else None,
        is_product=is_product,
        operands=_OPERAND.findall(text.split(", metadata=")[0]),
    )


def _symbol(name: str) -> str:
    return re.sub(r"[^\w]", "_", name)


class Event(NamedTuple):
    """A kernel or a copy on the device."""

    name: str
    start_ns: float
    stop_ns: float
    stats: dict[str, Any]


@dataclass
class Kernel:
    """All runs of one kernel for one instruction."""

    name: str
    part: str
    phase: str
    instruction: str
    op_name: str
    seconds: float = 0.0
    runs: int = 0


@dataclass
class Breakdown:
    """Seconds of one step; overlapping kernels count once, so that the parts and idle sum to it.

    Of communication only the time counts in which nothing else runs.
    """

    seconds: float
    idle_seconds: float
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Part → phase → seconds."""
    kernels: list[Kernel] = field(default_factory=list)
    """The longest first."""
    communication_seconds: float = 0.0
    """In which something was on its way, whatever else ran."""
    source: str = ""
    """Which lines of which plane; of several devices one."""


def break_down(trace: Any, program: Program, steps: int) -> Breakdown | None:
    """Where `steps` steps under a profile went; None if the profile has no kernel.

    trace: a `jax.profiler.ProfileData`. The time is from the first kernel's start to the last one's
    end. Without a GPU it is that of the host's threads, which share operations, and only of use to
    try this out.
    """
    events, source = _events(trace)
    if not events:
        return None
    events.sort(key=lambda event: event.start_ns)
    found: dict[tuple[str, str], Kernel] = {}
    covered = events[0].start_ns
    busy_ns = 0.0
    computing = _union(event for event in events if not _is_collective(event))
    communicating = _union(event for event in events if _is_collective(event))
    for event in events:
        if _is_collective(event):
            continue
        new_ns = max(0.0, event.stop_ns - max(event.start_ns, covered))
        covered = max(covered, event.stop_ns)
        busy_ns += new_ns
        instruction = program.find(str(event.stats.get("hlo_op", "")), event.name) or ""
        key = (event.name, instruction)
        if key not in found:
            found[key] = _kernel(event, instruction, program)
        found[key].seconds += new_ns / 1e9 / steps
        found[key].runs += 1
    last_ns = max(event.stop_ns for event in events)
    seconds = (last_ns - events[0].start_ns) / 1e9 / steps
    exposed_ns = _length(_union_of(computing, communicating)) - _length(computing)
    parts = {part: dict.fromkeys(PHASES, 0.0) for part in PARTS}
    for kernel in found.values():
        parts[kernel.part][kernel.phase] += kernel.seconds
    parts[EXPOSED]["forward"] = exposed_ns / 1e9 / steps
    kernels = sorted(found.values(), key=lambda kernel: -kernel.seconds)
    idle_seconds = seconds - (busy_ns + exposed_ns) / 1e9 / steps
    communication = _length(communicating) / 1e9 / steps
    return Breakdown(seconds, idle_seconds, parts, kernels, communication, source)


_Spans = list[tuple[float, float]]


def _is_collective(event: Event) -> bool:
    return _COLLECTIVE_KERNEL.search(event.name) is not None


def _union(events: Iterable[Event]) -> _Spans:
    return _merged([(event.start_ns, event.stop_ns) for event in events])


def _union_of(one: _Spans, other: _Spans) -> _Spans:
    return _merged([*one, *other])


def _merged(spans: _Spans) -> _Spans:
    merged: _Spans = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def _length(spans: _Spans) -> float:
    return sum(stop - start for start, stop in spans)


def _kernel(event: Event, instruction: str, program: Program) -> Kernel:
    op_name, is_product = program.describe(instruction) if instruction else ("", False)
    op_name = op_name or str(event.stats.get("tf_op", ""))
    is_product = is_product or _PRODUCT_KERNEL.search(event.name) is not None
    part = part_of(op_name, is_product)
    phase = phase_of(op_name)
    if part == OTHER and _ATTENTION_KERNEL.search(event.name):
        part = ATTENTION
        phase = "backward" if _BACKWARD_KERNEL.search(event.name) else "forward"
    return Kernel(event.name, part, phase, instruction, op_name)


def part_of(op_name: str, is_product: bool) -> str:
    """The part of the step that an operation's scopes name; the innermost one decides."""
    scopes = [] if op_name.startswith("state") else _SCOPE.findall(op_name)
    if scopes:
        scope = scopes[-1]
        if scope == "attention":
            return ATTENTION
        if scope == "linear":
            return LINEAR if is_product else WEIGHTS
        if scope in ("head", "targets"):
            return HEAD if is_product else HEAD_ELEMENTWISE
        return EMBEDDING if scope == "embedding" else ELEMENTWISE
    if "jvp(" in op_name:
        return OTHER if op_name.rsplit("/", 1)[-1] in _MOVES else ELEMENTWISE
    # What is not differentiated is the optimizer's, the guard's or a norm.
    return OPTIMIZER if op_name.startswith("jit(train_step)/") else OTHER


def phase_of(op_name: str) -> str:
    """Of an operation's place in the differentiated program."""
    if "rematted_computation" in op_name:
        return "recomputed"
    return "backward" if "transpose(jvp" in op_name else "forward"


def _events(trace: Any) -> tuple[list[Event], str]:
    planes = [p for p in trace.planes if p.name.startswith("/device:GPU:")][:1]
    if planes:
        # Other lines of the plane say the same again, by operation or by module.
        lines = [line for plane in planes for line in plane.lines if "Stream" in line.name]
        events = [_event(event) for line in lines for event in line.events]
        return events, f"{len(lines)} streams of {', '.join(plane.name for plane in planes)}"
    events = [
        event
        for plane in trace.planes
        for line in plane.lines
        for event in map(_event, line.events)
        if "hlo_op" in event.stats and not event.name.startswith(("while", "call", "conditional"))
    ]
    return events, "no GPU in the profile: the host's threads, of no meaning as times"


def _event(event: Any) -> Event:
    stats = {name: value for name, value in event.stats if name is not None}
    return Event(event.name, event.start_ns, event.start_ns + event.duration_ns, stats)


def read_trace(folder: Path) -> Any:
    """The `ProfileData` that `jax.profiler.trace` left under `folder`. Raises FileNotFoundError."""
    from jax.profiler import ProfileData

    found = sorted(folder.rglob("*.xplane.pb"))
    if not found:
        raise FileNotFoundError(f"a profile must have an .xplane.pb, but {folder} has none")
    return ProfileData.from_file(str(found[-1]))


def sample_of(trace: Any, events_per_line: int = 3) -> Iterable[str]:
    """What the planes and lines of a profile are, with their first events, to read by eye."""
    for plane in trace.planes:
        for line in plane.lines:
            events = list(line.events)
            yield f"{plane.name} | {line.name} | {len(events)} events"
            for event in events[:events_per_line]:
                yield f"    {event.name} {event.duration_ns:.0f} ns {dict(event.stats)}"


def table(found: Breakdown) -> list[str]:
    """The parts in ms, by phase, whose sum is the step."""
    lines = [f"{'ms of a step':36}{''.join(f'{phase:>12}' for phase in PHASES)}{'all':>10}{'':>8}"]
    for part, phases in found.parts.items():
        total = sum(phases.values())
        cells = "".join(f"{1e3 * phases[phase]:12.2f}" for phase in PHASES)
        lines.append(f"{part:36}{cells}{1e3 * total:10.2f}{total / found.seconds:8.1%}")
    idle = found.idle_seconds
    lines.append(f"{'idle':36}{'':36}{1e3 * idle:10.2f}{idle / found.seconds:8.1%}")
    lines.append(f"{'step under the profile':36}{'':36}{1e3 * found.seconds:10.2f}")
    if found.communication_seconds:
        share = found.parts[EXPOSED]["forward"] / found.communication_seconds
        lines.append(
            f"communication {1e3 * found.communication_seconds:.2f} ms, {share:.1%} of it exposed"
        )
    return lines


def longest(found: Breakdown, steps: int, count: int | None) -> list[str]:
    """The kernels that take longest: ms of a step, runs a step, part, phase, names."""
    return [
        f"{1e3 * kernel.seconds:9.3f} ms {kernel.runs / steps:7.1f}x  {kernel.part[:20]:20} "
        f"{kernel.phase[:8]:8}  {kernel.name[:60]} [{kernel.instruction}] "
        f"{_short(kernel.op_name)}"
        for kernel in found.kernels[:count]
    ]


def _short(op_name: str) -> str:
    return re.sub(r"while/body/|closed_call/|eval_jaxpr/|jit\(train_step\)/", "", op_name)[-110:]
