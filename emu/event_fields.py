"""What the values of a recorded event are: their types, where they lie in a record's six words, how they are shown.

An event is written in the table (`emu.tracing.EVENTS`) as a name and its arguments, each `name:type` or
`name:type:ENUM`, in the order in which they are printed:

    u8 u16 u32 u64   whole numbers          uint   the same as u32, which the kernel declares as `unsigned int`
    s32              an errno or a result   x8 x16 x32 x64   whole numbers that are shown in hex
    guid             two words: the 16 bytes of a `guid_t` as they stand on the wire, little-endian
    strN             N bytes of ASCII, N/8 words, zeros behind the end
    hexN             N bytes of anything, N/8 words

ENUM names the numbers' names (`tools.event_names` knows them). Each argument has a word of its own, or two, or
N/8. An event whose arguments need more than six words is *packed*: each argument, in its order, lies in the lowest
free bits of the first word that has enough of them left; guid, strN and hexN take whole words. `u16/1` says that
a value needs one bit only, whatever the width of its type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Final
from uuid import UUID

from emu.values import valueclass

WORDS: Final = 6
_WORD_BITS: Final = 64
_U64: Final = (1 << 64) - 1
_TYPE: Final = re.compile(r"(u8|u16|u32|u64|uint|s32|x8|x16|x32|x64|guid|(?:str|hex)\d+)(?:/(\d+))?")
_WIDTHS: Final = {"u8": 8, "u16": 16, "u32": 32, "u64": 64, "uint": 32, "s32": 32, "guid": 128}
_CONVERSION: Final = re.compile(r"%(?:pUl|llx|x|d|u)")

Decoder = Callable[[Sequence[int]], tuple[int, ...]]


@valueclass()
class Argument:
    """One value of an event.

    `width` is that of its type in bits, `bits` how many of them are stored; `enum` is "" or the name of an enum.
    """

    name: str
    type: str
    width: int
    bits: int
    enum: str = ""

    @property
    def signed(self) -> bool:
        """Whether values may be below 0."""
        return self.type == "s32"

    @property
    def text(self) -> bool:
        """Whether the value is a GUID, a string or bytes: one number in `values`, a text when shown."""
        return self.type.startswith(("guid", "str", "hex"))

    @property
    def written(self) -> str:
        """The argument as the table writes it: `parse_argument` reads it back."""
        bits = "" if self.bits == self.width else f"/{self.bits}"
        return f"{self.name}:{self.type}{bits}{':' if self.enum else ''}{self.enum}"

    def content(self, value: int) -> bytes:
        """The bytes of a `text` value, as they lie in the record."""
        return value.to_bytes(self.width // 8, "little")

    def show(self, value: int) -> str:
        """The value as people read it, without its enum's names."""
        if self.type == "guid":
            return str(UUID(bytes_le=self.content(value)))
        if self.type.startswith("hex"):
            return self.content(value).hex(" ")
        if self.text:
            return self.content(value).rstrip(b"\0").decode("ascii", "replace")
        return f"{value:#x}" if self.type.startswith("x") else str(value)


def parse_argument(written: str) -> Argument:
    """Read `name:type` or `name:type:ENUM`; a name alone is a u64, as older recordings have it. ValueError."""
    name, *rest = written.split(":")
    kind = rest[0] if rest else "u64"
    match = _TYPE.fullmatch(kind)
    if match is None or len(rest) > 2:
        raise ValueError(f"{written}: no argument of an event")
    type_name = match[1]
    sized = type_name.startswith(("str", "hex"))
    width = int(type_name[3:]) * 8 if sized else _WIDTHS.get(type_name) or int(type_name[1:])
    bits = int(match[2] or width)
    whole_words = 0 < width <= WORDS * _WORD_BITS and width % _WORD_BITS == 0
    if not name or not 0 < bits <= width or (sized and not whole_words):
        raise ValueError(f"{written}: no argument of an event")
    return Argument(name, type_name, width, bits, rest[1] if len(rest) > 1 else "")


@valueclass()
class Place:
    """Where one value lies: from bit `shift` of word `word` on, `bits` of them; over whole words if above 64."""

    word: int
    shift: int
    bits: int


def places_of(fields: Sequence[Argument]) -> tuple[Place, ...]:
    """Where the values of an event lie, by the rule in the module's docstring."""
    sizes = [-(-field.bits // _WORD_BITS) for field in fields]
    if sum(sizes) <= WORDS:
        firsts = (sum(sizes[:index]) for index in range(len(sizes)))
        return tuple(Place(first, 0, max(64, field.bits)) for first, field in zip(firsts, fields, strict=True))
    used: list[int] = []
    places = []
    for field in fields:
        if field.bits > _WORD_BITS:
            places.append(Place(len(used), 0, field.bits))
            used += [_WORD_BITS] * (field.bits // _WORD_BITS)
            continue
        word = next((at for at, bits in enumerate(used) if bits + field.bits <= _WORD_BITS), len(used))
        if word == len(used):
            used.append(0)
        places.append(Place(word, used[word], field.bits))
        used[word] += field.bits
    return tuple(places)


@valueclass()
class EventSpec:
    """An event: its number, its name, and its arguments in the order in which they are printed.

    `format` is "" for events of ours; for the kernel's it is the `TP_printk` format of that tracepoint, which
    takes the arguments in the order of `fields`. `declared` is the order in which the kernel declares them.
    """

    number: int
    name: str
    fields: tuple[Argument, ...]
    format: str = ""
    declared: tuple[str, ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments' names."""
        return tuple(field.name for field in self.fields)

    @property
    def words(self) -> int:
        """How many of a record's words the event uses."""
        return max((place.word + -(-place.bits // _WORD_BITS) for place in places_of(self.fields)), default=0)

    def pack(self, *values: int) -> tuple[int, ...]:
        """The words of a record that holds these values, one for each argument."""
        words = [0] * self.words
        for place, field, value in zip(places_of(self.fields), self.fields, values, strict=True):
            bits = value & ((1 << place.bits) - 1)
            assert field.signed or bits == value, f"{self.name}: {field.name} is {value:#x}"
            for index in range(-(-place.bits // _WORD_BITS)):
                words[place.word + index] |= (bits >> (_WORD_BITS * index) << place.shift) & _U64
        return tuple(words)

    def unpack(self, words: Sequence[int]) -> tuple[int, ...]:
        """The values in a record's words: numbers, below 0 where the type allows that; a text is one number."""
        return decoder_of(self)(words)

    def pairs(self, values: Sequence[int]) -> Iterable[tuple[Argument, int]]:
        """Each argument with its value."""
        return zip(self.fields, values, strict=True)

    def text(self, values: Sequence[int]) -> str:
        """What the kernel prints for these values; for an event of ours `name=value` for each argument."""
        if not self.format:
            return " ".join(
                f"{field.name}={field.show(value)}" for field, value in zip(self.fields, values, strict=True)
            )
        values_left = iter(zip(self.fields, values, strict=True))

        def printed(match: re.Match[str]) -> str:
            field, value = next(values_left)
            if match[0] == "%pUl":
                return field.show(value)
            if match[0] == "%d":
                # The kernel prints some unsigned fields as signed ones, and so they look there.
                return str((value & 0xFFFFFFFF ^ 1 << 31) - (1 << 31))
            return f"{value:x}" if match[0].endswith("x") else str(value)

        return _CONVERSION.sub(printed, self.format)


@lru_cache(maxsize=1024)
def decoder_of(spec: EventSpec) -> Decoder:
    """What turns the words of a record of this event into its values; made once, as recordings are long."""
    places = places_of(spec.fields)
    count = len(places)
    if all(place.bits == 64 for place in places) and not any(field.signed for field in spec.fields):
        return lambda words: tuple(words[:count])

    def decode(words: Sequence[int]) -> tuple[int, ...]:
        values = []
        for place, field in zip(places, spec.fields, strict=True):
            value = 0
            for index in range(-(-place.bits // _WORD_BITS)):
                value |= words[place.word + index] << (_WORD_BITS * index)
            value = value >> place.shift & ((1 << place.bits) - 1)
            values.append((value & 0xFFFFFFFF ^ 1 << 31) - (1 << 31) if field.signed else value)
        return tuple(values)

    return decode


def guid_value(wire: bytes) -> int:
    """The value of a `guid` argument for the 16 bytes of a `guid_t`."""
    return int.from_bytes(wire[:16], "little")


def text_value(text: str, nbytes: int) -> int:
    """The value of a `strN` argument, cut at N bytes."""
    return int.from_bytes(text.encode("ascii", "replace")[:nbytes], "little")
