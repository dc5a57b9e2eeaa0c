"""Overlap of training data and benchmarks, by 13 words in a row."""

from __future__ import annotations

import json

from threadweaver.data.overlap import Text, find_overlap, texts_of_files

WORDS = [f"w{i}" for i in range(40)]


def test_thirteen_words_in_a_row_are_shared_and_twelve_are_not():
    problem = Text("b:1", " ".join(WORDS[:20]))
    thirteen, twelve = (Text(f"t:{n}", "x " + " ".join(WORDS[3 : 3 + n])) for n in (13, 12))
    found = find_overlap([problem], [thirteen, twelve])
    assert (found.problems, found.rows) == (1, 2)
    assert (found.problems_shared, found.rows_shared) == (1, 1)
    assert found.examples == [("b:1", "t:13", " ".join(WORDS[3:16]))]
    assert find_overlap([problem], [twelve]).problems_shared == 0


def test_case_and_marks_do_not_matter_and_responses_are_compared_too():
    problem = Text("b:1", ", ".join(WORDS[:15]).upper() + "?")
    row = Text("t:1", "Something else.", f"The problem says ({' '.join(WORDS[:14])}).")
    assert find_overlap([problem], [row]).problems_shared == 1


def test_a_short_problem_overlaps_as_a_whole_prompt_only():
    problem = Text("b:1", "47*86=?\n")
    rows = [Text("t:1", " 47*86=? "), Text("t:2", "47+86=?"), Text("t:3", "Why is 47*86=? hard")]
    found = find_overlap([problem], rows)
    assert found.rows_shared == 1 and found.examples == [("b:1", "t:1", "47*86=?")]


def test_every_problem_that_has_the_words_is_counted():
    """Not the first of them alone."""
    long, short = " ".join(WORDS[:13]), "47*86=?"
    problems = [
        Text(f"b:{i}", text) for i, text in enumerate([long, f"{long} and more"] + [short] * 2)
    ]
    found = find_overlap(problems, [Text("t:1", f"{long}?"), Text("t:2", short)])
    assert (found.problems_shared, found.rows_shared) == (4, 2)


def test_all_of_a_text_that_cannot_be_split_is_compared(tmp_path):
    """That is, of a file that SFT reads by the tokenizer's chat template."""
    path = tmp_path / "train.jsonl"
    words = " ".join(WORDS[:14])
    text = f"<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\nWe {words}<|im_end|>"
    rows = [{"question": "Q?", "qwen_text": text}, {"qwen_text": text}, {"question": "Q?"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [Text("b:1", words), Text("b:2", "Q?")]
    found = find_overlap(problems[:1], texts_of_files([str(path)]))
    assert (found.problems_shared, found.rows_shared) == (1, 2)
    found = find_overlap(problems[1:], texts_of_files([str(path)]))
    assert (found.problems_shared, found.rows_shared) == (1, 2)


def test_files_are_compared_and_the_report_names_line_and_count(tmp_path):
    path = tmp_path / "train.jsonl"
    asked = [{"role": "user", "content": " ".join(WORDS[i : i + 14])} for i in range(6)]
    rows = [{"prompt": [turn], "response": "r"} for turn in asked]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [Text(f"b:{i}", " ".join(WORDS[i : i + 14])) for i in (0, 2, 4, 20)]
    problems.append(Text("b:25", " ".join(WORDS[25:40])))
    found = find_overlap(problems, texts_of_files([str(path)]))
    assert found.lines()[0] == (
        "overlap: 3 of 5 problems and 6 of 6 training rows have 13 words in a row, "
        "or a shorter prompt, in common"
    )
    assert f"b:2 and {path}:2: 'w2 w3" in found.lines()[2] and len(found.lines()) == 4
    assert json.loads(json.dumps(found.as_dict()))["examples"][0]["problem"] == "b:0"
    nothing = find_overlap([Text("b:1", "x " * 30)], texts_of_files([str(path)]))
    assert nothing.lines() == [
        "overlap: none of 1 problems and 0 of 6 training rows have 13 words in a row, "
        "or a shorter prompt, in common"
    ]
