"""Runs the few instructions of PTX that our kernel has, thread after thread, on the memory of the simulated device."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

View = Callable[[int, int], memoryview]  # the memory of an access: address, size
_ADDRESS = re.compile(r"\[(%\w+)(?:\+(\d+))?\]")
_MASK = (1 << 64) - 1


def run(ptx: str, arguments: Sequence[int], blocks: int, threads: int, view: View) -> None:
    """Run the only kernel of a source with 64-bit arguments."""
    head, body = ptx.split("{", 1)
    names = re.findall(r"\.param \.u64 (\w+)", head)
    lines = [line.strip().rstrip(";") for line in body.split("}")[0].splitlines()]
    code = [line for line in lines if line and not line.startswith(".reg")]
    parameters = dict(zip(names, arguments, strict=True))
    for block in range(blocks):
        for thread in range(threads):
            _Thread(code, parameters, {"%ctaid.x": block, "%tid.x": thread, "%ntid.x": threads}, view).run()


class _Thread:
    def __init__(self, code: Sequence[str], parameters: dict[str, int], registers: dict[str, int], view: View) -> None:
        self._code, self._parameters, self._registers, self._view = code, parameters, registers, view

    def run(self) -> None:
        at, labels = 0, {line[:-1]: index for index, line in enumerate(self._code) if line.endswith(":")}
        while self._code[at] != "ret":
            words = self._code[at].replace(",", "").split()
            if words[0].startswith("@"):
                taken, words = bool(self._registers[words[0][1:]]), words[1:]
            else:
                taken = True
            at += 1
            if words[0] == "bra":
                at = labels[words[1]] if taken else at
            elif not words[0].endswith(":"):
                self._do(words[0], words[1:])

    def _do(self, kind: str, operands: Sequence[str]) -> None:
        if kind == "st.global.b32":
            self._memory(operands[0], 4)[:] = self._registers[operands[1]].to_bytes(4, "little")
            return
        target, *sources = operands
        if kind == "ld.param.u64":
            value = self._parameters[sources[0].strip("[]")]
        elif kind.startswith("ld.global."):
            value = int.from_bytes(self._memory(sources[0], int(kind[-2:]) // 8), "little")
        else:
            value = _OPERATIONS[kind](*(self._value(source) for source in sources)) & _MASK
        self._registers[target] = value

    def _value(self, operand: str) -> int:
        return self._registers[operand] if operand.startswith("%") else int(operand)

    def _memory(self, operand: str, size: int) -> memoryview:
        found = _ADDRESS.fullmatch(operand)
        assert found is not None
        address = self._registers[found[1]] + int(found[2] or 0)
        assert address % size == 0, "accesses are aligned"
        return self._view(address, size)


_OPERATIONS: dict[str, Callable[..., int]] = {
    "cvta.to.global.u64": lambda one: one,
    "mov.u32": lambda one: one,
    "cvt.u64.u32": lambda one: one,
    "mul.wide.u32": lambda one, other: one * other,
    "mul.lo.s64": lambda one, other: one * other,
    "add.s64": lambda one, other: one + other,
    "shl.b64": lambda one, count: one << count,
    "setp.ge.u64": lambda one, other: int(one >= other),
}
