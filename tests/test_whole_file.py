"""A file is there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from threadweaver.whole_file import whole_file, write_whole


def test_a_text_and_its_pieces_are_written_as_they_are_and_make_the_folder(tmp_path):
    path = tmp_path / "a" / "b.txt"
    for text in ("one\r\ntwo\u2028", ["one\r\n", "two\u2028"]):
        write_whole(path, text)
        assert path.read_bytes() == "one\r\ntwo\u2028".encode()
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def broken() -> Iterator[str]:
    yield "half"
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("text", "error"), [(broken, KeyboardInterrupt), (lambda: "\ud800", UnicodeEncodeError)]
)
def test_what_ends_half_way_leaves_the_file_as_it_was(tmp_path, text, error):
    path = tmp_path / "a.json"
    path.write_text("before")
    with pytest.raises(error):
        write_whole(path, text())
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and path.read_text() == "before"


def test_a_full_disk_leaves_the_file_as_it_was_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("before")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_whole(path, "after")
    assert error.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and path.read_text() == "before"


def test_an_error_without_a_number_keeps_its_words(tmp_path):
    with (
        pytest.raises(OSError, match="parquet says no") as error,
        whole_file(tmp_path / "a.parquet"),
    ):
        raise OSError("parquet says no")
    assert error.value.filename == str(tmp_path / "a.parquet")
