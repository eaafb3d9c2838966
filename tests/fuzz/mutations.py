"""Changes of valid files: seeded, so that a fault can be had again from its format and number."""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any

#: Numbers at and beyond the ends of what readers expect.
NUMBERS = (
    "0",
    "-1",
    "1",
    "7",
    "65536",
    str(2**31 - 1),
    str(2**31),
    str(2**40),
    str(2**63),
    str(10**400),
    "1e308",
    "1e-320",
)
#: The same as values of JSON, with those of other types.
VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 20_000, 10**6, 2**31, 2**40, 2**63, 10**30, 10**400),
    *(1.5, 1e308, float("nan"), float("inf"), True, None, "", "x", "../x", [], [[]], {}, ["a"], {"a": [1]}),
)


def of_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bits flipped, ends cut off, parts removed, moved or repeated, numbers and bytes replaced."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        place, length = chance.randrange(len(data)), chance.choice((1, 2, 4, 8, 16, 64))
        # Headers decide most: half of the changes are among the first bytes.
        if chance.random() < 0.5:
            place = chance.randrange(min(len(data), 160))
        match chance.randrange(8):
            case 0:
                for _ in range(chance.choice((1, 8))):
                    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 1:
                del data[place:]
            case 2:
                del data[place : place + length]
            case 3:
                other = chance.randrange(len(data))
                data[place:place] = data[other : other + length]
            case 4:
                data[place : place + length] = chance.randbytes(length)
            case 5:
                value = chance.choice((0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1))
                data[place : place + 8] = value.to_bytes(8, chance.choice(("little", "big")))
            case 6:
                data[:] = of_text(data.decode("latin-1"), chance).encode("latin-1")
            case _:
                data[place] ^= 1 << chance.randrange(8)
    return bytes(data)


def of_text(text: str, chance: random.Random) -> str:
    """A number replaced, a line, a cell or a word removed, repeated or exchanged with another."""
    numbers = list(re.finditer(r"\d+(?:\.\d+)?", text))
    if numbers and chance.random() < 0.5:
        found = chance.choice(numbers)
        return text[: found.start()] + chance.choice(NUMBERS) + text[found.end() :]
    separator = chance.choice(("\n", ",", " ", "="))
    parts = text.split(separator)
    place = chance.randrange(len(parts))
    match chance.randrange(4):
        case 0:
            del parts[place]
        case 1:
            parts.insert(place, parts[place])
        case 2:
            other = chance.randrange(len(parts))
            parts[place], parts[other] = parts[other], parts[place]
        case _:
            parts[place] = chance.choice(("", "nan", "'", '"', "[", "\x00", "é" * 3, "9" * 5000, "../" * 9))
    return separator.join(parts)


def of_json(content: bytes, chance: random.Random) -> bytes:
    """An entry removed, renamed, repeated or replaced; sometimes the text itself is changed."""
    if chance.random() < 0.2:
        return of_bytes(content, chance)
    value = json.loads(content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        holder, key = chance.choice(list(places(value)))
        match chance.randrange(4):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[f"{key}2"] = holder.pop(key)
            case 2:
                other, name = chance.choice(list(places(value)))
                holder[key] = copy.deepcopy(other[name])
            case _:
                holder[key] = copy.deepcopy(chance.choice(VALUES))
        if not list(places(value)):
            break
    return json.dumps(value).encode()


def places(value: Any) -> Any:
    """Every entry in nested dictionaries and lists: (holder, key)."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(pairs):
        yield value, key
        yield from places(item)
