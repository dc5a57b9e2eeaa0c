"""The page of trajectories: what it says of each row, and what a person can do with it."""

from __future__ import annotations

import random

import pytest

from tests.trajectory.trajectories import CODEC, EXAMPLE
from tests.view.browser import Opened, data_of
from tests.view.test_lanes import text_and_marks
from threadweaver.data import DataError
from threadweaver.trajectory import check_format
from threadweaver.view.rows import Row
from threadweaver.view.trajectory import CHUNK, trajectory_page
from threadweaver.whole_file import write_whole

BROKEN = "<think>\U0001f40c\nab</Thread>c</think>\\boxed{2}"


def row(response: str, **given) -> Row:
    known = {"answer": "2", "correct": None, "violations": None, "tokens": None, "mode": None}
    return Row("1+1?", response, **{**known, "source": "f.jsonl:1", **given})


def threads(*texts: str) -> str:
    outlines = "".join(f"<Outline>{n}: a</Outline>\n" for n in range(1, len(texts) + 1))
    bodies = "".join(f"<Thread>\n{n}: {text}</Thread>" for n, text in enumerate(texts, 1))
    return f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{bodies}\n</Parallel>\n"


def test_a_breach_is_marked_where_it_is():
    data = data_of(trajectory_page([row(BROKEN)], "f"))
    [detail] = data["chunk-0"]
    assert detail["breaches"] == check_format(BROKEN) and len(detail["breaches"]) == 1
    text, marks = text_and_marks(detail["line"])
    assert text == BROKEN and marks == [(0, BROKEN.index("</Thread>"))]


def test_a_breach_of_a_prompt_that_opens_the_thinking_is_marked_in_the_response():
    response = BROKEN.removeprefix("<think>")
    of_prompt = Row("q <think>", response, None, None, None, None, None, "f:1")
    [detail] = data_of(trajectory_page([of_prompt], "f"))["chunk-0"]
    assert text_and_marks(detail["line"])[1] == [(0, response.index("</Thread>"))]


def test_a_row_that_begins_inside_its_thinking_is_well_formed():
    """As annotate and `generate --data` write it for a chat template that opens the thinking."""
    rows = [
        row(f"Hm.\n{threads('x', 'y')}</think>\\boxed{{2}}"),
        row("Hm.</think>\\boxed{2}</think>"),
        row("<think>Hm.</think></think>"),
        row("Hm.</think>2", violations=["line 1: </think> closes no <think>"]),
    ]
    data = data_of(trajectory_page(rows, "f"))
    assert data["index"]["breaches"] == [0, 1, 1, 1]
    marks = [text_and_marks(detail["line"])[1] for detail in data["chunk-0"]]
    at = [[], [(0, len("Hm.</think>\\boxed{2}"))], [(0, len("<think>Hm.</think>"))]]
    assert marks == [*at, [(0, len("Hm."))]]


def test_breaches_that_the_file_lists_stand_and_are_found_again():
    listed = [*check_format(BROKEN), "line 2: the response holds the control token <|x|>", "odd"]
    [detail] = data_of(trajectory_page([row(BROKEN, violations=listed)], "f"))["chunk-0"]
    assert detail["breaches"] == listed
    at = BROKEN.index("</Thread>"), BROKEN.index("\n") + 1, 0
    assert sorted(text_and_marks(detail["line"])[1]) == list(enumerate(at))
    data = data_of(trajectory_page([row(BROKEN, violations=[])], "f"))
    assert data["index"]["breaches"] == [0]


def test_the_index_counts_every_row():
    eight = "a b c d e f g h"
    rows = [row(threads(eight, f"{eight} i", "z"), correct=True), row("x y", correct=False)]
    data = data_of(trajectory_page(rows * CHUNK, "f"))
    index, about = data["index"], data["about"]
    assert about["rows"] == 2 * CHUNK == len(index["ask"]) and set(data) >= {"chunk-0", "chunk-1"}
    assert index["right"][:2] == [1, 0] and index["threads"][:2] == [3, 0]
    assert (index["repeated"][0], index["grams"][0]) == (2, 3)
    assert index["total"][1] == index["longest"][1] == 2 and index["longest"][0] < index["total"][0]


def test_a_response_that_the_tokenizer_cannot_take_is_named():
    with pytest.raises(DataError, match=r"^f.jsonl:1: the vocabulary lacks"):
        trajectory_page([row("\u2603")], "f", CODEC)


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    rows = [
        row(f"{EXAMPLE} the first", correct=True),
        row(BROKEN, correct=False),
        row("nothing parallel here", correct=True),
        row(f"{threads('x', 'y')}{threads('x', 'y', 'z ' * 40)}", correct=False),
        row(""),
    ]
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_whole(path, trajectory_page(rows, "rows.jsonl"))
    page = Opened(browser, path)
    yield page
    page.close()


def shown(page: Opened) -> list[str]:
    return page.view.eval_on_selector_all(
        "#list .row > .number", "rows => rows.map(r => r.textContent)"
    )


def current(page: Opened) -> str:
    return page.view.inner_text("#name")


@pytest.fixture
def page(opened):
    opened.view.evaluate("document.activeElement.blur()")
    for name, value in (("search", ""), ("least", ""), ("most", "")):
        opened.view.fill(f"#{name}", value)
    for name in ("right", "form"):
        opened.view.select_option(f"#{name}", "")
    opened.view.select_option("#order", "file")
    opened.view.evaluate("hits = null, query = '', filter(), show(0)")
    opened.view.evaluate("document.activeElement.blur()")
    return opened


def test_keys_go_to_the_next_row_and_the_previous_one(page):
    assert current(page) == "Row 1" and page.view.is_disabled("#previous")
    page.view.keyboard.press("j")
    page.view.keyboard.press("ArrowRight")
    assert current(page) == "Row 3"
    page.view.keyboard.press("k")
    assert current(page) == "Row 2" and page.view.url.endswith("#row=2")
    page.view.keyboard.press("k")
    page.view.keyboard.press("k")
    assert current(page) == "Row 1"


def test_filters_leave_the_rows_that_they_name(page):
    page.view.select_option("#right", "0")
    assert shown(page) == ["2", "4"] and current(page) == "Row 2"
    page.view.select_option("#right", "-1")
    assert shown(page) == ["5"]
    page.view.select_option("#right", "")
    page.view.select_option("#form", "ill")
    assert shown(page) == ["2"]
    page.view.select_option("#form", "")
    page.view.fill("#least", "1")
    assert shown(page) == ["1", "4"]
    page.view.fill("#most", "4")
    assert shown(page) == ["1"]
    page.view.fill("#least", "99")
    assert shown(page) == [] and "No row passes" in page.view.inner_text("#row")


def test_the_search_finds_text_of_responses_and_marks_it(page):
    page.view.keyboard.press("/")
    page.view.keyboard.type("PARALLEL here")
    page.view.wait_for_selector("mark.hit")
    assert shown(page) == ["3"] and page.view.inner_text("mark.hit") == "parallel here"


def test_a_breach_is_reached_by_key(page):
    page.view.evaluate("show(1)")
    page.view.keyboard.press("b")
    assert page.view.evaluate("document.activeElement.id") == "breach-0"
    before = page.view.evaluate("document.activeElement.previousSibling.textContent")
    after = page.view.evaluate("document.activeElement.nextSibling.textContent")
    assert before.endswith("ab") and after == "</Thread>"


def test_threads_stand_side_by_side_and_one_of_each_block_is_on_the_critical_path(page):
    page.view.evaluate("show(3)")
    boxes = [
        box.bounding_box() for box in page.view.query_selector_all(".threads >> nth=1 >> .thread")
    ]
    assert len(boxes) == 3 and len({box["y"] for box in boxes}) == 1
    assert boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
    marked = page.view.eval_on_selector_all(".thread", "all => all.map(t => t.className)")
    assert marked == ["thread on-path", "thread", "thread", "thread", "thread on-path"]
    assert page.view.locator("#timeline rect").count() > 5


def test_the_list_is_sorted_by_what_is_asked(page):
    page.view.select_option("#order", "total")
    total = page.view.evaluate("rows.map((row) => index.total[row])")
    assert total == sorted(total, reverse=True) and total[0] > total[-1] == 0


def test_the_theme_follows_the_system_until_it_is_chosen(browser, tmp_path):
    write_whole(tmp_path / "page.html", trajectory_page([row("a")], "f"))
    page = Opened(browser, tmp_path / "page.html", "dark")
    theme = "document.documentElement.dataset.theme"
    assert page.view.evaluate(theme) == "dark"
    page.view.click("#theme")
    assert page.view.evaluate(theme) == "light"
    page.close()


@pytest.mark.slow
def test_ten_thousand_trajectories_open_in_two_seconds(browser, tmp_path):
    rng = random.Random(0)
    words = ["so", "the", "sum", "of", "12", "and", "x", "is", "even", "therefore", "we", "have"]
    text = " ".join(rng.choices(words, k=100_000))

    def part(characters: int) -> str:
        start = rng.randrange(len(text) - characters)
        return text[start : start + characters]

    rows = [
        row(f"{part(900)}\n{threads(part(500), part(700), part(300))}{part(500)}", correct=True)
        for _ in range(10_000)
    ]
    path = tmp_path / "page.html"
    write_whole(path, trajectory_page(rows, "f"))
    seconds = []
    for _ in range(3):
        page = Opened(browser, path, hash="#row=9000")
        seconds.append(page.seconds_to_open)
        assert current(page) == "Row 9,000"
        page.close()
    print(f"{path.stat().st_size / 1e6:.0f} MB: {seconds} s")
    assert min(seconds) < 2
