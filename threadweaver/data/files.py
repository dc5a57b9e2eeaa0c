"""Files of rows: JSON lines (`.jsonl`), JSON (`.json`: an array of objects, or one object a line)
and parquet; folders and patterns of them.

A file is written whole or not at all. No row is ever dropped: one that cannot be read stops the
read with a `DataError` that names file and row.
"""

from __future__ import annotations

import codecs
import glob
import json
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from threadweaver.whole_file import whole_file, write_whole


class DataError(ValueError):
    """Data that cannot be used; the message says where, what is wrong and what to do."""


def save_rows(rows: Sequence[dict], path: str | Path) -> None:
    """Writes rows to `path`, as JSON lines (`.jsonl`) or parquet (`.parquet`, by `datasets`).

    The folder is made if need be. Both kinds are read by `read_rows` and `datasets.load_dataset`.
    A column of parquet has one type: there the right answers of all rows are lists if any row has
    several.

    Raises:
        DataError: the extension is another one, `datasets` is not installed, or parquet cannot
            hold the rows, as when a column has values of several types.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: cannot write '{path.suffix}'; name it .jsonl or .parquet")
    if path.suffix == ".jsonl":
        write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    try:
        import pyarrow
        from datasets import Dataset
    except ImportError as error:
        raise DataError(
            f"{path}: writing parquet needs the package 'datasets'; install it or write .jsonl"
        ) from error
    # Of all rows: by itself it takes the columns of the first.
    columns = dict.fromkeys(name for row in rows for name in row)
    table = {name: [row.get(name) for row in rows] for name in columns}
    if "reward_model" in table:
        table["reward_model"] = _alike(table["reward_model"])
    with whole_file(path) as partial:
        try:
            Dataset.from_dict(table).to_parquet(partial)
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{path}: parquet cannot hold these rows ({reason}); write .jsonl"
            ) from error


def _alike(column: list[Any]) -> list[Any]:
    """Values of `reward_model` whose right answers are all lists, if any is one."""

    def truth(value: Any) -> Any:
        return value.get("ground_truth") if isinstance(value, dict) else None

    if not any(isinstance(truth(value), list | tuple) for value in column):
        return column
    return [
        {**value, "ground_truth": [truth(value)]} if isinstance(truth(value), str) else value
        for value in column
    ]


# A row is a line: one of more bytes is no row.
MOST_BYTES = 2**28
KINDS = (".jsonl", ".json", ".parquet")
_LINES, _ARRAY = "one JSON object a line", "an array of JSON objects"


def data_files(path: str | Path) -> list[Path]:
    """The files that a path names, in the order of their names: itself, those in a folder, or those
    that match a pattern such as `data/train-*.parquet` (`**` for folders in between).

    Raises:
        DataError: there is none, or one that is no regular file or of another kind.
    """
    name = str(path)
    try:
        if Path(path).is_dir():
            found = [p for p in Path(path).iterdir() if p.suffix in KINDS and p.name[0] != "."]
            if not found:
                raise DataError(f"{name}: the folder holds no .jsonl, .json or .parquet file")
        elif Path(path).exists():
            found = [Path(path)]
        else:
            # Of any root, which Path.glob is not.
            found = [Path(match) for match in glob.glob(name, recursive=True)]  # noqa: PTH207
            if not found:
                raise DataError(f"{name}: no such file; check the path")
        found.sort()
        for file in found:
            _check_file(file)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name[:200]!r}: cannot be read: {reason}; check the path") from error
    return found


def is_data_path(name: str) -> bool:
    """Whether a name is that of a data file, a pattern of them, or a folder (with a slash)."""
    if Path(name).suffix in KINDS or glob.has_magic(name):
        return True
    return "/" in name and Path(name).is_dir()


def _check_file(path: Path) -> None:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise DataError(f"{path}: is a folder; name files, or one folder alone")
    if path.suffix not in KINDS:
        raise DataError(
            f"{path}: unknown extension '{path.suffix}'; use .jsonl, .json (an array of objects, "
            f"or one object a line) or .parquet"
        )
    if not stat.S_ISREG(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket or device"
        raise DataError(f"{path}: is {kind}, and data is read more than once: write it to a file")


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of the files that a path names (`data_files`), in order, and its source:
    "file:line", or "file, row n" for parquet and arrays, both counted from 1.

    Raises:
        DataError: as `data_files`; a file that is empty or cannot be read, or a line that is no
            JSON object.
    """
    for file in data_files(path):
        empty = True
        for row in _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file):
            empty = False
            yield row
        if empty:
            raise DataError(f"{file}: holds no rows; write at least one")


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        # Bytes, so that only a newline ends a line: text may hold other separators (U+2028, form
        # feed).
        with path.open("rb") as file:
            if path.suffix == ".json" and _begins_array(file):
                yield from _array_rows(path, file)
                return
            number = 0
            while line := file.readline(MOST_BYTES + 1):
                number += 1
                yield f"{path}:{number}", _json_row(line, f"{path}:{number}", first=number == 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _begins_array(file: BinaryIO) -> bool:
    """Whether `[` comes first in a file, which is at its start and stays there."""
    start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return start.startswith(b"[")


def _array_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = _parsed(file.read().removeprefix(codecs.BOM_UTF8), str(path), is_line=False)
    for number, row in enumerate(rows, 1):
        source = f"{path}, row {number}"
        yield source, _object_row(row, source, _ARRAY)


def _json_row(line: bytes, source: str, first: bool) -> dict[str, Any]:
    if len(line) > MOST_BYTES:
        raise DataError(f"{source}: the line has more than {MOST_BYTES:,} bytes; write {_LINES}")
    if first:
        line = line.removeprefix(codecs.BOM_UTF8)  # some editors mark UTF-8 at the start of a file
    if not line.strip():
        raise DataError(f"{source}: empty line; remove it")
    return _object_row(_parsed(line, source, is_line=True), source, _LINES)


def _parsed(data: bytes, source: str, is_line: bool) -> Any:
    """The JSON value of a line or of a whole file."""
    form = _LINES if is_line else _ARRAY
    try:
        return json.loads(data.decode(), object_pairs_hook=_object)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: not UTF-8 (byte {error.start + 1}); re-encode the file"
        ) from error
    except json.JSONDecodeError as error:
        where = source if is_line else f"{source}:{error.lineno}"
        raise DataError(
            f"{where}: not JSON ({error.msg}, column {error.colno}); write {form}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{source}: a whole number has more than {sys.get_int_max_str_digits():,} digits; "
            "write it as text"
        ) from error
    except RecursionError as error:
        raise DataError(f"{source}: nested too deeply; write {form}") from error


def _object_row(row: Any, source: str, form: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{source}: found {kind_of(row)} where a row should be; write {form}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise DataError(f"field {twice[:80]!r} is there twice; keep one")
    return found


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading parquet needs the package 'pyarrow' (it comes with 'datasets'); "
            f"install it or convert the file to .jsonl"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                try:
                    rows = batch.to_pylist()
                except (ValueError, OverflowError):
                    rows = None  # one by one, to say which
                for i in range(len(batch)):
                    number += 1
                    source = f"{path}, row {number}"
                    yield source, rows[i] if rows else _parquet_row(batch.slice(i, 1), source)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable parquet file ({reason}); rewrite it") from error


def _parquet_row(batch: Any, source: str) -> dict[str, Any]:
    try:
        (row,) = batch.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: a text is not UTF-8; re-encode the file") from error
    except (ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{source}: a value cannot be read ({reason}); correct it") from error
    return row


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages: "an object", "a number (3)"."""
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a boolean"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = str(value)
        return f"a number ({text if len(text) <= 40 else text[:37] + '...'})"
    return names.get(type(value), f"a value of type {type(value).__name__}")
