"""Which local variables of a suspended function it may still read: two that differ only in others go on alike."""

from __future__ import annotations

import dis
from functools import cache
from types import CodeType, FrameType
from typing import Any


def live_locals(frame: FrameType) -> list[tuple[str, Any]]:
    """The names and values, ordered by name. What is shared with inner functions counts as live."""
    code = frame.f_code
    live = _live_at(code).get(frame.f_lasti, frozenset(code.co_varnames))
    shared = {*code.co_cellvars, *code.co_freevars}
    return sorted((name, value) for name, value in frame.f_locals.items() if name in live or name in shared)


@cache
def _live_at(code: CodeType) -> dict[int, frozenset[str]]:
    """For each instruction, the variables that may be read after it before they are set: the textbook's backward data
    flow over the bytecode, where an exception may be raised by any instruction."""
    instructions = list(dis.get_instructions(code))
    follows: dict[int, set[int]] = {}
    reads: dict[int, set[str]] = {}
    sets: dict[int, set[str]] = {}
    for at, each in enumerate(instructions):
        name = each.opname
        after = follows[each.offset] = set[int]()
        if at + 1 < len(instructions) and name not in _ENDS and not name.startswith(_JUMPS):
            after.add(instructions[at + 1].offset)
        if each.opcode in dis.hasjrel or each.opcode in dis.hasjabs:
            after.add(each.argval)
        after.update(entry.target for entry in _handlers(code) if entry.start <= each.offset < entry.end)
        names = each.argval if isinstance(each.argval, tuple) else (each.argval,)
        is_local, only_sets = "_FAST" in name, name in ("STORE_FAST", "DELETE_FAST", "STORE_FAST_STORE_FAST")
        sets[each.offset] = set(names) if is_local and only_sets else set()
        reads[each.offset] = set(names) if is_local and not only_sets else set()
    before: dict[int, set[str]] = {offset: set() for offset in follows}
    after_: dict[int, set[str]] = {offset: set() for offset in follows}
    changed = True
    while changed:
        changed = False
        for offset in reversed(follows):
            after_[offset] = set().union(*(before[each] for each in follows[offset]))
            live = reads[offset] | (after_[offset] - sets[offset])
            if live != before[offset]:
                before[offset], changed = live, True
    return {offset: frozenset(names) for offset, names in after_.items()}


_JUMPS = ("JUMP_FORWARD", "JUMP_BACKWARD")
_ENDS = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE")


def _handlers(code: CodeType) -> list[Any]:
    bytecode: Any = dis.Bytecode(code)
    return list(bytecode.exception_entries)
