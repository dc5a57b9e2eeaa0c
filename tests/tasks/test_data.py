import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from threadweaver.data import (
    DataError,
    Example,
    columns_note,
    files,
    load_examples,
    read_rows,
    save_rows,
    trajectory_row,
)
from threadweaver.data.overlap import texts_of_files
from threadweaver.model import build_tokenizer
from threadweaver.tasks import load_task
from threadweaver.tasks.multiplication import make_rows, split_problems
from threadweaver.train.batches import build_tries
from threadweaver.train.config import DataConfig
from threadweaver.trajectory import Codec, Rendered

CODEC = Codec.from_tokenizer(build_tokenizer())

TASK_ROWS = list(make_rows(split_problems(12, 0)[0], 0.5, 0))


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_rows_come_back_as_saved(tmp_path, name):
    path = tmp_path / "new" / name
    save_rows(TASK_ROWS, path)
    separator = ":{}" if name.endswith("jsonl") else ", row {}"
    assert load_examples(path) == [
        Example(
            row["question"],
            row["response"],
            row["reward_model"]["ground_truth"],
            str(path) + separator.format(i),
        )
        for i, row in enumerate(TASK_ROWS, start=1)
    ]
    assert [file.name for file in path.parent.iterdir()] == [name]


@pytest.mark.parametrize(("name", "kind"), [("train.jsonl", "json"), ("train.parquet", "parquet")])
def test_saved_files_are_read_by_datasets(tmp_path, name, kind):
    datasets = pytest.importorskip("datasets")
    save_rows(TASK_ROWS, tmp_path / name)
    dataset = datasets.load_dataset(
        kind, data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert list(dataset) == TASK_ROWS


@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip))
def test_any_text_survives_json_lines(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    save_rows([{"question": text, "response": text}] * 2, path)
    assert load_examples(path) == [Example(text, text, None, f"{path}:{n}") for n in (1, 2)]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    save_rows(TASK_ROWS, path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_rows([{"question": "q"}, {"question": object()}], path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


CHAT = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ? Box it.<|im_end|>\n"
HEADER = "<|im_start|>assistant\n"
ANSWER = "<think>\nwork</think>\n\\boxed{4}"


@pytest.mark.parametrize(
    ("row", "prompt", "response", "truth"),
    [
        # Ours.
        ({"question": "Q?\n", "qwen_text": "Q?\n" + ANSWER}, "Q?\n", ANSWER, None),
        # The published implementation's: a chat template round the text, its turn closed or not.
        (
            {"question": "Q?", "qwen_text": f"{CHAT}{HEADER}{ANSWER}<|im_end|>\n"},
            CHAT + HEADER,
            ANSWER,
            None,
        ),
        ({"question": "Q?", "qwen_text": CHAT + HEADER + ANSWER}, CHAT + HEADER, ANSWER, None),
        # Several turns: only the last is the response.
        (
            {"qwen_text": f"{HEADER}earlier<|im_end|>\n{CHAT}{HEADER}{ANSWER}<|im_end|>"},
            f"{HEADER}earlier<|im_end|>\n{CHAT}{HEADER}",
            ANSWER,
            None,
        ),
        (
            {
                "qwen_text": "<|start_header_id|>assistant<|end_header_id|>\n\n"
                + ANSWER
                + "<|eot_id|>"
            },
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ANSWER,
            None,
        ),
        # The question inside other text: the response starts with the thinking, or right after.
        (
            {"question": "Q?", "qwen_text": f"Task: Q? Answer:\n{ANSWER}"},
            "Task: Q? Answer:\n",
            ANSWER,
            None,
        ),
        ({"question": "Q?", "qwen_text": "Q? It is 4."}, "Q?", " It is 4.", None),
        # Where both are there, qwen_text ends with the response.
        (
            {"qwen_text": f"{CHAT}{HEADER}So {ANSWER}<|im_end|>\n", "response": f"So {ANSWER}"},
            CHAT + HEADER,
            f"So {ANSWER}",
            None,
        ),
        (
            {"question": "Q?", "response": ANSWER, "reward_model": {"ground_truth": "4"}},
            "Q?",
            ANSWER,
            "4",
        ),
        ({"question": "Q?", "response": "R", "reward_model.ground_truth": 4}, "Q?", "R", "4"),
        ({"question": "Q?", "response": "R", "ground_truth": "4"}, "Q?", "R", "4"),
        ({"question": "Q?", "qwen_text": None, "response": "R"}, "Q?", "R", None),
        # verl's.
        (
            {
                "prompt": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "Q? Box it."},
                ],
                "response": ANSWER,
                "reward_model": {"style": "rule", "ground_truth": "4"},
                "extra_info": {"index": 0},
            },
            [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "Q? Box it."},
            ],
            ANSWER,
            "4",
        ),
    ],
)
@pytest.mark.parametrize("extension", ["jsonl", "json", "parquet"])
def test_known_layouts_are_read(tmp_path, extension, row, prompt, response, truth):
    path = tmp_path / f"rows.{extension}"
    if extension == "parquet":
        save_rows([row], path)
    else:
        write(path, row)
    (example,) = load_examples(path)
    assert (example.prompt, example.response, example.ground_truth) == (prompt, response, truth)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("begun", ["", "<|reserved-0|>"])
def test_a_text_is_split_whether_or_not_it_has_the_bos_token(tmp_path, turns, begun):
    tokenizer, bos = build_tokenizer(), "<|reserved-0|>"
    ids = [(bos, tokenizer.get_vocab()[bos])]
    post = TemplateProcessing(f"{bos} $A", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = post
    codec = Codec.from_tokenizer(tokenizer)
    question = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q?"}]
    row = {"prompt": question if turns else "Q?"}
    text = codec.prompts.text(row["prompt"])
    assert text == (f"{bos}S\n\nQ?" if turns else f"{bos}Q?")
    row["qwen_text"] = f"{begun}{text.removeprefix(bos)} So <think>4"
    (example,) = load_examples(write(tmp_path / "rows.jsonl", row), codec=codec)
    assert example.response == " So <think>4"
    assert codec.encode_prompt(example.prompt) == codec.encode_prompt(row["prompt"])


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_one_right_answer_and_several_come_back_from_one_file(tmp_path, extension):
    answers = ["1", ["1", "2"], 3, ["4"]]
    rows = [trajectory_row("Q", "R", answer) for answer in answers]
    save_rows([*rows, {"question": "Q", "response": "R"}], tmp_path / f"rows.{extension}")
    examples = load_examples(tmp_path / f"rows.{extension}")
    assert [e.ground_truth for e in examples] == ["1", ("1", "2"), "3", "4", None]


def test_rows_that_parquet_cannot_hold_are_refused_in_a_line(tmp_path):
    path = tmp_path / "rows.parquet"
    save_rows([GOOD], path)
    for bad in ([{"a": "x"}, {"a": ["x"]}], [{"a": {}}], [{"a": 2**70}], [{"a": "\ud800"}]):
        with pytest.raises(DataError, match=r"rows\.parquet: parquet cannot hold .*write \.jsonl"):
            save_rows(bad, path)
    assert len(load_examples(path)) == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q?", "qwen_text": f"{CHAT}{HEADER}We add.<|im_end|>"},
        {"question": "Q?", "qwen_text": "Q? They ask: Q? So"},
        {"question": "Q?", "qwen_text": "What is it? So"},
        {"prompt": [{"role": "user", "content": "Q?"}], "qwen_text": f"{CHAT}{HEADER}We add."},
    ],
)
def test_a_task_takes_the_question_of_a_text_that_cannot_be_split(tmp_path, row):
    path = write(tmp_path / "rows.jsonl", {**row, "answer": "7"})
    with pytest.raises(DataError, match="field 'qwen_text'"):
        load_examples(path)
    (example,) = load_examples(path, responses=False)
    assert (example.response, example.ground_truth) == ("", "7")
    assert example.prompt == row.get("question", row.get("prompt"))
    task = load_task(str(path), held_out=0.0, whole_numbers=True)
    (problem,) = task.problems("train", None)
    assert task.demonstration(problem, parallel=False) is None


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_rows_without_a_response_are_read_where_none_is_needed(tmp_path, extension):
    rows = [{"question": "Q", "ground_truth": "4"}, {"question": "P", "response": "R"}]
    path = tmp_path / f"rows.{extension}"
    save_rows(rows, path)
    examples = load_examples(path, responses=False)
    assert [(e.prompt, e.response, e.ground_truth) for e in examples] == [
        ("Q", "", "4"),
        ("P", "R", None),
    ]
    with pytest.raises(DataError, match="no field 'qwen_text' or 'response'"):
        load_examples(path)


WRITTEN = ["", " \n", "<|im_end|>", f"R<|im_end|>\n{HEADER}R"]


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "prompt", ["Q?", Rendered("a <think>\n"), [{"role": "user", "content": "Q"}]]
)
def test_a_file_of_responses_of_any_content_is_a_task(tmp_path, prompt, extension):
    """As `generate --data` writes it of a model that ends at once, or opens a turn of its own."""
    path = tmp_path / f"rows.{extension}"
    save_rows([trajectory_row(prompt, text, "7") for text in (*WRITTEN, "R")], path)
    task = load_task(str(path), held_out=0.0, whole_numbers=True)
    problems = task.problems("train", None)
    assert [problem.data for problem in problems] == [""] * len(WRITTEN) + ["R"]
    for problem in problems:
        assert problem.prompt == prompt
        assert isinstance(problem.prompt, Rendered) == isinstance(prompt, Rendered)
    with pytest.raises(DataError, match=r"field '(response|qwen_text)'"):
        load_examples(path)
    # What cannot be trained on counts for overlap.
    assert HEADER in [text.rest for text in texts_of_files([str(path)])][3]


GOOD = {"question": "Q", "response": "R"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q"}, "no field 'qwen_text' or 'response' (found: question); add it"),
        ({"response": "R"}, "no field 'question' or 'prompt' (found: response); add it"),
        ({}, "no field 'qwen_text' or 'response' (found: nothing); add it"),
        ({"qwen_text": "text"}, "no field 'question' (found: qwen_text); add it"),
        ({"question": "Q", "response": ""}, "field 'response' is empty; fill it in"),
        ({"question": "Q", "response": " \n"}, "field 'response' is empty; fill it in"),
        ({"question": "", "response": "R"}, "field 'question' is empty; fill it in"),
        ({"question": "Q", "qwen_text": "Q\n"}, "field 'qwen_text': the response is empty"),
        ({"qwen_text": HEADER + "<|im_end|>\n"}, "no field 'question' (found: qwen_text); add it"),
        (
            {"question": "Q", "qwen_text": "Q" + ANSWER, "response": "other"},
            "field 'qwen_text' does not end with the text of 'response'",
        ),
        ({"question": "Q", "qwen_text": "Q Q it is."}, "holds 2 times the text of 'question'"),
        (
            {"question": "Q", "qwen_text": f"Q<|im_end|>\n{HEADER}It is."},
            "field 'qwen_text': the response holds <|im_end|>, a control token",
        ),
        (
            {"question": "Q", "response": f"R<|im_end|>\n{HEADER}R"},
            "field 'response': the response holds <|im_end|>, a control token",
        ),
        ({"question": "Q", "response": "<|im_end|>\n"}, "field 'response': the response is empty"),
        ({"response": "R", "qwen_text": "R"}, "field 'qwen_text' holds no prompt before the resp"),
        ({"question": "Q", "qwen_text": "other"}, "does not hold the text of 'question'"),
        ({"question": 3, "response": "R"}, "field 'question' must be text or a list of"),
        ({"question": "Q", "response": ["R"]}, "field 'response' must be text, found a list"),
        ({"question": "Q", "qwen_text": {}}, "field 'qwen_text' must be text, found an object"),
        ({"prompt": " ", "response": "R"}, "field 'prompt' is empty; fill it in"),
        ({"prompt": [], "response": "R"}, "field 'prompt' must be text or a list of"),
        (
            {"prompt": [{"role": "human", "content": "Q"}], "response": "R"},
            "field 'prompt[0].role' is 'human'; use one of system, developer, user, assistant, t",
        ),
        (
            {"prompt": [{"role": "assistant", "content": "R"}], "response": "R"},
            "field 'prompt' ends with a turn of the assistant",
        ),
        ({"prompt": ["Q"], "response": "R"}, "field 'prompt[0]' must be an object"),
        (
            {"prompt": [{"role": "user"}], "response": "R"},
            "field 'prompt[0].content' must be text, found null",
        ),
        ({**GOOD, "reward_model": "4"}, "field 'reward_model' must be an object"),
        ({**GOOD, "reward_model": {"style": "rule"}}, "no field 'reward_model.ground_truth'"),
        (
            {**GOOD, "reward_model": {"ground_truth": ["4", ["5"]]}},
            "field 'reward_model.ground_truth[1]' must be text or a number, found a list",
        ),
        (
            {**GOOD, "ground_truth": True},
            "field 'ground_truth' must be text, a number or a list of these, found a b",
        ),
        ({**GOOD, "answer": []}, "field 'answer' is an empty list; give the right answer"),
        ({**GOOD, "answer": float("nan")}, "field 'answer' is nan, which no answer can equal"),
        ({**GOOD, "answer": float("-inf")}, "field 'answer' is -inf, which no answer can equal"),
        ({"question": "a\ud800", "response": "R"}, "(U+D800, character 2), which is no text"),
        ({**GOOD, "ground_truth": ["\udc00"]}, "field 'ground_truth[0]' holds half of a surr"),
        ([1], "found a list where a row should be; write one JSON object a line"),
        (None, "found null where a row should be"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", GOOD, GOOD, row, GOOD)
    with pytest.raises(DataError) as error:
        load_examples(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_bad_parquet_row_is_named_by_file_row_and_field(tmp_path):
    path = tmp_path / "rows.parquet"
    save_rows([GOOD, GOOD, {"question": "Q", "response": None}], path)
    with pytest.raises(DataError) as error:
        load_examples(path)
    assert str(error.value).startswith(f"{path}, row 3: no field 'qwen_text' or 'response'")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "Q", }\n', ":2: not JSON ("),
        (b"question,response\n", ":2: not JSON ("),
        (b"\n", ":2: empty line; remove it"),
        (b'{"question": "\xff"}\n', ":2: not UTF-8 (byte 15)"),
        (b'{"question": "a", "question": "b"}\n', ":2: field 'question' is there twice; keep one"),
        (b'{"reward_model": {"a": 1, "a": 2}}\n', ":2: field 'a' is there twice; keep one"),
        (b"[" * 100_000 + b"\n", ":2: nested too deeply; write one JSON object a line"),
        (b'{"a":' * 100_000 + b"\n", ":2: nested too deeply; write one JSON object a line"),
        (b'{"answer": ' + b"9" * 5000 + b"}\n", ":2: a whole number has more than 4,300 digits"),
        (b"\xef\xbb\xbf{}\n", ":2: not JSON ("),
    ],
)
def test_a_line_that_is_no_json_is_named(tmp_path, line, message):
    path = write(tmp_path / "rows.jsonl", GOOD)
    path.write_bytes(path.read_bytes() + line + path.read_bytes())
    with pytest.raises(DataError) as error:
        load_examples(path)
    assert str(error.value).startswith(f"{path}{message}")


@pytest.mark.parametrize("start", ["", " \n\t", "\ufeff"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_may_hold_one_array_of_rows(tmp_path, start, indent):
    rows = [GOOD, {**GOOD, "question": "a\u2028b"}]
    path = tmp_path / "rows.json"
    path.write_text(start + json.dumps(rows, indent=indent), encoding="utf-8")
    assert list(read_rows(path)) == [(f"{path}, row {n}", row) for n, row in enumerate(rows, 1)]
    lines = write(tmp_path / "lines.json", *rows)
    assert [row for _, row in read_rows(lines)] == rows
    assert [e.prompt for e in load_examples(path)] == [e.prompt for e in load_examples(lines)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[]", ": holds no rows; write at least one"),
        (b'[{"question": "Q"},\n {"question": "R",}]', ":2: not JSON ("),
        (b'[{"question": "Q"}\n', ":2: not JSON ("),
        (b"[{}] {}", ":1: not JSON (Extra data"),
        (b'[{"question": "\xff"}]', ": not UTF-8 (byte 16)"),
        (b'[{"a": 1, "a": 2}]', ": field 'a' is there twice; keep one"),
        (b"[" * 100_000, ": nested too deeply; write an array of JSON objects"),
        (b"[" + b"9" * 5000 + b"]", ": a whole number has more than 4,300 digits"),
        (b'[{"question": "Q"}, [1]]', ", row 2: found a list where a row should be; write an arr"),
    ],
)
def test_what_is_wrong_with_an_array_of_rows_is_named(tmp_path, data, message):
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        list(read_rows(path))
    assert str(error.value).startswith(f"{path}{message}")


def test_line_numbers_count_newlines_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    tricky = json.dumps({"question": "a\u2028b\x0cc", "response": "R"}, ensure_ascii=False)
    path.write_text(f"{tricky}\r\n{tricky}\nnot json", encoding="utf-8", newline="")
    with pytest.raises(DataError, match=r"rows\.jsonl:3: not JSON"):
        load_examples(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        load_examples(tmp_path / "none.jsonl")


def test_folders_and_patterns_are_read_in_name_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", ".hidden.jsonl"):
        save_rows([{"question": name, "response": "R"}], tmp_path / name)
    save_rows([{"question": "d.parquet", "response": "R"}], tmp_path / "d.parquet")
    (tmp_path / "README.md").write_text("of the data")

    def prompts(path) -> list:
        return [example.prompt for example in load_examples(path)]

    assert prompts(tmp_path) == ["a.jsonl", "b.jsonl", "d.parquet"]
    assert prompts(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert prompts(tmp_path / "**" / "[a-c].jsonl") == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    # A file whose own name holds brackets is that file.
    save_rows([{"question": "brackets", "response": "R"}], tmp_path / "[a].jsonl")
    assert prompts(tmp_path / "[a].jsonl") == ["brackets"]


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(DataError, match=r"the folder holds no \.jsonl, \.json or \.parquet file"):
        load_examples(tmp_path)
    (tmp_path / "sub.jsonl").mkdir()
    with pytest.raises(DataError, match=r"sub\.jsonl: is a folder; name files"):
        load_examples(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_file_that_is_no_regular_one_is_refused_and_not_waited_for(tmp_path, make):
    make(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows\.jsonl: is a (pipe|socket or device), and data"):
        load_examples(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["a\0b.jsonl", f"{'x' * 5000}.jsonl", "none/../none.jsonl"])
def test_a_path_that_no_file_can_have_is_one_line(name):
    with pytest.raises(DataError) as error:
        load_examples(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_an_unknown_extension_is_named(tmp_path):
    path = write(tmp_path / "rows.csv", GOOD)
    with pytest.raises(DataError, match=r"rows\.csv: unknown extension '\.csv'; use \.jsonl"):
        load_examples(path)
    with pytest.raises(DataError, match=r"cannot write '\.csv'"):
        save_rows([GOOD], path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_file_without_rows_is_refused(tmp_path, name):
    save_rows([], tmp_path / name)
    with pytest.raises(DataError, match="holds no rows"):
        load_examples(tmp_path / name)


def test_a_broken_parquet_file_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 no such thing")
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable parquet file"):
        load_examples(path)


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_without_the_parquet_packages_json_lines_still_work(tmp_path, monkeypatch, package):
    save_rows(TASK_ROWS, tmp_path / "rows.parquet")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    save_rows(TASK_ROWS, tmp_path / "rows.jsonl")
    assert len(load_examples(tmp_path / "rows.jsonl")) == len(TASK_ROWS)
    with pytest.raises(DataError, match=rf"needs the package '{package}'"):
        if package == "datasets":
            save_rows(TASK_ROWS, tmp_path / "again.parquet")
        else:
            load_examples(tmp_path / "rows.parquet")


def test_a_mark_of_utf8_before_the_first_row_is_no_part_of_it(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [example.prompt for example in load_examples(path)] == ["Q"]


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 100)
    path = write(tmp_path / "rows.jsonl", GOOD, {"question": "Q" * 100, "response": "R"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the line has more than 100 bytes"):
        load_examples(path)


def test_a_text_of_parquet_that_is_not_utf8_is_named_by_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([b"Q", b"\xff", b"Q"]).view(pyarrow.string())
    table = pyarrow.table({"question": texts, "response": ["R"] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet, row 2: a text is not UTF-8"):
        load_examples(tmp_path / "rows.parquet")


# Ten layouts: how the prompt and how the answer is named.
PROMPT_COLUMNS = [
    {"question": "2+2?"},
    {"prompt": "2+2?"},
    {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "2+2?"}]},
    {"problem": "2+2?"},
    {"query": "2+2?"},
    {"input": "2+2?"},
    {"question": [{"role": "user", "content": "2+2?"}]},
    {"problem": "2+2?", "prompt": None},
    {"problem": "2+2?", "solution": "The sum of 2 and 2 is \\boxed{4}"},
    {"prompt": "2+2?", "data_source": "m", "extra_info": {"index": 0}},
]
ANSWER_COLUMNS = [
    {"reward_model": {"ground_truth": "4", "style": "rule"}},
    {"reward_model.ground_truth": "4"},
    {"ground_truth": 4},
    {"answer": "4"},
    {"expected_answer": "4"},
    {"final_answer": ["4"]},
    {"answer": ["5", "4"]},
    {"solution": "4"},
    {"answer": "4"},
    {"final_answer": "4", "solution": "long"},
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize(
    ("asked", "answered"), list(zip(PROMPT_COLUMNS, ANSWER_COLUMNS, strict=True))
)
def test_rows_of_ten_layouts_load_for_sft_and_rl(tmp_path, name, asked, answered):
    path = tmp_path / name
    save_rows([{**asked, **answered, "response": ANSWER}] * 2, path)
    built = build_tries(load_examples(path, codec=CODEC), CODEC, DataConfig(str(path)), 4096)
    messages = isinstance(next(iter(asked.values())), list)
    system = "S\n\n" if messages and len(next(iter(asked.values()))) == 2 else ""
    whole = [*CODEC.encode(f"{system}2+2?{ANSWER}"), CODEC.eos_id]
    assert [trie.tokens.tolist() for trie in built.tries] == [whole] * 2
    task = load_task(str(path), held_out=0.0, whole_numbers=True)
    problems = task.problems("train", None)
    assert [CODEC.encode_prompt(p.prompt) for p in problems] == [CODEC.encode(f"{system}2+2?")] * 2
    assert all(task.is_correct(ANSWER, problem) for problem in problems)
    assert not task.is_correct(ANSWER.replace("4", "7"), problems[0])


def test_what_was_taken_from_where_is_said_in_a_line(tmp_path):
    rows = [{"problem": "Q", "response": "R", "answer": 4}, {"query": "Q", "response": "R"}]
    path = write(tmp_path / "rows.jsonl", rows[0], rows[0], rows[1])
    assert columns_note(str(path), load_examples(path)) == (
        f"{path}: 2 rows: prompt from problem, response from response, answer from answer; "
        "1 rows: prompt from query, response from response"
    )


VALUES = [
    *("Q", "", " \n", ANSWER, f"Q{ANSWER}", f"Q Q{ANSWER}", f"{ANSWER}<|endoftext|>\n", "a\ud800"),
    *(f"{CHAT}{HEADER}{ANSWER}<|im_end|>", "<|im_end|>", "<think>", "<Thread>" * 3, "</s>", "\0"),
    *(None, True, 1, 1.5, 10**400, -1e308, float("nan"), [], {}, ["4"], [None], [[1]]),
    *([{"role": "user", "content": "Q"}], [{"role": "user"}], [{"role": "no", "content": "Q"}]),
    *({"ground_truth": "4"}, {"ground_truth": None}, {"ground_truth": ["4", 5]}),
]
COLUMNS = [
    *("question", "prompt", "problem", "query", "input", "response", "qwen_text"),
    *("reward_model", "reward_model.ground_truth", "ground_truth", "answer", "solution"),
]


def test_a_row_of_anything_is_taken_or_refused_in_one_line_that_names_it(tmp_path):
    path, rng = tmp_path / "rows.jsonl", random.Random(0)
    taken = refused = 0
    for _ in range(400):
        row = {name: rng.choice(VALUES) for name in rng.sample(COLUMNS, rng.randint(0, 4))}
        if rng.random() < 0.7:
            row = {"question": "Q", "response": ANSWER, "answer": "4"} | row
        line = bytearray(json.dumps(row).encode() + b"\n")
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            line[rng.randrange(len(line))] = rng.randrange(256)
        path.write_bytes(line)
        try:
            built = build_tries(load_examples(path, codec=CODEC), CODEC, DataConfig("f"), 4096)
            assert all(int((t.tokens == CODEC.eos_id).sum()) == 1 for t in built.tries)
            task = load_task(str(path), held_out=0.0, whole_numbers=True)
            for problem in task.problems("train", None):
                assert CODEC.encode_prompt(problem.prompt)
                assert task.is_correct(ANSWER, problem) in (True, False)
            taken += 1
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            refused += 1
    assert min(taken, refused) > 40
