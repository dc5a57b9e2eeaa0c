"""Prompts in files: built in, or one's own."""

from __future__ import annotations

import pytest

from threadweaver.annotate.prompts import BUILT_IN, PLACES, Prompts


def test_every_built_in_prompt_has_its_places_and_no_file_is_left_over():
    assert {path.stem for path in BUILT_IN.iterdir()} == PLACES.keys()
    prompts = Prompts()
    for name, places in PLACES.items():
        text = prompts.fill(name, **{place: f"<{place}>" for place in places})
        assert all(f"<{place}>" in text for place in places) and "{{" not in text


def test_what_is_filled_in_is_taken_as_it_stands():
    assert "{{breach}} \\1 {x}" in Prompts().fill("again", breach="{{breach}} \\1 {x}")


def test_an_own_file_stands_in_for_the_built_in_one(tmp_path):
    (tmp_path / "again.md").write_text("No: {{ breach }}\n")
    own = Prompts(tmp_path)
    assert own.fill("again", breach="x") == "No: x" and own.digest != Prompts().digest
    places = dict.fromkeys(PLACES["map"], "x")
    assert own.fill("map", **places) == Prompts().fill("map", **places)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("again.md", b"No.", "again.md: the place {{breach}} is missing"),
        ("again.md", b"{{breach}} {{brech}}", "again.md: unknown place {{brech}}; it has"),
        ("again.md", b"\xff", "again.md: cannot be read: it is not UTF-8"),
        ("maps.md", b"x", "maps.md: no such prompt; there are map.md"),
        ("map.txt", b"x", "holds none of map.md"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        Prompts(tmp_path)
    assert says in str(caught.value)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        Prompts(tmp_path / "no")
