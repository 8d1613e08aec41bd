"""How a valid input is spoiled: its structure first, then its text, then its bytes.

Each function takes what a file holds and a `random.Random`, from which every choice comes, and gives what the file is
to hold instead. Most of what comes out is still close to what was valid, so that it gets past the first check.
"""

import copy
import gzip
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import yaml

Spoil = Callable[[bytes, Random], bytes]

DEEP = 3000
HUGE = 10**5
NUMBERS: list[Any] = [0, -1, 1, 2, 7, 2**31, 2**63, -(2**63), 2**64, 10**12, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e308]
NO_NUMBERS = [float("nan"), float("inf"), float("-inf")]
TEXTS = [
    *("", " ", "x", "nan", "1e999", "0", "None", "true", "\x00", "a\nb", "\x1b[31mred\x1b[0m", "[red]x[/]", "[/]"),
    *("../../etc/passwd", "/etc/passwd", "..", "C:\\x", "a/b", "\ud800", "🙂", "\u202egnp", "{0}", "%s", "$(id)"),
    *("'; rm -rf ~", "--help", "-x", "---", "| a | b |", "```", "<script>", "![x](http://x)", "__class__", "*", "."),
    *("a" * 300 + ".safetensors", "../x.safetensors", "x\0.safetensors", "x.safetensors/", "~nobody/x.txt"),
]
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F4",
    "C64",
    "float32",
    "float16",
    "int8",
    "meta",
]


def odd(choose: Random) -> Any:
    """A value that nobody expects."""
    kinds: list[Callable[[], Any]] = [
        lambda: choose.choice([None, True, False, [], {}, [None], {"": None}, [[]], [{}], [0] * 1000, {"a": {"b": 1}}]),
        lambda: choose.choice(NUMBERS),
        lambda: choose.choice(NO_NUMBERS),
        lambda: choose.choice(TEXTS),
        lambda: choose.choice(DTYPES),
        lambda: "a" * HUGE,
        lambda: nested(choose.choice([20, 200])),
    ]
    return choose.choice(kinds)()


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


Step = tuple[Any, Any]  # the container and its key


def steps(data: Any) -> list[Step]:
    """All places in nested data."""
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    found: list[Step] = []
    for key, value in inside:
        found += [(data, key), *steps(value)]
    return found


def spoiled_data(data: Any, choose: Random) -> Any:
    """A few values of nested data changed, moved, doubled or gone."""
    data = copy.deepcopy(data)
    for _ in range(choose.choice([1, 1, 1, 2, 4])):
        places = steps(data)
        if not places:
            return odd(choose)
        edit(*choose.choice(places), places, choose)
    return data


def edit(inside: Any, key: Any, places: list[Step], choose: Random) -> None:
    value = inside[key]
    other, other_key = choose.choice(places)
    how = choose.randrange(8)
    if how < 4:
        inside[key] = odd(choose)
    elif how == 4:
        inside[key] = copy.deepcopy(other[other_key])
    elif how == 5 and isinstance(value, int | float):
        inside[key] = choose.choice([-value, value + 1, value * 2, value // 3, str(value), value * 10**9])
    elif how == 6 and isinstance(inside, dict):
        inside[choose.choice(TEXTS)] = inside.pop(key)
    else:
        del inside[key]


def spoiled_text(text: str, choose: Random) -> str:
    """A stretch of text doubled, gone or put elsewhere, or something odd put in."""
    start = choose.randrange(len(text) + 1)
    stop = min(len(text), start + choose.choice([1, 2, 10, 100]))
    put = choose.choice(
        [*TEXTS, "{", "}", "[", "]", '"', ":", ",", "\\", "\n", "\t", "\r", "\u2028", "-", "#", "&", "*"]
    )
    how = choose.randrange(4)
    if how == 0:
        return text[:start] + put + text[start:]
    if how == 1:
        return text[:start] + text[stop:]
    if how == 2:
        return text[:stop] + text[start:]
    return text[:start] + put + text[stop:]


def spoiled_bytes(data: bytes, choose: Random) -> bytes:
    """Bytes flipped, cut, put in, doubled; the marks of other encodings."""
    spoiled = bytearray(data)
    place = choose.randrange(len(data) + 1)
    how = choose.randrange(8)
    if how == 0:
        return data[:place]
    if how == 1:
        return data[place:]
    if how == 2:
        return b"\xef\xbb\xbf" + data
    if how == 3:
        return data.decode(errors="replace").encode(choose.choice(["utf-16", "utf-32"]), errors="replace")
    if how == 4:
        return choose.choice([b"", b"\0", b"\xff\xfe", b"\x80", b"null", b"[" * HUGE, b'{"a":' * DEEP, b" " * HUGE])
    if how == 5:
        spoiled[place:place] = choose.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\0", b"\x1b[2J", b"\xf0\x9f"])
    else:
        for _ in range(choose.choice([1, 1, 3, 30])):
            if spoiled:
                spoiled[choose.randrange(len(spoiled))] ^= 1 << choose.randrange(8)
    return bytes(spoiled)


def spoiled_json(data: bytes, choose: Random) -> bytes:
    how = choose.randrange(10)
    if how == 0:
        return spoiled_bytes(data, choose)
    if how == 1:
        return encoded(spoiled_text(data.decode(), choose))
    changed = spoiled_data(json.loads(data), choose)
    text = dumped(changed, choose)
    return encoded(with_a_key_twice(text, choose) if how == 2 else text)


def dumped(data: Any, choose: Random) -> str:
    # A text that is a number longer than Python reads, without its quotes.
    return json.dumps(data, ensure_ascii=choose.random() < 0.5).replace('"1e999"', "9" * 5000)


def encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def with_a_key_twice(text: str, choose: Random) -> str:
    """The object's first key again, with another value."""
    found = text.partition(":")
    return f"{found[0]}: {json.dumps(odd(choose))}, {text[1:]}" if text.startswith("{") and found[1] else text


def spoiled_lines(data: bytes, choose: Random) -> bytes:
    """JSON lines: one of them spoiled, or their order."""
    lines = data.splitlines() or [b"{}"]
    place = choose.randrange(len(lines))
    how = choose.randrange(6)
    if how == 0:
        return spoiled_bytes(data, choose)
    if how == 1:
        lines.insert(place, choose.choice(lines))
    elif how == 2:
        del lines[place]
    else:
        lines[place] = spoiled_json(lines[place], choose)
    return b"\n".join(lines) + b"\n"


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]) + "\n"
IN_YAML = [
    *("!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!python/module:os", "!unknown x"),
    *("&x [*x]", "*nowhere", "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "2026-02-30", "2026-01-01 25:00:00"),
    *(
        "0o99",
        "0x_",
        "1_000",
        "1e999",
        "-.inf",
        ".nan",
        "190:20:30",
        "~",
        "yes",
        "<<",
        "? {a: b}",
        "{[]: 1}",
        "!!int x",
    ),
    *("!!float '[red]'", "!!timestamp x", "\t", "|\n  text", ">-\n  text", "- - - -", "%TAG ! x", "...", "---\na: 1"),
    *("9" * 5000, "!!int " + "1:" * 3000 + "1", "!!map [a]", "!!seq {a: 1}", "!!null {}", "!!bool 3", "!!merge {a: 1}"),
]


def spoiled_yaml(data: bytes, choose: Random) -> bytes:
    """Values of every kind that YAML has, references without end, keys twice, merges."""
    how = choose.randrange(10)
    text = data.decode()
    lines = text.splitlines()
    place = choose.randrange(len(lines) + 1)
    if how == 0:
        return spoiled_bytes(data, choose)
    if how == 1:
        return encoded(spoiled_text(text, choose))
    if how == 2:
        return encoded(choose.choice([BOMB + text, "[" * DEEP, "- " * DEEP, "{a: " * DEEP, "&a " * 50 + "x"]))
    if how == 3 and place < len(lines):
        return encoded("\n".join([*lines[:place], lines[place], *lines[place:]]))
    if how in (4, 5, 6) and place < len(lines):
        key, colon, _ = lines[place].partition(":")
        lines[place] = f"{key}{colon} {choose.choice(IN_YAML)}"
        return encoded("\n".join(lines))
    if how == 7:
        return encoded(f"base: &base {{method: x, seed: 3}}\n<<: *base\n{text}")
    spoiled = spoiled_data(yaml.safe_load(text), choose)
    try:
        return encoded(yaml.safe_dump(spoiled, sort_keys=False, allow_unicode=True))
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        return encoded(dumped(spoiled, choose))


def spoiled_safetensors(data: bytes, choose: Random) -> bytes:
    """The header's length, its entries, its text, or the data behind it."""
    (length,) = struct.unpack("<Q", data[:8])
    how = choose.randrange(10)
    if how == 0:
        return spoiled_bytes(data, choose)
    if how == 1:
        said = choose.choice([0, 1, length - 1, length + 1, len(data), 10**8, 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", said) + data[8:]
    header = json.loads(data[8 : 8 + length])
    if how == 2:
        text = spoiled_json(data[8 : 8 + length], choose)
    elif how == 3:
        text = dumped(spoiled_data(header, choose), choose).encode(errors="surrogatepass")
    else:
        spoil_entry(header, choose)
        text = dumped(header, choose).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def spoil_entry(header: dict[str, Any], choose: Random) -> None:
    """A tensor of another type, shape, place or name."""
    name = choose.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    begin, end = entry["data_offsets"]
    how = choose.randrange(8)
    if how == 0:
        entry["dtype"] = choose.choice(DTYPES)
    elif how == 1:
        entry["data_offsets"] = choose.choice([[end, begin], [begin, end + 8], [-8, end], [0, 2**63], [begin], [0, 0]])
    elif how == 2:
        entry["shape"] = choose.choice(
            [[2**62, 4], [-1], [0], [], [*entry["shape"], 1], entry["shape"][::-1], [1] * 80]
        )
    elif how == 3:
        header[choose.choice(TEXTS)] = header.pop(name)
    elif how == 4:
        other = choose.choice([name for name in header if name != "__metadata__"])
        header[other]["data_offsets"] = [begin, end]
    elif how == 5:
        header["__metadata__"] = odd(choose)
    else:
        entry[choose.choice(list(entry))] = odd(choose)


def spoiled_gguf(data: bytes, choose: Random) -> bytes:
    """Numbers of the header, which are four or eight bytes anywhere in it; names; bytes."""
    if choose.randrange(3) == 0:
        return spoiled_bytes(data, choose)
    spoiled = bytearray(data)
    for _ in range(choose.choice([1, 1, 2])):
        place = choose.choice([choose.randrange(24), choose.randrange(2000), choose.randrange(len(data) - 8)])
        size, code = choose.choice([(4, "<I"), (8, "<Q")])
        number = choose.choice([0, 1, 2, 8, 9, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1])
        spoiled[place : place + size] = struct.pack(code, number & (2 ** (8 * size) - 1))
    return bytes(spoiled)


def spoiled_prose(data: bytes, choose: Random) -> bytes:
    return spoiled_bytes(data, choose) if choose.randrange(2) else encoded(spoiled_text(data.decode(), choose))


def spoiled_card(data: bytes, choose: Random) -> bytes:
    """Front matter in YAML, and prose behind it."""
    _, matter, prose = data.split(b"---\n", 2)
    if choose.randrange(4) == 0:
        return spoiled_prose(data, choose)
    return b"---\n" + spoiled_yaml(matter, choose) + b"\n---\n" + prose


def zipped(spoil: Spoil) -> Spoil:
    """For a gzip file: what is in it is spoiled, or the file."""

    def spoil_inside(data: bytes, choose: Random) -> bytes:
        if choose.randrange(4) == 0:
            return spoiled_bytes(data, choose)
        return gzip.compress(spoil(gzip.decompress(data), choose), mtime=0)

    return spoil_inside
