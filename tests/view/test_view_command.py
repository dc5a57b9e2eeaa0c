"""`python -m threadweaver.view`: what it writes, and how it refuses."""

import json

import pytest

from tests.trajectory.trajectories import EXAMPLE
from tests.view.browser import data_of
from threadweaver.model import build_tokenizer
from threadweaver.view.__main__ import main


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"question": "1+1?", "response": EXAMPLE, "answer": "2"}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tokenizer and no weights."""
    folder = tmp_path_factory.mktemp("model")
    build_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    return str(folder)


@pytest.fixture
def refused(capsys):
    def run(*arguments: object, code: int = 2) -> str:
        assert main([*map(str, arguments)]) == code
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run


def test_pages_are_written_and_named(rows, model, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["trajectory", f"{rows}", "--out", f"{out}"]) == 0
    assert data_of(out.read_text())["about"]["unit"] == "words"
    assert main(["trajectory", f"{rows}", "--model", model, "--out", f"{out}"]) == 0
    tokens = data_of(out.read_text())
    assert tokens["about"]["unit"] == "tokens"
    assert main(["trie", f"{rows}", "--row", "2", "--model", model, "--out", f"{out}"]) == 0
    about = data_of(out.read_text())["about"]
    assert about["title"] == "rows.jsonl, row 2" and about["longest"] >= tokens["index"]["total"][0]
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert main(["run", f"{tmp_path}", "--out", f"{out}"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out)] * 4


def test_bad_input_ends_in_one_line(rows, model, refused, tmp_path):
    out, mine = tmp_path / "page.html", tmp_path / "mine.html"
    mine.write_text("mine")
    assert "no such file" in refused("trajectory", tmp_path / "no.jsonl", "--out", out)
    assert "unknown extension" in refused("trajectory", mine, "--out", out)
    assert "there already" in refused("trajectory", rows, "--out", mine)
    assert "there already" in refused("trajectory", rows, "--out", rows)
    trie = "trie", rows, "--model", model, "--out", out
    assert "has 2 (they count from 1)" in refused(*trie, "--row", 3)
    assert "at least 1" in refused(*trie, "--row", 0)
    assert "at least 1" in refused(*trie, "--block_q", 0)
    assert "model" in refused("trie", rows, "--out", out)
    assert "no/such" in refused("trie", rows, "--model", "no/such/folder", "--out", out)
    assert "holds no run" in refused("run", tmp_path, "--out", out)
    assert "watch" in refused("run", tmp_path, "--out", out, "--watch", "nan")
    assert "did you mean" in refused("run", tmp_path, "--out", out, "--wach", 1)
    assert refused("pages", tmp_path) and refused()
    assert mine.read_text() == "mine" and not out.exists()


def test_watching_is_ended_by_ctrl_c_and_leaves_a_page_at_rest(tmp_path, monkeypatch):
    out, slept = tmp_path / "page.html", []

    def sleep(seconds: float) -> None:
        slept.append(data_of(out.read_text())["about"]["reload"])
        raise KeyboardInterrupt

    monkeypatch.setattr("threadweaver.view.run.time.sleep", sleep)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert main(["run", str(tmp_path), "--watch", "3", "--out", str(out)]) == 0
    assert slept == [3] and data_of(out.read_text())["about"]["reload"] is None
