import json
from pathlib import Path

import pytest
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st

from threadweaver.data import DataError, Example, load_examples, save_rows
from threadweaver.tasks.multiplication import make_rows, split_problems

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
    save_rows(TASK_ROWS, tmp_path / name)
    dataset = load_dataset(
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
        # qwen_text wins over response.
        (
            {"question": "Q?", "qwen_text": "Q?" + ANSWER, "response": "other"},
            "Q?",
            ANSWER,
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
            CHAT + HEADER,
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
        ({"qwen_text": HEADER + "<|im_end|>\n"}, "field 'qwen_text': the response is empty"),
        ({"question": "Q", "qwen_text": "other"}, "does not hold the text of 'question'"),
        ({"question": 3, "response": "R"}, "field 'question' must be text, found a number (3)"),
        ({"question": "Q", "response": ["R"]}, "field 'response' must be text, found a list"),
        ({"question": "Q", "qwen_text": {}}, "field 'qwen_text' must be text, found an object"),
        ({"prompt": "Q", "response": "R"}, "field 'prompt' must be a list of"),
        ({"prompt": [], "response": "R"}, "field 'prompt' must be a list of"),
        ({"prompt": ["Q"], "response": "R"}, "field 'prompt[0]' must be an object"),
        (
            {"prompt": [{"role": "user"}], "response": "R"},
            "field 'prompt[0].content' must be text, found null",
        ),
        ({**GOOD, "reward_model": "4"}, "field 'reward_model' must be an object"),
        ({**GOOD, "reward_model": {"style": "rule"}}, "no field 'reward_model.ground_truth'"),
        (
            {**GOOD, "reward_model": {"ground_truth": ["4"]}},
            "field 'reward_model.ground_truth' must be text or a number, found a list",
        ),
        (
            {**GOOD, "ground_truth": True},
            "field 'ground_truth' must be text or a number, found a b",
        ),
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
        (b'{"question": "\xff"}\n', ":2: not UTF-8 (byte 15 of the line)"),
    ],
)
def test_a_line_that_is_no_json_is_named(tmp_path, line, message):
    path = write(tmp_path / "rows.jsonl", GOOD)
    path.write_bytes(path.read_bytes() + line + path.read_bytes())
    with pytest.raises(DataError) as error:
        load_examples(path)
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


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DataError, match=r"is a folder; name one"):
        load_examples(tmp_path)


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
