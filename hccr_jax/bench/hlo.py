"""What a compiled GPU program does, counted in its HLO text: kernels, bytes, chains, reductions."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
# Instructions that start no kernel: names of values, and the second halves of asynchronous ones.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier",
    "partition-id", "replica-id", "all-reduce-done", "all-gather-done", "copy-done", "async-done",
    "collective-permute-done",
}  # fmt: skip
_COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all",
    "all-reduce-start", "all-gather-start",
)  # fmt: skip
_CALLS = ("while", "call", "conditional")  # of other computations, whose kernels count
_VIEWS = ("bitcast", "convert", "reshape", "copy", "transpose")
_MAX_VIEWS = 4
_DECLARED = re.compile(r"bytes=(\d+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO.

    Attributes:
      name: of its value.
      type: of its value, as text.
      op: the operation.
      operands: names of values.
      attributes: the rest of the line.
    """

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def num_bytes(self) -> int:
        """Of the value, all parts of a tuple."""
        return type_bytes(self.type)

    def attribute(self, name: str) -> str | None:
        """Returns the computation that an attribute names, such as `calls`, or None."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found.group(1)

    @property
    def trips(self) -> int:
        """How often a loop runs, if the compiler knows; else 1."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(found.group(1)) if found else 1


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A launch: its instruction, how often it runs, and the bytes it reads and writes each time."""

    instruction: Instruction
    times: int
    num_bytes: int


def type_bytes(text: str) -> int:
    """Returns the size of a value from its type.

    >>> type_bytes("(f32[2,3]{1,0}, bf16[8]{0})")
    40
    """
    shapes = ((kind, dims) for kind, dims in _ARRAY.findall(text))
    return sum(
        _BYTES[kind] * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in shapes
    )


class HostWork(NamedTuple):
    """What the host does for the steps of one execution.

    Attributes:
      host_turns: in each step: the host reads the condition of the loop, and waits for it.
      graphs: CUDA graphs that it starts, in each step if the loop is the host's, else in all.
      eager: kernels and copies that it starts one by one, likewise.
    """

    host_turns: int
    graphs: int
    eager: int


def count_host_work(thunks: str) -> HostWork:
    """Returns what the host does, from XLA's dump of a program's thunks after its passes."""
    lines = re.findall(r"^( *)\d+: (k\w+)", thunks, re.M)
    above: list[tuple[int, str]] = []
    graphs, eager, loops = [0, 0], [0, 0], 0  # outside and inside of a loop of the host's
    for indent, kind in lines:
        while above and above[-1][0] >= len(indent):
            above.pop()
        kinds = [other for _, other in above]
        above.append((len(indent), kind))
        if "kCommandBuffer" in kinds:
            continue
        inside = "kWhile" in kinds
        graphs[inside] += kind == "kCommandBuffer"
        loops += kind == "kWhile" and not inside
        eager[inside] += kind not in ("kCommandBuffer", "kWhile", "kConditional", "kSequential")
    driven = loops > 0
    return HostWork(int(driven), graphs[driven], eager[driven])


def kernel_names(text: str) -> set[str]:
    """Returns the names of our own kernels in a program."""
    return set(re.findall(r'xla\.gpu\.triton".*?\bname = "([^"]+)"', text))


class Module:
    """The computations of a program."""

    def __init__(self, text: str) -> None:
        """Parses the text of a compiled program."""
        self._computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        lines: list[Instruction] | None = None
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                lines = self._computations.setdefault(head.group(2), [])
                self.entry = head.group(2) if head.group(1) else self.entry
            elif line.startswith("}"):
                lines = None
            elif lines is not None and (instruction := _parse(line)):
                lines.append(instruction)

    def step_body(self) -> tuple[str, Instruction | None]:
        """Returns the computation of a training step, and the loop that it is the body of.

        It is the loop body with the most kernels, or the whole program where it has no loop.
        """
        loops = [i for name in self._reachable(self.entry) for i in self._computations[name]]
        loops = [loop for loop in loops if loop.op == "while"]
        whole = len(list(self.kernels(self.entry)))
        for loop in sorted(loops, key=lambda i: -len(list(self.kernels(self._body(i))))):
            if 2 * len(list(self.kernels(self._body(loop)))) > whole:
                return self._body(loop), loop
        return self.entry, None

    def kernels(self, computation: str, times: int = 1) -> Iterator[Kernel]:
        """Yields the kernels that a computation starts, those of its loops included."""
        values = {i.name: i for i in self._computations[computation]}
        for instruction in self._computations[computation]:
            if instruction.op in _CALLS:
                for name in _callees(instruction):
                    yield from self.kernels(name, times * instruction.trips)
            elif instruction.op not in _FREE:
                yield Kernel(instruction, times, self._traffic(instruction, values))

    def longest_chain(self, computation: str) -> int:
        """Returns how many kernels of a computation must run one after another at least."""
        depth: dict[str, int] = {}
        for instruction in self._computations[computation]:
            own = 0 if instruction.op in _FREE else 1
            if instruction.op in _CALLS:
                own = instruction.trips * sum(map(self.longest_chain, _callees(instruction)))
            before = max((depth.get(name, 0) for name in instruction.operands), default=0)
            depth[instruction.name] = before + own
        return max(depth.values(), default=0)

    def collectives(self, computation: str) -> list[int]:
        """Returns the bytes of each reduction or exchange between devices, in order."""
        return [
            sum(self._value_bytes(computation, kernel.instruction))
            for kernel in self.kernels(computation)
            if kernel.instruction.op in _COLLECTIVES
            for _ in range(kernel.times)
        ]

    def _value_bytes(self, computation: str, instruction: Instruction) -> list[int]:
        # An asynchronous one's value has operands and results.
        size = instruction.num_bytes
        return [size // 2 if instruction.op == "all-gather-start" else size]

    def _traffic(self, instruction: Instruction, values: dict[str, Instruction]) -> int:
        """Returns the bytes that a kernel reads and writes."""
        declared = _DECLARED.search(instruction.attributes)
        if instruction.op == "custom-call" and declared:
            return int(declared.group(1))
        total = instruction.num_bytes
        callee = instruction.attribute("calls") if instruction.op == "fusion" else None
        partial = self._partial_reads(callee) if callee else {}
        if callee and (updated := self._updated(callee)) is not None:
            total = updated
        seen = set()
        for index, name in enumerate(instruction.operands):
            if index in partial:
                total += partial[index]
            elif name not in seen and name in values:
                total += values[name].num_bytes
            seen.add(name)
        if instruction.op in ("dynamic-slice", "slice", "gather"):
            total = 2 * instruction.num_bytes
        return total

    def _updated(self, fusion: str) -> int | None:
        """Returns the bytes that a fusion writes into a buffer in place; None for others."""
        root = self._computations[fusion][-1]
        values = {i.name: i for i in self._computations[fusion]}
        if root.op == "dynamic-update-slice":
            return values[root.operands[1]].num_bytes
        return None

    @functools.cache  # noqa: B019
    def _partial_reads(self, fusion: str) -> dict[int, int]:
        """Returns, of the operands that a fusion only reads parts of, the bytes that it reads."""
        instructions = self._computations[fusion]
        users: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in instructions:
            for index, name in enumerate(instruction.operands):
                users.setdefault(name, []).append((instruction, index))

        def reads(name: str, depth: int = 0) -> int | None:
            total = 0
            for user, index in users.get(name, []):
                if user.op in _VIEWS and depth < _MAX_VIEWS:
                    part = reads(user.name, depth + 1)
                    if part is None:
                        return None
                    total += part
                elif user.op == "slice" or (user.op in ("dynamic-slice", "gather") and index == 0):
                    total += user.num_bytes
                elif user.op != "dynamic-update-slice" or index > 0:
                    return None
            return total

        found = {}
        for instruction in instructions:
            part = reads(instruction.name) if instruction.op == "parameter" else None
            if part is not None:
                found[int(instruction.operands[0])] = min(part, instruction.num_bytes)
        return found

    def _body(self, loop: Instruction) -> str:
        return loop.attribute("body") or ""

    def _reachable(self, computation: str) -> Iterator[str]:
        yield computation
        for instruction in self._computations[computation]:
            if instruction.op in _CALLS:
                for name in _callees(instruction):
                    yield from self._reachable(name)


def _callees(instruction: Instruction) -> list[str]:
    """Returns the computations that run as part of an instruction, a loop's condition aside."""
    names = map(instruction.attribute, ("body", "to_apply", "true_computation"))
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    more = re.findall(r"[\w.\-]+", branches.group(1))[:1] if branches else []
    return [name for name in names if name] + more


def _parse(line: str) -> Instruction | None:
    found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)", line)
    if not found:
        return None
    name, rest = found.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opened = rest.index("(")
    closed = _closing(rest, opened)
    op, inside = rest[:opened], rest[opened + 1 : closed]
    operands = re.findall(r"%([\w.\-]+)", inside)
    if op == "parameter":
        operands = [inside]
    return Instruction(name, kind, op, tuple(operands), rest[closed + 1 :])


def _closing(text: str, start: int) -> int:
    """Returns the place of the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text) - 1
