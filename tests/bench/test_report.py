"""bench report: a document from result files alone, in which comments by hand survive."""

import itertools
import json

import pytest

from bench.__main__ import main
from bench.plots import apart

ENV = {
    "device": "some CPU",
    "device_type": "cpu",
    "cpu": "some CPU",
    "cpu_count": 2,
    "threads": 2,
    "python": "3.11",
    "versions": {"torch": "2.13"},
    "dirty": False,
    "command": "python -m bench ...",
}
ROOFLINE = {"copy_gb_per_s": 20.0, "matmul_tflops": {"float32": 0.1, "bfloat16": 0.5}}


def row(key, peer, ms, **more):
    timed = {"status": "ok", "reason": None, "ms": ms, "iqr_ms": ms / 10, "repeats": 9}
    ours = peer.startswith("ours")
    return {**key, "peer": peer, "ours": ours, **timed, "peak_bytes": 2_000_000, **more}


def absent(key, peer, reason, status="skipped"):
    return {**row(key, peer, 1.0), "status": status, "reason": reason, "ms": None}


def attention(n, scale=1.0, dtype="float32"):
    key = {"case": f"star-{n}", "n": n, "dtype": dtype, "pass": "fwd+bwd", "head_dim": 64}
    ms = scale * n * n / 1e6
    return [
        row(key, "ours", ms, tflops=0.2, gb_per_s=3.0, roofline=0.5, backend="native"),
        row(key, "SDPA dense mask", 4 * ms, tflops=0.05),
        absent(key, "FlexAttention", f"no backward for {n} tokens"),
        absent(key, "ours: triton", "wants a GPU"),
    ]


def decode(threads):
    key = {"case": f"fork-1x{threads}-8192+128", "sequences": threads, "dtype": "float32"}
    key |= {"heads": 9, "kv_heads": 3, "head_dim": 64}
    return [row(key, "ours", 1.0), row(key, "padded SDPA", 3.0 * threads)]


def rollout(peer):
    parts = ("model", "attention", "plan", "orchestration", "sampling")
    shares = {f"{part}_share": 0.2 for part in parts}
    return [row({"case": "mixed", "model": "tiny"}, peer, 100.0, ms_per_step=5.0, **shares)]


def write(folder, suite, rows, date="2026-01-01", commit="a" * 40, **env):
    folder.mkdir(parents=True, exist_ok=True)
    key = list(rows[0])[: list(rows[0]).index("peer")]
    env = {**ENV, "benchmark": suite, "date": date, "commit": commit, "key": key, **env}
    (folder / f"{suite}{len(list(folder.iterdir())) or ''}.json").write_text(
        json.dumps({"env": env, "rows": rows})
    )


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("bench.report.PLOTS", {})


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "cpu" / "new"
    rows = [r for n in (1024, 4096) for r in attention(n)]
    write(folder, "attention", rows, "2026-02-01", "b" * 40, roofline=ROOFLINE)
    write(folder, "decode", [r for n in (1, 4) for r in decode(n)], absent={"varlen": "GPU only"})
    write(folder, "rollout", rollout("ours, parallel"))
    write(tmp_path / "results" / "cpu" / "old", "attention", attention(77), commit="c" * 40)
    return tmp_path / "results"


def report(tmp_path, results):
    out = tmp_path / "docs" / "benchmarks.md"
    assert main(["report", str(results), "--out", str(out), "--overwrite"]) == 0
    return out.read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_pictures")
def test_each_suite_is_reported_from_the_newest_folder_that_has_it(tmp_path, results):
    text = report(tmp_path, results)
    assert "star-1,024" not in text and "| star-1024 | 1,024 |" in text and "star-77" not in text
    assert "bbbbbbbbb" in text and "ccccccccc" not in text
    assert text.index("## some CPU, 2 threads") < text.index("### attention")
    assert text.index("### attention") < text.index("### decode") < text.index("### rollout")
    assert "Roofline: a copy at 20.0 GB/s; a matrix product at 0.10 TFLOP/s in float32" in text


@pytest.mark.usefixtures("no_pictures")
def test_a_line_has_ours_its_figures_and_its_ratio_to_each_peer(tmp_path, results):
    lines = report(tmp_path, results).splitlines()
    heading = next(line for line in lines if line.startswith("| case | n | ms |"))
    assert heading.endswith("| TFLOP/s | GB/s | % of roofline | peak MB | x SDPA dense mask |")
    assert "| star-4096 | 4,096 | 16.8 ± 0.84 | 0.20 | 3.0 | 50.0 | 2.0 | 4.0 |" in lines
    # What all lines have in common stands above the table.
    assert "dtype float32; pass fwd+bwd; head dim 64; backend native." in lines


@pytest.mark.usefixtures("no_pictures")
def test_the_summary_has_a_line_for_each_suite_and_machine(tmp_path, results):
    write(results / "other", "attention", attention(512), device="other CPU", cpu="other CPU")
    text = report(tmp_path, results)
    summary = text[: text.index("## How it is measured")].splitlines()
    assert [line for line in summary if line.startswith("| ")][1:] == [
        "| attention | other CPU, 2 threads | ours | SDPA dense mask | 1 | 4.0 | 4.0 | 4.0 |",
        "| attention | some CPU, 2 threads | ours | SDPA dense mask | 2 | 4.0 | 4.0 | 4.0 |",
        "| decode | some CPU, 2 threads | ours | padded SDPA | 2 | 7.5 | 3.0 | 12.0 |",
    ]


@pytest.mark.usefixtures("no_pictures")
def test_no_table_is_wider_than_eight_columns_and_none_of_its_figures_is_lost(tmp_path):
    rows = []
    for n, dtype in itertools.product((1024, 4096), ("float32", "bfloat16")):
        of_setup = attention(n, dtype=dtype)
        key = {name: of_setup[0][name] for name in ("case", "n", "dtype", "pass", "head_dim")}
        rows += [*of_setup, *(row(key, f"peer {i}", n * (i + 2) / 1e2) for i in range(9))]
    write(tmp_path / "results", "attention", rows)
    text = report(tmp_path, tmp_path / "results")
    tables = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    assert max(map(len, tables)) == 8
    assert "| case | n |\n|---|---|\n| star-1024 | 1,024 |\n| star-4096 | 4,096 |\n" in text
    headings = [cell.strip() for table in tables if table[0] == " case " for cell in table]
    for peer in ["SDPA dense mask", *(f"peer {i}" for i in range(9))]:
        assert headings.count(f"x {peer}") == 1
    assert "| star-4096 | bfloat16 | 16.8 ± 0.84 | 0.20 |" in text


@pytest.mark.usefixtures("no_pictures")
def test_absent_peers_are_named_with_the_reason_and_how_often(tmp_path, results):
    text = report(tmp_path, results)
    assert "- FlexAttention: no backward for 1024 tokens (2 setups)" in text
    assert "- ours: triton: wants a GPU (2 setups)" in text
    assert "- varlen: GPU only" in text


@pytest.mark.usefixtures("no_pictures")
def test_a_wrong_row_is_said_to_be_wrong_and_has_no_time(tmp_path, results):
    key = {"case": "fork-1x2-8192+128", "sequences": 2, "dtype": "float32"}
    key |= {"heads": 9, "kv_heads": 3, "head_dim": 64}
    rows = [*decode(1), absent(key, "ours", "out is off", "wrong"), row(key, "padded SDPA", 1.0)]
    write(results / "cpu" / "newer", "decode", rows, "2026-03-01")
    text = report(tmp_path, results)
    assert "Not right:\n\n- ours: out is off (1 setup)" in text
    assert "fork-1x2-8192+128" not in text


@pytest.mark.usefixtures("no_pictures")
def test_files_of_one_folder_are_one_run_and_a_ratio_is_within_one_file(tmp_path, results):
    folder = results / "cpu" / "new"
    key = attention(4096)[0]
    key = {name: key[name] for name in ("case", "n", "dtype", "pass", "head_dim")}
    # On a machine twice as slow as before: the ratio to flex must not mix the two.
    rows = [row(key, "ours", 33.6, tflops=0.1), row(key, "FlexAttention", 67.2)]
    write(folder, "attention", rows, "2026-02-02", "d" * 40)
    assert "| star-4096 | 4.0 | 2.0 |" in report(tmp_path, results).splitlines()


@pytest.mark.usefixtures("no_pictures")
def test_files_from_before_there_was_a_roofline_leave_its_column_empty(tmp_path):
    write(tmp_path / "results", "attention", attention(1024))
    path = tmp_path / "results" / "attention.json"
    record = json.loads(path.read_text())
    del record["env"]["key"]
    path.write_text(json.dumps(record))
    text = report(tmp_path, tmp_path / "results")
    assert "roofline" not in text and "| star-1024 |" in text


@pytest.mark.usefixtures("no_pictures")
def test_comments_by_hand_survive(tmp_path, results, capsys):
    report(tmp_path, results)
    notes = tmp_path / "docs" / "benchmarks-notes.md"
    notes.write_text(
        "All in all.\n\n## some CPU, 2 threads\n\nOf the machine.\n\n"
        "### decode\n\nMemory *limits* it.\n\n### nothing\n\nOf no suite.\n"
    )
    texts = [report(tmp_path, results) for _ in range(2)]
    for text in texts:
        assert text.count("All in all.") == text.count("Memory *limits* it.") == 1
        assert text.index("All in all.") < text.index("## some CPU") < text.index("Of the machine.")
        assert text.index("### decode") < text.index("Memory") < text.index("fork-1x4-8192+128")
    assert "Of no suite." not in texts[1] and "Of no suite." in notes.read_text()
    assert "no results of some CPU, 2 threads nothing: left out" in capsys.readouterr().err


def test_there_is_a_picture_where_there_is_enough_for_one(tmp_path, results):
    text = report(tmp_path, results)
    images = tmp_path / "docs" / "images" / "benchmarks"
    names = {path.name for path in images.iterdir()}
    assert names == {f"some-cpu-2-threads-{s}.png" for s in ("attention", "decode", "rollout")}
    for name in names:
        assert f"](images/benchmarks/{name})" in text
        assert (images / name).read_bytes().startswith(b"\x89PNG")
    # One point is no line.
    write(tmp_path / "one", "attention", attention(1024))
    assert ".png" not in report(tmp_path / "other", tmp_path / "one")


def test_names_of_lines_keep_their_distance_and_their_order():
    heights = [0.99, 0.5, 0.98, 0.51, 0.5, 0.0]
    moved = apart(heights, gap=0.1)
    steps = [b - a for a, b in itertools.pairwise(sorted(moved))]
    assert min(steps) >= 0.1 - 1e-9 and min(moved) >= 0 and max(moved) <= 1
    assert sorted(range(6), key=moved.__getitem__) == sorted(range(6), key=heights.__getitem__)
    assert apart([0.2, 0.7], gap=0.1) == [0.2, 0.7]


def test_no_results_exit_2_with_one_line(tmp_path, capsys):
    (tmp_path / "summary.json").write_text("{}")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "x.md")]) == 2
    error = capsys.readouterr().err
    assert "holds no result" in error and error.count("\n") == 1


def test_a_document_that_is_there_is_not_overwritten_unasked(tmp_path, results, capsys):
    out = tmp_path / "b.md"
    out.write_text("by hand")
    assert main(["report", str(results), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}: there already") and error.count("\n") == 1
    assert "--overwrite" in error and out.read_text() == "by hand"


def test_backward_passes_timed_by_themselves_have_a_picture(tmp_path):
    from bench.plots import Setup, plot_attention

    def setups(*passes):
        for n in (1024, 4096):
            for what in passes:
                timed, *_ = attention(n)
                timed["pass"] = what
                yield Setup({k: timed[k] for k in ("case", "n", "dtype", "pass")}, {"ours": timed})

    assert plot_attention(list(setups("fwd", "bwd")), tmp_path / "a.png")
    assert not plot_attention(list(setups("fwd")), tmp_path / "b.png")


def test_a_ratio_of_rates_is_taken_where_calls_differ_in_work(tmp_path, no_pictures):
    key = {"case": "fork-join-1", "model": "1.7B"}
    ours = row(key, "ours, parallel", 100.0, ratios={"transformers generate": 12.5})
    write(tmp_path / "r", "engine", [ours, row(key, "transformers generate", 50.0)])
    text = report(tmp_path, tmp_path / "r")
    assert "| engine |" in text and "12" in text.split("| engine |")[1].splitlines()[0]
