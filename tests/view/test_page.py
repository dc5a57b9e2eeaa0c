"""Every page: one file, nothing loaded, data that stays data, colours that can be read."""

import re

import pytest

from tests.view.browser import Opened, data_of, tags_of
from threadweaver.view.page import as_json, build_page, check_out, packed
from threadweaver.view.rows import Row
from threadweaver.view.run import run_page
from threadweaver.view.trajectory import trajectory_page
from threadweaver.view.trie import trie_page
from threadweaver.whole_file import write_whole
from tw_kernels import Trie

NASTY = [
    "</script><script>window.hit = 1</script>",
    "<!-- <script> -->",
    "<img src=http://x.test/a onerror='window.hit=1'>",
    "a\u2028b\u2029c\0d\ud800e",
    "{{script}} {{data}}",
    '"\\</SCRIPT >',
]


def pages(folder) -> dict[str, str]:
    """A page of each kind, full of what tries to be more than text."""
    text = "\n".join(NASTY)
    row = Row(
        text, f"<Parallel>{text}</Parallel>", text, False, [f"line 1: {text}"], None, text, text
    )
    (folder / "config.yaml").write_text(text, encoding="utf-8", errors="replace")
    (folder / "metrics.jsonl").write_text('{"step": 1, "</script><b>": 1}\n')
    return {
        "trajectory": trajectory_page([row], text),
        "trie": trie_page(Trie.from_paths([[1, 2]]), lambda id: text, text, block_q=1, block_kv=1),
        "run": run_page(folder),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return pages(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("kind", ["trajectory", "trie", "run"])
def test_a_page_names_nothing_to_load(made, kind):
    outside = [
        name for tag, given in tags_of(made[kind]) for name in given if name in ("src", "href")
    ]
    assert outside == [] and "url(" not in made[kind] and "@import" not in made[kind]
    script = made[kind][made[kind].rindex("<script>") :]
    assert set(re.findall(r"https?://[\w./]+", script)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(fetch|XMLHttpRequest|import|innerHTML|eval)\b", script)


@pytest.mark.parametrize("kind", ["trajectory", "trie", "run"])
def test_untrusted_text_never_becomes_markup(made, kind):
    tags = [tag for tag, _ in tags_of(made[kind])]
    clean = [
        tag for tag, _ in tags_of(build_page(kind, "t", dict.fromkeys(data_of(made[kind]), "0")))
    ]
    assert tags == clean and made[kind].encode("utf-8")


@pytest.mark.parametrize("kind", ["trajectory", "trie", "run"])
def test_untrusted_text_is_shown_as_text(made, kind, browser, tmp_path):
    write_whole(tmp_path / "page.html", made[kind])
    page = Opened(browser, tmp_path / "page.html")
    assert page.view.evaluate("window.hit") is None
    page.view.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert "onerror=" in page.view.inner_text("body")
    page.close()


def test_data_comes_back_as_it_was():
    data = {
        "a": NASTY,
        "b": {"</script>": [1, 2.5, None, True]},
        "tokens": packed([1, -2, 2**31 - 1]),
    }
    texts = {name: as_json(value) for name, value in data.items()}
    assert data_of(build_page("trie", "t", texts)) == data


def test_a_number_that_json_has_not_is_refused():
    with pytest.raises(ValueError):
        as_json([float("nan")])


def test_a_page_is_overwritten_and_nothing_else(tmp_path):
    page, other = tmp_path / "page.html", tmp_path / "other.html"
    check_out(page, False)
    write_whole(page, build_page("trie", "t", {}))
    check_out(page, False)
    other.write_text("<!doctype html>\n<p>mine</p>")
    with pytest.raises(ValueError, match="there already"):
        check_out(other, False)
    check_out(other, True)
    with pytest.raises(ValueError, match="is a folder"):
        check_out(tmp_path, True)
    with pytest.raises(ValueError, match="no such folder"):
        check_out(tmp_path / "no" / "page.html", True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.html", "page.html"]


def themes() -> dict[str, dict[str, str]]:
    style = build_page("run", "t", {})
    found = re.findall(r":root(\[data-theme=\"dark\"\])? \{(.*?)\}", style, re.DOTALL)
    return {
        "dark" if dark else "light": dict(re.findall(r"--([\w-]+): (#\w{6});", rules))
        for dark, rules in found
    }


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(theme):
    colours = themes()[theme]
    pairs = [
        (text, ground)
        for text in ("ink", "muted", "accent", "critical", "good", "bad")
        for ground in ("ground", "paper", "raised")
    ]
    pairs += [("accent", "accent-soft"), ("muted", "accent-soft"), ("good", "accent-soft")]
    pairs += [("bad", "accent-soft"), ("bad", "bad-soft"), ("ink", "bad-soft")]
    pairs += [("ink", "critical-soft"), ("paper", "accent")]
    for text, ground in pairs:
        light, dark = sorted((luminance(colours[n]) for n in (text, ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
