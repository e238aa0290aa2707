"""Nearly valid inputs: a valid one with something odd in it. All choices are drawn from a Random, which hypothesis can steer."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

ODD_TEXTS: tuple[str, ...] = (
    "",
    " ",
    "a",
    "\0",
    "\n",
    "\x1b[31m",
    "\u202e",
    "\u2028",
    "\ud800",
    "é" * 3,
    "../up",
    "/etc/passwd",
    "a/" * 600,
    "x" * 5000,
)
ODD_TEXTS += ("NaN", "1", "null", "__class__", "{0}", "%s", "\ufeff", "😀", "٣", "con", ".", "C:\\")
ODD_NUMBERS: tuple[float, ...] = (
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    2**31 - 1,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**400,
)
ODD_NUMBERS += (10**30, 10**400, 0.5, -0.5, 1.0, 0.1, 1e-320, 1e308, -0.0, float("inf"), float("nan"))
WORDS = (
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x80",
    b"\xed\xa0\x80",
    b"\n",
    b"\r\n",
)
_INTERESTING = (0, 1, 0x7F, 0x80, 0xFE, 0xFF)


class Members(list[tuple[str, Any]]):
    """The members of a JSON object, of which several may have one name."""


class Raw(str):
    """Text that stands in JSON as it is."""


def _deep(random: Random) -> Any:
    many = random.choice((50, 900, 5000, 100_000))
    opening, closing = random.choice((("[", "]"), ('{"a":', "}")))
    return Raw(opening * many + "1" + closing * many)


def _long_number(random: Random) -> Any:
    return Raw(
        random.choice(("1" * 5000, "1e999", "-1e999", "1" * 300 + ".5", "0." + "1" * 5000, "1e-999999", "01", "--1", "0x10"))
    )


ODD: tuple[Callable[[Random], Any], ...] = (
    lambda random: random.choice((None, True, False)),
    lambda random: random.choice(ODD_NUMBERS),
    lambda random: random.choice(ODD_TEXTS),
    lambda random: random.choice(([], Members(), [[]], [None], Members([("", None)]), [1, 2, 3, 4])),
    lambda random: random.randint(-3, 300),
    lambda random: random.choice((_deep, _long_number))(random),
)


def parsed(text: str) -> Any:
    """Return a JSON value whose objects are Members."""
    return json.loads(text, object_pairs_hook=Members)


def written(value: Any) -> str:
    """Return a value as JSON, Members and Raw as what they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Members):
        return "{" + ",".join(f"{json.dumps(name)}:{written(each)}" for name, each in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**300:
        return "1" + "0" * 400
    return json.dumps(value)


def json_variant(data: bytes, random: Random) -> bytes:
    """Return JSON with a few odd places; now and then it is damaged as text too."""
    try:
        value = odd_somewhere(parsed(data.decode()), random)
        made = written(value).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return bytes_variant(data, random)
    return bytes_variant(made, random) if random.randrange(12) == 0 else made


def odd_somewhere(value: Any, random: Random) -> Any:
    """Return a JSON value that was changed at one to four places; `value` itself may change."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        value = _changed(value, random)
    return value


def _changed(value: Any, random: Random) -> Any:
    # Down the tree by chance, and there one of a few changes.
    if not isinstance(value, list) or not value or random.randrange(5) == 0:
        return _other(value, random)
    place = random.randrange(len(value))
    action = random.randrange(10)
    if action == 0:
        del value[place]
    elif action == 1:
        value.insert(random.randrange(len(value) + 1), value[place])
    elif action == 2 and isinstance(value, Members):
        value[place] = (random.choice((*ODD_TEXTS, *(name for name, _ in value))), value[place][1])
    elif isinstance(value, Members):
        value[place] = (value[place][0], _changed(value[place][1], random))
    else:
        value[place] = _changed(value[place], random)
    return value


def _other(value: Any, random: Random) -> Any:
    if isinstance(value, int) and random.randrange(2):
        return value + random.choice((-1, 1, 2, 100))
    if isinstance(value, str) and random.randrange(3) == 0:
        return text_variant(value, random)
    if random.randrange(8) == 0:
        return random.choice(([value], Members([("a", value)]), str(value)[:99]))
    return random.choice(ODD)(random)


def text_variant(text: str, random: Random) -> str:
    """Return a text with something odd in it, or a part of it."""
    place = random.randrange(len(text) + 1)
    return random.choice(
        (text[:place], text[place:], text[:place] + random.choice(ODD_TEXTS) + text[place:], text * 2, text.upper())
    )


def bytes_variant(data: bytes, random: Random) -> bytes:
    """Return bytes of which a few were changed, lost, doubled or added."""
    made = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 9))):
        _change(made, random)
    return bytes(made)


def _change(made: bytearray, random: Random) -> None:
    place, many = random.randrange(len(made) + 1), random.choice((1, 1, 2, 4, 16, 64))
    action = random.randrange(7)
    if action == 0:
        del made[place:]
    elif action == 1:
        del made[place : place + many]
    elif action == 2:
        made[place:place] = made[place : place + many]
    elif action == 3:
        made[place:place] = random.choice(WORDS)
    elif action == 4:
        word = random.choice(WORDS)
        made[place : place + len(word)] = word
    elif place < len(made):
        made[place] = random.choice(_INTERESTING) if action == 5 else made[place] ^ (1 << random.randrange(8))
