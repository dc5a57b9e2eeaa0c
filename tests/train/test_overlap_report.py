"""report.overlap: what training data shares with benchmarks is shown before the first step."""

import json

from threadweaver.data import load_examples


def test_overlap_with_a_benchmark_is_shown_before_training_and_kept(
    new_run, data_files, tmp_path, capsys
):
    asked = load_examples(data_files[0])[4].prompt
    benchmark = tmp_path / "benchmark.jsonl"
    rows = [{"problem": asked, "answer": "1"}, {"problem": "Is this new?", "answer": "1"}]
    benchmark.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = new_run()
    run.settings["optimization"]["max_steps"] = 1
    run.settings["report"] = {"overlap": [str(benchmark)]}
    assert run() == 0
    shown = capsys.readouterr().out
    line = (
        "overlap: 1 of 2 problems and 1 of 24 training rows have 13 words in a row, "
        "or a shorter prompt, in common"
    )
    assert shown.count("overlap: ") == 1 and shown.index(line) < shown.index("step 1")
    assert f"{benchmark}:1 and {data_files[0]}:5: '" in shown
    assert run.summary()["overlap"]["problems_shared"] == 1
    again = new_run("other")
    again.settings["report"] = {"overlap": [str(tmp_path / "none.jsonl")]}
    assert again() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: report.overlap: ") and "none.jsonl: no such file" in error
