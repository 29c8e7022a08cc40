"""Events as tracers describe them: a system, typed fields in the order of a C struct, a printf format.

Names that the kernel has are in its system `hyperv`, with its fields and its print format; ours are in `vmbus_emu`
and are printed as `name=value`, where a number of an enum has its symbolic name (`__print_symbolic`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from emu.event_fields import Argument, EventSpec
from emu.recording import TraceRecord
from tools.event_names import ENUMS, name_of

KERNEL_SYSTEM: Final = "hyperv"
OWN_SYSTEM: Final = "vmbus_emu"


@dataclass(frozen=True, slots=True)
class Field:
    """One member: its declaration in C, where it lies, how `struct` packs it, and which argument it is."""

    declaration: str
    offset: int
    size: int
    signed: bool
    code: str
    argument: Argument
    index: int

    def member(self, value: int) -> int | bytes:
        """What `struct` packs for a value."""
        return value.to_bytes(self.size, "little") if self.argument.text else value


def system_of(spec: EventSpec) -> str:
    """The system of an event."""
    return KERNEL_SYSTEM if spec.format else OWN_SYSTEM


def fields_of(spec: EventSpec, offset: int) -> tuple[Field, ...]:
    """The members behind the first `offset` bytes, in the order of declaration, aligned as a compiler does."""
    by_name = {argument.name: (index, argument) for index, argument in enumerate(spec.fields)}
    fields = []
    for name in spec.declared or spec.arguments:
        index, argument = by_name[name]
        size = argument.width // 8
        offset += 0 if argument.text else -offset % size
        code = f"{size}s" if argument.text else _codes[size][argument.signed]
        fields.append(Field(_declaration(argument), offset, size, argument.signed, code, argument, index))
        offset += size
    return tuple(fields)


_codes: Final = {1: "Bb", 2: "Hh", 4: "Ii", 8: "Qq"}


def _declaration(argument: Argument) -> str:
    """The member as the kernel's format files declare it."""
    if argument.text:
        kind = "u8" if argument.type.startswith("hex") else "char"
        return f"{kind} {argument.name}[{argument.width // 8}]"
    kinds = {"uint": "unsigned int", "s32": "int"}
    return f"{kinds.get(argument.type, f'u{argument.width}')} {argument.name}"


def print_line(spec: EventSpec) -> str:
    """What stands behind `print fmt:`: the printf format, then a member or a helper's call for each conversion."""
    form = spec.format or " ".join(f"{argument.name}={_conversion(argument)}" for argument in spec.fields)
    printed = _member if spec.format else _printed
    return f'"{form}"' + "".join(f", {printed(argument)}" for argument in spec.fields)


def printed_text(record: TraceRecord) -> str:
    """What `print_line` makes of a record's values."""
    if record.event.format:
        return record.event.text(record.values)
    return " ".join(f"{field.name}={_shown(field, value)}" for field, value in record.event.pairs(record.values))


def _shown(argument: Argument, value: int) -> str:
    """As a tracer shows it: of an enum the name, or in hex a number that has none."""
    if argument.enum in ENUMS:
        return name_of(argument, value) or hex(value)
    return argument.show(value)


def _conversion(argument: Argument) -> str:
    """How an event of ours prints an argument; `_shown` writes the same."""
    if argument.enum in ENUMS:
        return "%s"
    if argument.text:
        return "%pUl" if argument.type == "guid" else "%s"
    if argument.signed:
        return "%d"
    length = "ll" if argument.width == 64 else ""
    return f"0x%{length}x" if argument.type.startswith("x") else f"%{length}u"


def _printed(argument: Argument) -> str:
    if (names := ENUMS.get(argument.enum)) is not None:
        symbols = ", ".join(f'{{ {number.value}, "{number.name}" }}' for number in names)
        return f"__print_symbolic(REC->{argument.name}, {symbols})"
    return _member(argument)


def _member(argument: Argument) -> str:
    if argument.type.startswith("hex"):
        return f"__print_hex(REC->{argument.name}, {argument.width // 8})"
    return f"REC->{argument.name}"
