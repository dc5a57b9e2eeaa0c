"""Training data on disk: files of rows, and their columns."""

from threadweaver.data.columns import (
    Example,
    columns_note,
    example_of,
    load_examples,
    read_examples,
    trajectory_row,
)
from threadweaver.data.files import DataError, is_data_path, read_rows, save_rows

__all__ = [
    "DataError",
    "Example",
    "columns_note",
    "example_of",
    "is_data_path",
    "load_examples",
    "read_examples",
    "read_rows",
    "save_rows",
    "trajectory_row",
]
