"""Reading a scenario's text strictly: every key is known, of its type and sensible, or it is one clear line.

`Table` hands its keys out one by one and knows what is left over; a reader turns one TOML value into ours or
raises `Nonsense`. A complaint is always `SOURCE: KEY: what is wrong; the cure`, on one line, as a UserError.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, TypeVar
from uuid import UUID

from emu.errors import UserError
from emu.layout import PAGE_SIZE

T = TypeVar("T")
Reader = Callable[[object], T]

MAX_FILE_BYTES: Final = 1 << 20
_SIZE: Final = re.compile(r"([0-9]{1,20}) ?(B|KiB|MiB|GiB|TiB)")
_UNITS: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_TOML_TYPES: Final = {
    bool: "a boolean",
    int: "a whole number",
    float: "a number with a fraction",
    str: "a string",
    list: "an array",
    dict: "a table",
}


class Nonsense(Exception):
    """A value that cannot be meant: `what` is wrong with it, and the `cure`."""

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(what)
        self.what = what
        self.cure = cure


def complaint(source: str, key: str, problem: Nonsense) -> UserError:
    """The one line that a user reads about `key` of `source`."""
    return UserError(f"{source}: {key}: {problem.what}; {problem.cure}")


def shown(value: object) -> str:
    """A user's value as one short line, whatever it is."""
    if isinstance(value, list | dict) or (isinstance(value, int) and value.bit_length() > 64):
        return "this"
    text = f'"{value}"' if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def type_name(value: object) -> str:
    """What TOML calls the type of a value."""
    return _TOML_TYPES.get(type(value), "a date or time")


def nearest(word: str, known: Iterable[str]) -> str:
    """The cure for a mistyped word: the likeliest of the known ones first, then all of them."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1)
    listed = ", ".join(names)
    return f"did you mean {close[0]}? known: {listed}" if close else f"known: {listed}"


class Table:
    """One TOML table being read; `name` is how a complaint calls it."""

    def __init__(self, entries: object, source: str, name: str) -> None:
        self.source = source
        self.name = name
        if not isinstance(entries, dict):
            array, numbered, _ = name.partition("#")
            cure = f"write it as [[{array}]]" if numbered else f"write it as [{name}]"
            raise complaint(source, name, Nonsense(f"{shown(entries)} is {type_name(entries)}, not a table", cure))
        self._left: dict[str, object] = dict(entries)
        self._known: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def key(self, key: str) -> str:
        """Full name of one of this table's keys."""
        return f"{self.name}.{key}" if self.name else key

    def take(self, key: str, reader: Reader[T], default: T) -> T:
        """Read one key, or give the default; the key counts as known from here on."""
        self._known.append(key)
        if key not in self._left:
            return default
        return self.read(key, reader, self._left.pop(key))

    def read(self, key: str, reader: Reader[T], value: object) -> T:
        """Apply a reader to a value of this table; UserError in the name of `key`."""
        try:
            return reader(value)
        except Nonsense as problem:
            raise self.complaint(key, problem) from None

    def end(self) -> None:
        """Refuse whatever nobody asked for."""
        for key in self._left:
            raise self.complaint(
                key if key.isprintable() else repr(key), Nonsense("unknown key", nearest(key, self._known))
            )

    def complaint(self, key: str, problem: Nonsense) -> UserError:
        """A complaint about one of this table's keys."""
        return complaint(self.source, self.key(key), problem)


def read_toml(path: Path) -> Mapping[str, object]:
    """The document in a file; UserError for a file that is missing, unreadable, huge, no text or no TOML."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a scenario file") from None
    if len(raw) > MAX_FILE_BYTES:
        raise UserError(f"{path}: larger than {MAX_FILE_BYTES} bytes; give the path of a scenario file")
    try:
        # Editors of Windows begin a text with a byte-order mark, which is no part of it.
        return tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; a scenario is a TOML text file") from None
    except (ValueError, RecursionError) as error:  # tomllib lets int()'s own ValueError through
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).replace("\n", " ")
        raise UserError(f"{path}: not TOML: {reason}; see the examples in scenarios/") from None


def whole_number(least: int, most: int, meaning: str) -> Reader[int]:
    """Reader of an integer from `least` to `most`; `meaning` completes "set it to …"."""

    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise Nonsense(f"{shown(value)} is {type_name(value)}, not a whole number", f"set it to {meaning}")
        if not least <= value <= most:
            raise Nonsense(f"{shown(value)} is not between {least} and {most}", f"set it to {meaning}")
        return value

    return read


def seconds(least: float, most: float) -> Reader[int]:
    """Reader of a time in seconds, whole or with a fraction, as nanoseconds."""

    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Nonsense(f"{shown(value)} is {type_name(value)}, not a number", "set it to seconds, such as 5 or 0.5")
        if not least <= value <= most:
            raise Nonsense(
                f"{shown(value)} is not between {least:g} and {most:g}", "set it to seconds, such as 5 or 0.5"
            )
        return round(value * 1_000_000_000)

    return read


def one_of(*words: str) -> Reader[str]:
    """Reader of one of a few words."""

    def read(value: object) -> str:
        if not isinstance(value, str):
            raise Nonsense(f"{shown(value)} is {type_name(value)}, not a string", f"known: {', '.join(words)}")
        if value not in words:
            raise Nonsense(f"{shown(value)} is not known", nearest(value, words))
        return value

    return read


def byte_count(value: object) -> int:
    """A size: a whole number of bytes, or text such as "512MiB"."""
    cure = 'write a size such as "1GiB" or "512MiB"'
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise Nonsense(f"{shown(value)} is {type_name(value)}, not a size", cure)
    match = _SIZE.fullmatch(value)
    if match is None:
        raise Nonsense(f"{shown(value)} is not a size", cure)
    return int(match[1]) * _UNITS[match[2]]


def page_count(least: int, most: int) -> Reader[int]:
    """Reader of a number of pages, or of a size in text that must be whole pages."""
    cure = f"set it to a number of {PAGE_SIZE}-byte pages, such as 16"
    in_range = whole_number(least, most, f"a number of {PAGE_SIZE}-byte pages, such as 16")

    def read(value: object) -> int:
        if isinstance(value, float):
            raise Nonsense(f"{shown(value)} pages are no whole number of pages", cure)
        if not isinstance(value, str):
            return in_range(value)
        pages, rest = divmod(byte_count(value), PAGE_SIZE)
        if rest:
            raise Nonsense(f"{shown(value)} is not a multiple of a page", cure)
        return in_range(pages)

    return read


def guid(value: object) -> UUID:
    """A GUID, with or without braces, in the usual groups."""
    cure = 'write it like "6c1f9d1e-0f6b-4b8e-9c55-3f0a6f0f2a11"'
    if not isinstance(value, str):
        raise Nonsense(f"{shown(value)} is {type_name(value)}, not a GUID", cure)
    bare = value[1:-1] if value.startswith("{") and value.endswith("}") else value
    if re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", bare) is None:
        raise Nonsense(f"{shown(value)} is not a GUID", cure)
    if not UUID(bare).int:
        raise Nonsense("the zero GUID names nothing", cure)
    return UUID(bare)


def machine_name(value: object) -> str:
    """A machine's name: it becomes part of the names of shared memory and semaphores."""
    cure = "use 1 to 32 letters, digits, - and _, a letter or digit first"
    if not isinstance(value, str):
        raise Nonsense(f"{shown(value)} is {type_name(value)}, not a string", cure)
    if _NAME.fullmatch(value) is None:
        raise Nonsense(f"{shown(value)} is not a machine name", cure)
    return value
