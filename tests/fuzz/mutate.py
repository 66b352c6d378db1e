"""What is done to bytes and to JSON documents."""

from __future__ import annotations

import json
import random
from typing import Any

HOSTILE_TEXT = (
    "",
    " ",
    "x" * 100_000,
    "\x1b[2J\x1b]0;owned\x07",
    "a\nb\r",
    "\u202e\ud800",
    "[/bold]",
    "{}",
    "../../etc",
    "NaN",
    "\0",
)
HOSTILE_JSON = (  # as text: values that no JSON writer makes are among them
    *("null", "true", "false", "0", "-1", "1", "1.5", "1e999", "-1e999", "1e-999", "NaN", "Infinity", "[]", "{}", '""'),
    *(
        "9" * 20,
        "9" * 400,
        "9" * 5000,
        "1" + "0" * 18,
        str(2**31),
        str(2**63),
        "0.1",
        "[[[]]]",
        '[1, "a", null]',
        '{"a": {"b": []}}',
    ),
    *("[" * 1000 + "]" * 1000, "[" * 100_000, '{"a":' * 70 + "1" + "}" * 70, "[" + "0," * 3000 + "0]"),
    *map(json.dumps, HOSTILE_TEXT),
)


def some_bytes(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Content with one thing done to its bytes."""
    changed = bytearray(content)
    at = rng.randrange(len(changed)) if changed else 0
    length = min(len(changed) - at, rng.choice((1, 2, 8, 100, 4096)))
    kind = rng.choice(("flip", "flip", "flip", "zeros", "noise", "cut", "insert", "remove", "repeat", "append"))
    if kind == "flip" and changed:
        bit = rng.randrange(8)
        changed[at] ^= 1 << bit
        return f"bit {bit} of byte {at} flipped", bytes(changed)
    if kind == "zeros":
        changed[at : at + length] = bytes(length)
    elif kind == "noise":
        changed[at : at + length] = rng.randbytes(length)
    elif kind == "cut":
        del changed[at:]
    elif kind == "insert":
        changed[at:at] = rng.randbytes(length)
    elif kind == "remove":
        del changed[at : at + length]
    elif kind == "repeat":
        changed[at:at] = changed[at : at + length]
    else:
        changed += rng.randbytes(length)
    return f"{kind}, {length} bytes at {at}", bytes(changed)


def _places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a document."""
    inner = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    return [found for key, value in inner for found in ((*path, key), *_places(value, (*path, key)))]


def some_value(rng: random.Random, document: Any) -> tuple[str, str]:
    """The text of the document with one thing done to one of its values."""
    document = json.loads(json.dumps(document))
    by_depth: dict[str, list[tuple[Any, ...]]] = {}
    for path in _places(document):
        by_depth.setdefault("/".join(map(str, path[:2])), []).append(path)
    path = rng.choice(by_depth[rng.choice(sorted(by_depth))])  # long lists must not get all of it
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    mark, key = "@mark@", path[-1]
    where = ".".join(map(str, path))[:60]
    kind = rng.choice(("value", "value", "value", "remove", "add", "near", "twice"))
    if kind == "remove":
        del owner[key]
        return f"{where} removed", json.dumps(document)
    raw = rng.choice(HOSTILE_JSON)
    if kind == "near" and isinstance(owner[key], (int, float)) and not isinstance(owner[key], bool):
        raw = json.dumps(owner[key] * rng.choice((2, -1, 0.5, 1.001)) + rng.choice((0, 1, -1)))
    if kind == "add" and isinstance(owner, dict):
        owner[rng.choice(HOSTILE_TEXT)] = mark
    elif kind == "twice" and isinstance(owner, dict) and isinstance(key, str):
        raw = f"{json.dumps(owner[key])}, {json.dumps(key)}: {raw}"
        owner[key] = mark
    else:
        owner[key] = mark
    return f"{where}: {kind} {raw[:60]}", json.dumps(document).replace(json.dumps(mark), raw, 1)
