"""Data files, each damaged in one way: what readers of trajectories and of problems must make of
it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import pyarrow
import pyarrow.parquet

from threadweaver.trajectory import check_format
from threadweaver.trajectory.tags import TAGS

Must = Literal["refuse", "accept"] | None
Row = dict[str, Any]


class Damaged(NamedTuple):
    """A data file.

    Attributes:
        name: of the damage.
        path: of the file, folder or pattern.
        trajectories, problems: what a reader of these must do with it.
        rows: how many it then holds.
        malformed: how many of them break the format.
    """

    name: str
    path: str
    trajectories: Must
    problems: Must
    rows: int
    malformed: int = 0


def damaged(rng: Random, rows: list[Row], folder: Path) -> Damaged:
    """Made in a new folder."""
    folder.mkdir()
    kinds = [(_field, 6), (_format, 3), (_line, 3), (_file, 2), (_parquet, 3)]
    kind = rng.choices([k for k, _ in kinds], [w for _, w in kinds])[0]
    return kind(rng, copy.deepcopy(rows), folder)


# One field of one row.

HALF = "\ud800"
NO_TEXT: list[Any] = [3, 1.5, True, {}, {"a": "b"}, [1], [[]], "", " \n\t", f"x{HALF}y", HALF]
TURN = {"role": "user", "content": "1*1=?"}
NO_PROMPT: list[Any] = [
    *(v for v in NO_TEXT),
    *([], [TURN, 3], [{"role": "user"}], [{"content": "x"}], [{"role": 3, "content": "x"}]),
    *([{"role": "user", "content": None}], [{"role": "user", "content": f"{HALF}"}]),
    *([TURN, {"role": "assistant", "content": "1"}], [{"role": "user", "content": ["x"]}]),
]
NO_ANSWER: list[Any] = [
    *(True, {}, {"a": 1}, [], [[]], [{}], [True], [None], HALF, [HALF], float("nan")),
    *(float("inf"), [float("-inf")], ["1", float("nan")]),
]
NO_MODEL: list[Any] = [3, "1", [], [1], True, {}, {"ground_truth": None}, {"style": "rule"}]
# Tasks of the fuzz compare whole numbers.
WHOLE: list[Any] = ["1", 1, 10**4000, ["1", "2"], [1, 1], 7.0]
ANSWERS: list[Any] = [*WHOLE, -2.5, ["1", "é☃"], "é☃", "\\frac{1}{2}", "x" * 20_000]
# Of a problem these count as no response.
NO_RESPONSE = ["", " \n\t", "\\boxed{1}<|im_start|>user"]


def _field(rng: Random, rows: list[Row], folder: Path) -> Damaged:
    at = rng.randrange(len(rows))
    row = rows[at]
    must: Must = "refuse"
    problems: Must = "refuse"
    match rng.randrange(8):
        case 0:
            name, value = "question", rng.choice(NO_PROMPT)
        case 1:
            name, value = "response", rng.choice([*NO_TEXT, "other", NO_RESPONSE[-1]])
            if value == NO_RESPONSE[-1]:
                row["qwen_text"] = row["question"] + value
            problems = "accept" if value in NO_RESPONSE else "refuse"
        case 2:
            name, value = "qwen_text", rng.choice([*NO_TEXT, "other", row["response"]])
        case 3:
            name, value = "reward_model", rng.choice(NO_MODEL)
        case 4:
            name, value = "ground_truth", rng.choice(NO_ANSWER)
            del row["reward_model"]
        case 5:
            name, value = "reward_model", {"ground_truth": rng.choice(ANSWERS)}
            must = "accept"
            problems = "accept" if value["ground_truth"] in WHOLE else "refuse"
        case 6:
            name = rng.choice(["extra", "id", "", "é", "data_source", "a b", "path"])
            value = rng.choice([None, 3, [], {}, True, "x", [[[1]]], {"a": {"b": None}}])
            must = problems = "accept"
        case _:
            name, value = rng.choice(["question", "response", "qwen_text", "reward_model"]), None
            must = problems = None
    row[name] = value
    path = folder / rng.choice(["rows.jsonl", "rows.json", "a b.jsonl", "[x].jsonl", "ü☃.jsonl"])
    path.write_bytes(_lines(rows))
    return Damaged(
        f"row {at + 1}, {name!r} {str(value)[:60]!a}", str(path), must, problems, len(rows)
    )


def _lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# A response that breaks the format.


def _format(rng: Random, rows: list[Row], folder: Path) -> Damaged:
    parallel = [i for i, row in enumerate(rows) if "<Parallel>" in row["response"]]
    row = rows[rng.choice(parallel)]
    text = row["response"]
    tags = [tag for tag in TAGS if tag in text]
    one, other = rng.choice(tags), rng.choice(TAGS)
    where = rng.choice([i for i in range(len(text)) if text.startswith(one, i)])
    match rng.randrange(6):
        case 0:
            text = text[:where] + text[where + len(one) :]
        case 1:
            text = text[:where] + other + text[where:]
        case 2:
            text = text[:where] + other + text[where + len(one) :]
        case 3:
            text = text[:where]
        case 4:
            text = text.replace("1:", rng.choice(["", "2:", "1 :", "01:", "é:", "-1:"]), 1)
        case _:
            lines = text.splitlines(keepends=True)
            i, j = rng.sample(range(len(lines)), 2)
            lines[i], lines[j] = lines[j], lines[i]
            text = "".join(lines)
    row["response"], row["qwen_text"] = text, row["question"] + text
    if not text.strip():
        must: Must = "refuse"
        malformed = 0
    else:
        malformed = int(bool(check_format(text)))
        must = "refuse" if malformed else None
    path = folder / "rows.jsonl"
    path.write_bytes(_lines(rows))
    problems = "refuse" if not text.strip() else None
    return Damaged(f"format: {text!a}"[:200], str(path), must, problems, len(rows), malformed)


# One line of the file, or its bytes.


def _line(rng: Random, rows: list[Row], folder: Path) -> Damaged:
    lines = _lines(rows).splitlines()
    at = rng.randrange(len(lines))
    line = lines[at]
    bad: dict[str, bytes] = {
        "cut": line[: rng.randrange(1, len(line))],
        "comma": line + b",",
        "quotes": line.replace(b'"', b"'"),
        "empty": b"",
        "list": b"[" + line + b"]",
        "string": json.dumps(line.decode()).encode(),
        "number": rng.choice([b"3", b"NaN", b"-Infinity", b"null", b"true", b"1" * 5000]),
        "two": line + line,
        "utf-8": line[:-2] + b'\xff"}',
        "mark": b"\xef\xbb\xbf" + line if at else b"\xef\xbb\xbf\xef\xbb\xbf" + line,
        "nul": line[:-1] + b"\0}",
        "control": line[:-1] + b', "x": "\x01"}',
        "twice": line[:-1] + b', "question": "again"}',
        "twice inside": line[:-1] + b', "x": {"a": 1, "a": 2}}',
        "deep": line[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "digits": line[:-1] + b', "x": ' + b"9" * 5000 + b"}",
        "unclosed deep": b'{"a":' * 100_000,
        "comment": b"// " + line,
        "random": rng.randbytes(rng.randrange(1, 200)).replace(b"\n", b"") or b"\xff",
    }
    good: dict[str, Callable[[], bytes]] = {
        "crlf": lambda: b"\r\n".join([*lines, b""]),
        "first mark": lambda: b"\xef\xbb\xbf" + b"\n".join([*lines, b""]),
        "no last end": lambda: b"\n".join(lines),
        "spaces": lambda: b"\n".join(b"  " + line + b" \t" for line in lines),
        "duplicates": lambda: b"\n".join([*lines[1:], lines[1]]),
        "separators": lambda: b"\n".join(
            [*lines[:-1], lines[-1][:-1] + ', "x": "\u2028\x85"}'.encode()]
        ),
    }
    path = folder / "rows.jsonl"
    if rng.random() < 0.25:
        name = rng.choice([*good])
        path.write_bytes(good[name]())
        return Damaged(name, str(path), "accept", "accept", len(rows))
    name = rng.choice([*bad])
    lines[at] = bad[name]
    path.write_bytes(b"\n".join([*lines, b""]))
    return Damaged(f"line {at + 1}: {name}", str(path), "refuse", "refuse", 0)


# The file as a whole.


def _file(rng: Random, rows: list[Row], folder: Path) -> Damaged:
    path, text = folder / "rows.jsonl", _lines(rows)
    must: Must = "refuse"
    name = rng.choice(
        [
            *("empty", "missing", "fifo", "device", "loop", "broken link", "suffix", "csv"),
            *("folder", "empty folder", "folder of one bad", "pattern", "no match", "utf-16"),
            *("array", "gzip", "newline", "indented", "folder named as a file", "long name", "nul"),
            *("link", "only ends"),
        ]
    )
    count = len(rows)
    if name == "empty":
        path.write_bytes(b"")
    elif name == "only ends":
        path.write_bytes(b"\n\n\n")
    elif name == "fifo":
        os.mkfifo(path)
    elif name == "device":
        path.symlink_to(rng.choice(["/dev/null", "/dev/zero", "/proc/self/environ"]))
    elif name == "loop":
        path.symlink_to(path)
    elif name == "broken link":
        path.symlink_to(folder / "nowhere")
    elif name == "suffix":
        path = folder / rng.choice(
            ["rows", "rows.txt", "rows.jsonl.gz", "rows.JSONL", "rows.arrow"]
        )
        path.write_bytes(text)
    elif name == "csv":
        path = folder / rng.choice(["rows.csv", "rows.jsonl"])
        path.write_text("question,response\n1*1=?,1\n")
    elif name == "folder":
        for half in ("a.jsonl", "b.json"):
            (folder / half).write_bytes(text)
        (folder / ".hidden.jsonl").write_bytes(b"bad")
        (folder / "README.md").write_bytes(b"bad")
        path, must, count = folder, "accept", 2 * count
    elif name == "empty folder":
        path = folder / "inside"
        path.mkdir()
    elif name == "folder of one bad":
        (folder / "a.jsonl").write_bytes(text)
        (folder / "b.jsonl").write_bytes(b"{}\n")
        path = folder
    elif name == "folder named as a file":
        path.mkdir()
        (path / "a.jsonl").write_bytes(text)
        must = "accept"
    elif name == "pattern":
        (folder / "a1.jsonl").write_bytes(text)
        (folder / "b.jsonl").write_bytes(b"{}\n")
        path, must = folder / rng.choice(["a*.jsonl", "a[0-9].jsonl", "?1.json*"]), "accept"
    elif name == "no match":
        path = folder / rng.choice(["*.jsonl", "[", "**", "a[.jsonl", "?"])
    elif name == "utf-16":
        path.write_bytes(text.decode().encode(rng.choice(["utf-16", "utf-32", "utf-16-le"])))
    elif name == "array":
        path = folder / "rows.json"
        path.write_text(json.dumps(rows))
        must = "accept"
    elif name == "indented":
        path = folder / "rows.json"
        path.write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    elif name == "gzip":
        path.write_bytes(b"\x1f\x8b\x08" + text)
    elif name == "newline":
        path = folder / "a\nb\t.jsonl"
        path.write_bytes(text)
        must = "accept"
    elif name == "link":
        (folder / "there.jsonl").write_bytes(text)
        path.symlink_to(folder / "there.jsonl")
        must = "accept"
    elif name == "long name":
        path = folder / ("a" * 300 + ".jsonl")
    elif name == "nul":
        path = folder / "a\0b.jsonl"
    return Damaged(f"file: {name}", str(path), must, must, count)


# Parquet.


def _parquet(rng: Random, rows: list[Row], folder: Path) -> Damaged:
    path = folder / "rows.parquet"
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    must: Must = "refuse"
    count = len(rows)
    name = rng.choice(
        [
            *("good", "cut", "random", "empty", "header", "json", "as json", "flipped", "no rows"),
            *("not utf-8", "null column", "missing column", "numbers", "timestamps", "dictionary"),
            *("lists", "structs", "nested answer", "binary", "decimal", "large", "nulls", "groups"),
        ]
    )
    text = columns["question"]
    arrays: dict[str, Any] = {n: pyarrow.array(column) for n, column in columns.items()}
    if name in ("good", "groups"):
        must = "accept"
    elif name == "not utf-8":
        raw = [value.encode() for value in text]
        raw[rng.randrange(count)] = b"1\xff*2"
        offsets = pyarrow.array(raw, pyarrow.binary())
        arrays["question"] = pyarrow.Array.from_buffers(pyarrow.string(), count, offsets.buffers())
    elif name == "null column":
        arrays["question"] = pyarrow.nulls(count)
        must = None
    elif name == "nulls":
        text[rng.randrange(count)] = None
        arrays["question"] = pyarrow.array(text)
        must = None
    elif name == "missing column":
        del arrays[rng.choice(["qwen_text", "reward_model"])]
        must = None
    elif name == "numbers":
        arrays["question"] = pyarrow.array(range(count))
    elif name == "timestamps":
        arrays["when"] = pyarrow.array([2**62] * count, pyarrow.timestamp("us"))
        must = None
    elif name == "dictionary":
        arrays["question"] = arrays["question"].dictionary_encode()
        must = "accept"
    elif name == "lists":
        arrays["question"] = pyarrow.array([[t] for t in text])
    elif name == "structs":
        turns = [[{"role": "user", "content": t}] for t in text]
        arrays["prompt"] = pyarrow.array(turns)
        del arrays["question"], arrays["qwen_text"]
        must = "accept"
    elif name == "nested answer":
        arrays["reward_model"] = pyarrow.array([{"ground_truth": [["1"]]}] * count)
    elif name == "binary":
        arrays["question"] = pyarrow.array([t.encode() for t in text], pyarrow.binary())
    elif name == "decimal":
        del arrays["reward_model"]
        from decimal import Decimal

        arrays["ground_truth"] = pyarrow.array([Decimal("1.50")] * count)
        must = "accept"
    elif name == "large":
        arrays["id"] = pyarrow.array([2**63 + 5] * count, pyarrow.uint64())
        must = "accept"
    table = pyarrow.table(arrays)
    if name == "no rows":
        table = table.slice(0, 0)
    pyarrow.parquet.write_table(table, path, row_group_size=2 if name == "groups" else None)
    whole = path.read_bytes()
    if name == "cut":
        path.write_bytes(whole[: rng.randrange(len(whole))])
    elif name == "random":
        path.write_bytes(rng.randbytes(1000))
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "header":
        path.write_bytes(b"PAR1" + b"\xff" * 60 + b"PAR1")
    elif name == "json":
        path.write_bytes(_lines(rows))
    elif name == "as json":
        path = folder / "rows.jsonl"
        path.write_bytes(whole)
    elif name == "flipped":
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        must = None
    problems = "refuse" if name == "decimal" else must  # 1.50 is no whole number
    return Damaged(f"parquet: {name}", str(path), must, problems, count)
