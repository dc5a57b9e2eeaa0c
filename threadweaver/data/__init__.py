"""Training data on disk: files of rows, their columns, chat templates."""

from threadweaver.data.columns import Example, load_examples, read_examples, trajectory_row
from threadweaver.data.files import DataError, read_rows, save_rows

__all__ = [
    "DataError",
    "Example",
    "load_examples",
    "read_examples",
    "read_rows",
    "save_rows",
    "trajectory_row",
]
