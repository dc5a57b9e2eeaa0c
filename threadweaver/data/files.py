"""Files of rows: JSON lines (`.jsonl`, or `.json` with one object a line) and parquet.

A file is written whole or not at all. No row is ever dropped: one that cannot be read stops the
read with a `DataError` that names file and row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """Data that cannot be used; the message says where, what is wrong and what to do."""


def save_rows(rows: Sequence[dict], path: str | Path) -> None:
    """Writes rows to `path`, as JSON lines (`.jsonl`) or parquet (`.parquet`, by `datasets`).

    The folder is made if need be. Both kinds are read by `read_rows` and `datasets.load_dataset`.

    Raises:
        DataError: the extension is another one, or `datasets` is not installed.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: cannot write '{path.suffix}'; name it .jsonl or .parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".jsonl":
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            try:
                from datasets import Dataset
            except ImportError as error:
                raise DataError(
                    f"{path}: writing parquet needs the package 'datasets'; "
                    f"install it or write .jsonl"
                ) from error
            # Of all rows: by itself it takes the columns of the first.
            columns = dict.fromkeys(name for row in rows for name in row)
            table = {name: [row.get(name) for row in rows] for name in columns}
            Dataset.from_dict(table).to_parquet(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a file, in order, and its source: "file:line", or "file, row n" for parquet, both
    counted from 1.

    Raises:
        DataError: a file that is missing, empty, unreadable or of unknown kind, or a line that is
            no JSON object.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name one .jsonl or .parquet file in it")
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path")
    if path.suffix in (".jsonl", ".json"):
        rows = _json_rows(path)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        raise DataError(
            f"{path}: unknown extension '{path.suffix}'; use .jsonl (or .json, one object a line) "
            f"or .parquet"
        )
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{path}: holds no rows; write at least one")


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Bytes, so that only a newline ends a line: text may hold other separators (U+2028, form feed).
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            source = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{source}: not UTF-8 (byte {error.start + 1} of the line); re-encode the file"
                ) from error
            except json.JSONDecodeError as error:
                if not line.strip():
                    raise DataError(f"{source}: empty line; remove it") from error
                raise DataError(
                    f"{source}: not JSON ({error.msg}, column {error.colno}); "
                    f"write one JSON object a line"
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{source}: found {kind_of(row)} where a row should be; "
                    f"write one JSON object a line"
                )
            yield source, row


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
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable parquet file ({reason}); rewrite it") from error


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages: "an object", "a number (3)"."""
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a boolean"}
    return names.get(type(value), f"a number ({value})")
