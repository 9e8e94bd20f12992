"""Arguments, results, texts, ids and names that a database or a protocol may refuse."""

import datetime as dt
import decimal
import math
import uuid

NUL = "a\x00b"


def nested(levels):
    """Return lists in lists."""
    value = "inside"
    for _ in range(levels):
        value = [value]
    return value


#: Values that can be an argument and a result, by name.
VALUES = {
    "nul": NUL,
    "only nul": "\x00",
    "nul in list": [1, [NUL]],
    "nul in dict": {"x": {"y": NUL}},
    "nul in key": {"k\x00y": 1},
    "nul in nested key": [{"x": {"\x00": [NUL]}}],
    "nul and its like": {"a\x00": 1, "a\ufffd": 2},
    "written nul": "a\\u0000b \\\\u0000 \\\x00",
    "many nuls": "\x00" * 5000,
    "lone surrogate": "a\ud800b",
    "surrogate and nul": "\udfff\x00",
    "surrogate in key": {"\ud800": 1},
    "2**70": 2**70,
    "-2**70": -(2**70),
    "2**2000": 2**2000,
    "nan": math.nan,
    "infinity": [math.inf, -math.inf],
    "1e308": 1e308,
    "5e-324": 5e-324,
    "negative zero": -0.0,
    "200 levels": nested(200),
    "bytes": b"\x00\xff",
    "year 1": dt.datetime(1, 1, 1, tzinfo=dt.UTC),
    "year 9999": dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC),
    "date": dt.date(2024, 2, 29),
    "decimal": decimal.Decimal("1e400"),
    "uuid": uuid.UUID(int=0),
    "300 KB": "x" * 300_000,
    "300 KB of emoji": "\U0001f600" * 75_000,
    "control characters": "".join(map(chr, range(1, 32))) + "\x7f\x85",
    "unicode": "naïve 中文 \U0001f469‍\U0001f680 \u202eabc\u2028\ufeff\uffff",
    "spaces": "  a \t b  ",
    "slashes": "a/b\\c//d",
    "quotes": "\"'`$$;--",
    "empty": ["", [], {}, {"": ""}],
    "long key": {"k" * 5000: 1},
    "many keys": {str(number): number for number in range(2000)},
    "percent": "%s %(x)s {0}",
}

#: Texts of exceptions, by name.
TEXTS = {
    name: VALUES[name]
    for name in (
        "nul",
        "only nul",
        "many nuls",
        "written nul",
        "lone surrogate",
        "surrogate and nul",
        "300 KB",
        "control characters",
        "unicode",
    )
}

#: Task ids, by name. Each is also the start of the task's parent's and root's id.
IDS = {
    "193 characters": "i" * 193,
    "194 characters": "i" * 194,
    "200 characters": "i" * 200,
    "201 characters": "i" * 201,
    "250 characters": "i" * 250,
    "another of 250": "i" * 249 + "j",
    "1,000 emoji": "\U0001f600" * 1000,
    "nul": "id\x00nul",
    "long with nul": "\x00" * 300,
    "spaces": " an id ",
    "slashes": "a/b/../c?d#e%2f",
    "unicode": "naïve-中文",
}

#: Names of tasks, by name.
NAMES = {
    "500 characters": "n" * 500,
    "501 characters": "m" * 501,
    "nul": "odd.na\x00me",
    "unicode": "odd.naïve \U0001f600",
}

#: Names of queues, by name.
QUEUES = {
    "200 characters": "p" * 200,
    "300 characters": "q" * 300,
    "nul": "odd\x00queue",
}

#: Name of a worker that does not fit the brain's column.
WORKER = "w" * 200 + "@e2e"
