"""`python -m threadweaver.generate`: what it shows, prints and refuses."""

from __future__ import annotations

import io
import json
import re
import shutil
from contextlib import redirect_stdout

import pytest
import torch
from rich.console import Console

from tests.products import ARCH, CODEC, PROMPTS, RESPONSES, product_model, save_product_model
from tests.trajectory.byte_tokenizer import byte_tokenizer
from tests.trajectory.word_tokenizer import word_tokenizer
from threadweaver.generate import GenerationSettings, display
from threadweaver.generate.__main__ import main
from threadweaver.generate.display import LiveView, PlainView
from threadweaver.generate.engine import Engine, Generation, Token
from threadweaver.generate.sampler import SamplingParams
from threadweaver.model import new_model, save_model
from threadweaver.trajectory import Codec

ESCAPED = PROMPTS[0].replace("\n", r"\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_product_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tagless(tmp_path_factory) -> str:
    """A model whose vocabulary has no tags."""
    path, tokenizer = tmp_path_factory.mktemp("tagless"), byte_tokenizer()
    save_model(new_model(tokenizer, ARCH), tokenizer, path)
    return str(path)


@pytest.fixture
def generate(folder):
    """Runs the command with greedy choices; options given later win."""

    def run(*options: str, model: str = folder) -> int:
        fixed = ["--model", model, "--temperature", "0", "--kv_gigabytes", "0.01"]
        return main(
            [*fixed, "--device", "cpu", "--precision", "fp32", "--max_tokens", "300", *options]
        )

    return run


@pytest.fixture
def refused(generate, capsys):
    """Checks that the command ends with a code and one line on stderr; returns the line."""

    def run(*options: str, code: int = 2, **others: str) -> str:
        assert generate(*options, **others) == code
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run


def every_step(monkeypatch) -> None:
    monkeypatch.setattr(display, "FRAME_SECONDS", 0)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_a_pipe_gets_the_response_and_stderr_the_figures(generate, capsys, monkeypatch, mode):
    every_step(monkeypatch)
    assert generate("--prompt", ESCAPED, "--escapes", "--mode", mode) == 0
    out, err = capsys.readouterr()
    assert out == RESPONSES[0] + "\n"
    total = len(CODEC.encode(RESPONSES[0])) + 1
    assert f" {total} " in err and "critical path" in err and "tokens/s" in err


def test_several_responses_are_each_printed_when_done(generate, capsys):
    assert generate("--prompt", PROMPTS[0], "--n", "3") == 0
    out = capsys.readouterr().out
    for number in (1, 2, 3):
        assert f"--- response {number} of 3 ---\n{RESPONSES[0]}\n" in out


@pytest.mark.parametrize("options", [["--json"], ["--json", "--n", "3"], ["--n", "3"]])
def test_how_many_responses_are_done_goes_to_stderr(generate, capsys, ticking_clock, options):
    assert generate("--prompt", PROMPTS[0], *options) == 0
    out, err = capsys.readouterr()
    n = options[-1] if "--n" in options else "1"
    lines = [line for line in err.splitlines() if line.startswith("decoding: ")]
    assert re.fullmatch(rf"decoding: 0/{n} responses, [\d,]+ tokens/s", lines[0])
    assert re.fullmatch(rf"decoding: {n}/{n} responses, [\d,]+ tokens/s, in \d+ s", lines[-1])
    assert "decoding" not in out
    if "--json" in options:
        assert len(json.loads(out)["responses"]) == int(n) and err.splitlines() == lines


def test_one_response_that_is_written_as_it_comes_needs_no_count(generate, capsys, ticking_clock):
    assert generate("--prompt", PROMPTS[0]) == 0
    out, err = capsys.readouterr()
    assert out == RESPONSES[0] + "\n" and "decoding" not in err


def test_json_holds_every_figure(generate, capsys):
    assert generate("--prompt", PROMPTS[1], "--n", "2", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prompt"] == PROMPTS[1] and result["settings"]["mode"] == "parallel"
    for response in result["responses"]:
        assert response["text"] == RESPONSES[1] and response["finished"]
        assert response["total_tokens"] == len(CODEC.encode(RESPONSES[1])) + 1
        assert response["longest_path_tokens"] < response["total_tokens"]
        assert response["longest_path_tokens"] <= response["decode_steps"] + 20
        assert (response["blocks"], response["mean_threads_per_block"]) == (1, 2)
        assert -1 < response["logprob"] < 0 and response["sampled_logprob"] == 0
        assert set(response["limits"].values()) == {0}
    assert result["seconds"] > 0 and result["tokens_per_second"] > 0
    parts = {name: s for name, s in result["seconds_in"].items() if name != "attention"}
    assert 0.5 * result["seconds"] < sum(parts.values()) <= result["seconds"]


def test_in_sequential_mode_every_token_is_on_the_longest_path(generate, capsys):
    assert generate("--prompt", PROMPTS[0], "--mode", "sequential", "--json") == 0
    [response] = json.loads(capsys.readouterr().out)["responses"]
    assert response["longest_path_tokens"] == response["total_tokens"] == response["decode_steps"]
    assert response["blocks"] == 1


def test_the_same_seed_gives_the_same_text_and_samples_differ(generate, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        options = ["--temperature", "2", "--top_p", "1", "--max_tokens", "40", "--seed", seed]
        assert generate("--prompt", "9", "--n", "2", "--json", *options) == 0
        responses = json.loads(capsys.readouterr().out)["responses"]
        texts.append([r["text"] for r in responses])
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 4


def test_a_prompt_file_is_taken_as_it_stands(generate, capsys, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPTS[0], encoding="utf-8")
    assert generate("--prompt_file", str(file)) == 0
    assert capsys.readouterr().out == RESPONSES[0] + "\n"


def test_escapes_are_read_only_when_asked_for(generate, capsys):
    prompts = []
    for options in ([], ["--escapes"]):
        arguments = ["--prompt", r"a\n\t\\n\x", "--max_tokens", "1", "--json", *options]
        assert generate(*arguments) == 0
        prompts.append(json.loads(capsys.readouterr().out)["prompt"])
    assert prompts == [r"a\n\t\\n\x", "a\n\t\\n\\x"]


def test_chat_makes_the_prompt_a_turn_of_the_template(generate, capsys, folder, tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}:"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(template)
    options = ["--prompt", "hi", "--chat", "--max_tokens", "1", "--json"]
    assert generate(*options, model=str(tmp_path)) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "<user>hi</user>:"


def test_a_template_makes_the_prompt_a_turn_whose_tags_are_text(generate, capsys, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    prompt = "a<think><Parallel>"
    options = ["--prompt", prompt, "--max_tokens", "1", "--json"]
    read = []
    for extra in ([], ["--template.use", "none"], ["--template.system", "S"]):
        assert generate(*options, *extra, model=str(tmp_path)) == 0
        read.append(json.loads(capsys.readouterr().out)["prompt"])
    assert read == [f"[{prompt}]", prompt, f"[S][{prompt}]"]
    # Nothing but what is given, without a template: what was begun is continued.
    assert generate(*options) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a\udcff"], "prompt: holds bytes that are not UTF-8"),
        (["--prompt_file", "/dev/zero"], "prompt_file: /dev/zero: is no file"),
        (["--prompt", "1", "--template.system", "S"], "template.system: the tokenizer has no chat"),
    ],
)
def test_a_prompt_that_is_no_text_is_refused(refused, options, message):
    assert message in refused(*options)


def test_a_model_without_tags_decodes_in_sequential_mode(generate, capsys, tagless):
    options = ["--prompt", "Thread", "--mode", "sequential", "--max_tokens", "5", "--json"]
    assert generate(*options, model=tagless) == 0
    [response] = json.loads(capsys.readouterr().out)["responses"]
    assert response["finished"] and response["total_tokens"] <= 5


# Interrupted, it shows what there is.


class Interrupted(Engine):
    """Ctrl-C comes after 60 steps."""

    def step(self) -> list[Token]:
        self.count = getattr(self, "count", 0) + 1
        if self.count > 60:
            raise KeyboardInterrupt
        return super().step()


def test_ctrl_c_shows_what_was_decoded(generate, capsys, monkeypatch):
    every_step(monkeypatch)
    monkeypatch.setattr("threadweaver.generate.load.Engine", Interrupted)
    assert generate("--prompt", PROMPTS[0]) == 130
    out, err = capsys.readouterr()
    assert out.startswith("<think>\n<Parallel>\n") and "interrupted" in err
    first, _, second = out.partition("<Thread>\n2: ")
    assert "<Thread>\n1: 07*6\n" in first and second.startswith("07*8\n")
    assert generate("--prompt", PROMPTS[0], "--n", "2") == 130
    both = capsys.readouterr().out
    assert both.count("<Thread>\n2: 07*8\n") == both.count(", interrupted ---") == 2
    assert generate("--prompt", PROMPTS[0], "--json") == 130
    [response] = json.loads(capsys.readouterr().out)["responses"]
    assert response["text"] + "\n" == out and not response["finished"]


# The live view.


def started(count: int) -> tuple[Engine, list[Generation]]:
    engine = Engine(product_model(), CODEC, kv_gigabytes=0.01)
    greedy = GenerationSettings(max_tokens=300, sampling=SamplingParams(temperature=0))
    ids = CODEC.encode(PROMPTS[0])
    return engine, [engine.add(ids, greedy) for _ in range(count)]


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("count", [1, 3])
def test_threads_stand_side_by_side_while_they_decode(monkeypatch, width, count):
    every_step(monkeypatch)
    engine, generations = started(count)
    console = Console(file=io.StringIO(), width=width, height=30, force_terminal=True)
    view = LiveView(generations, CODEC, console)
    frames = []

    def look(tokens: list[Token]) -> None:
        view.update(tokens)
        screen = Console(file=io.StringIO(), width=width, height=30)
        screen.print(view._live.get_renderable())
        frames.append(screen.file.getvalue().splitlines())  # pyright: ignore[reportAttributeAccessIssue]

    with view:
        engine.run(look)
    assert all(len(frame) <= 30 for frame in frames)
    assert all(len(line) <= width for frame in frames for line in frame)
    side_by_side = [
        frame for frame in frames if any("thread 1," in x and "thread 2," in x for x in frame)
    ]
    assert len(side_by_side) > 40
    shown = "\n".join(side_by_side[-1])
    assert "1: times 6" in shown and " 07*6 " in shown and " 07*8 " in shown
    assert "thread 1," not in "\n".join(frames[-1])
    assert ("response 3" in shown) == (count == 3)
    assert console.file.getvalue().count(RESPONSES[0]) == count  # pyright: ignore[reportAttributeAccessIssue]


def test_more_threads_than_fit_are_left_out_and_the_view_keeps_its_height():
    engine, [generation] = started(1)
    while len(generation.open) < 2:
        engine.step()
    for width, height in ((80, 24), (20, 8)):
        console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
        view = LiveView([generation], CODEC, console)
        screen = console.render_lines(view._frame(1.0))
        assert len(screen) <= height


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    engine, file = Engine(product_model(), CODEC, kv_gigabytes=0.01), io.StringIO()
    script = {(0,): CODEC.encode("\x1b[2J\x07\x7f\x9b2Jok")}
    generation = engine.add([1], GenerationSettings(mode="sequential"), script=script)
    with LiveView([generation], CODEC, Console(file=file, width=80)):
        engine.run()
    assert not {"\x1b", "\x7f", "\x9b"} & set(file.getvalue())
    assert "␛[2J␇␡\ufffd2Jok" in file.getvalue()


def test_a_character_of_several_tokens_is_written_whole(monkeypatch):
    every_step(monkeypatch)
    engine = Engine(product_model(), CODEC, kv_gigabytes=0.01)
    text = "añ€😀b"
    ids = CODEC.encode(text)
    assert len(ids) == 11
    script = {(0,): [*ids, CODEC.eos_id]}
    generation = engine.add([1], GenerationSettings(mode="sequential"), script=script)
    file, parts = io.StringIO(), []
    view = PlainView([generation], CODEC, file)

    def look(tokens: list[Token]) -> None:
        view.update(tokens)
        parts.append(file.getvalue())

    with redirect_stdout(file), view:
        engine.run(look)
    assert all(text.startswith(part) for part in parts)
    assert "añ" in parts and file.getvalue() == text + "\n"


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_pipe_gets_every_space_and_character_however_many_tokens_a_frame_has(monkeypatch, steps):
    every_step(monkeypatch)
    codec = Codec.without_tags(word_tokenizer())
    engine = Engine(product_model(), codec, kv_gigabytes=0.01)
    text = "a big  world. big 😀€ world  .  "
    ids = codec.encode(text)
    assert codec.decode(ids) == text
    settings = GenerationSettings(mode="sequential")
    generation = engine.add([1], settings, script={(0,): [*ids, codec.eos_id]})
    file, parts = io.StringIO(), []
    view = PlainView([generation], codec, file)

    def look(tokens: list[Token]) -> None:
        if len(parts) % steps == 0:
            view.update(tokens)
        parts.append(file.getvalue())

    with redirect_stdout(file), view:
        engine.run(look)
    assert all(text.startswith(part) for part in parts)
    assert len(set(parts)) > 3 and file.getvalue() == text + "\n"


# Bad input: exit code 2, one line, what was wrong and what to do.


def test_a_path_without_a_model_is_named(refused):
    assert "no/such: no model here" in refused("--prompt", "1", model="no/such")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_model_is_named(refused, folder, tmp_path, file):
    shutil.copytree(folder, tmp_path / "model")
    damaged = tmp_path / "model" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    line = refused("--prompt", "1", model=str(tmp_path / "model"))
    assert f"error: {damaged}: " in line


def test_a_table_that_ends_before_the_last_id_of_the_tokenizer_is_refused(refused, tmp_path):
    save_model(new_model(word_tokenizer(), ARCH), word_tokenizer(gap=100), tmp_path)
    line = refused("--prompt", "a", "--mode", "sequential", model=str(tmp_path))
    assert "the tokenizer has ids up to 363, and the embedding 320 rows" in line


def test_parallel_mode_without_tags_names_the_command_that_adds_them(refused, tagless):
    line = refused("--prompt", "1", model=tagless)
    assert "python -m threadweaver.add_tags --model MODEL --out FOLDER" in line


def test_chat_without_a_template_is_refused(refused):
    assert "no chat template" in refused("--prompt", "1", "--chat")


def test_a_prompt_longer_than_the_context_is_refused(refused):
    line = refused("--prompt", "1" * 1024)
    assert "the prompt has 1024 tokens, and the model's context ends at 1024" in line


def test_a_pool_too_small_for_one_sequence_is_refused(refused):
    line = refused("--prompt", "1", "--kv_gigabytes", "0.00005")
    assert "the pool has" in line and "kv_gigabytes" in line
    assert "kv_gigabytes is 0.0" in refused("--prompt", "1", "--kv_gigabytes", "0")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", "-1"),
        ("temperature", ".nan"),
        ("top_p", "0"),
        ("top_k", "0"),
        ("min_p", "2"),
        ("max_tokens", "0"),
        ("max_depth", "0"),
        ("max_thread_tokens", "0"),
        ("max_sequences", "0"),
        ("max_batch_tokens", "0"),
        ("page_size", "0"),
        ("n", "0"),
        ("n", "1" + 23 * "0"),
        ("kv_gigabytes", "1e9"),
        ("kv_gigabytes", "nan"),
        ("max_sequences", "1" + 23 * "0"),
        ("n", "many"),
        ("mode", "both"),
        ("dtype", "int8"),
    ],
)
def test_a_setting_out_of_range_is_named(refused, option, value):
    assert option in refused("--prompt", "1", f"--{option}={value}")


def test_a_typo_names_the_nearest_option(refused):
    assert "did you mean 'max_tokens'?" in refused("--prompt", "1", "--max_token", "3")


def test_one_prompt_and_no_more_is_needed(refused, tmp_path):
    assert "exactly one" in refused()
    assert "exactly one" in refused("--prompt", "1", "--prompt_file", "f")
    assert "none.txt" in refused("--prompt_file", str(tmp_path / "none.txt"))
    assert "the prompt is empty" in refused("--prompt", "")


def test_cuda_without_a_gpu_is_refused(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device: no CUDA device here" in refused("--prompt", "1", "--device", "cuda")


def test_logits_that_are_not_finite_end_with_the_request_named(refused, folder, tmp_path):
    from threadweaver.model import load_model

    model, tokenizer = load_model(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[CODEC.encode("9")] = torch.nan  # pyright: ignore
    save_model(model, tokenizer, tmp_path)
    line = refused("--prompt", "99", "--json", model=str(tmp_path), code=1)
    assert "generation 0, request (0,)" in line and "not finite" in line
