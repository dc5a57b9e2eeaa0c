"""Bad inputs by kind, over all commands: `make(place, seed, index)` is one of them, always the
same."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

from tests.fuzz import data
from tests.fuzz.place import SAMPLED, Place
from tests.fuzz.settings import TEXTS, is_large, means, value
from tests.fuzz.verdict import Input, Outcome
from tests.model.test_load import CONTENTS, FIELDS, FILES, INDICES, WEIGHTS, change, change_weights
from threadweaver.evaluate.options import build_parser as eval_parser
from threadweaver.generate.__main__ import _parser as generate_parser
from threadweaver.train.config import parser_of
from threadweaver.train.stages import PipelineConfig, RLConfig, SelfTrainConfig, SFTConfig

KINDS = {kind.command: kind for kind in (SFTConfig, SelfTrainConfig, RLConfig, PipelineConfig)}


def make(place: Place, seed: int, index: int, folder: Path) -> Input:
    """Input `index`, its files in a new folder."""
    rng = Random(f"{seed}/{index}")
    folder.mkdir(parents=True)
    kinds: dict[Callable[[Random, Place, Path], Input], int] = {
        train_settings: 8,
        decode_settings: 5,
        task_settings: 3,
        unknown_arguments: 3,
        contradictions: 3,
        config_files: 6,
        data_files: 10,
        model_folders: 6,
        prompts: 5,
        resumed_runs: 4,
        results: 4,
    }
    return rng.choices([*kinds], [*kinds.values()])[0](rng, place, folder)


# What accepted inputs must have come to.


def _trained(run_dir: Path, dropped: int = 0) -> Callable[[Outcome], str | None]:
    def effect(outcome: Outcome) -> str | None:
        summary = json.loads((run_dir / "summary.json").read_text())
        own = run_dir / "rl" if (run_dir / "rl").is_dir() else run_dir
        steps = len((own / "metrics.jsonl").read_text().splitlines())
        if not Path(summary["checkpoint"]).is_dir():
            return "no checkpoint"
        asked = yaml.safe_load((own / "config.yaml").read_text())["optimization"]
        asked = asked.get("steps") or asked["max_steps"]
        if asked is not None and steps != asked:
            return f"{steps} steps in metrics.jsonl, {asked} asked"
        if f"{dropped} malformed" not in outcome.stdout and dropped:
            return f"{dropped} malformed rows are not counted"
        return None

    return effect


def _decoded(n: int, out: Path | None = None) -> Callable[[Outcome], str | None]:
    def effect(outcome: Outcome) -> str | None:
        record = json.loads(outcome.stdout)
        found = len(record["responses"])
        return None if found == n else f"{found} responses, {n} asked"

    return effect


# Settings, one at a time.


def _below(folder: Path, name: str) -> str:
    """A path that ends in this name; without it one of the system's may be written."""
    return str(folder / "deep" / name.strip("/"))


@cache
def _train_defaults(kind: str) -> dict[str, Any]:
    defaults = parser_of(KINDS[kind]).get_defaults()
    return {name: defaults[name] for name in [*defaults.keys()] if name not in ("config", "resume")}


@cache
def _decode_defaults(command: str) -> dict[str, Any]:
    defaults = (generate_parser if command == "generate" else eval_parser)().get_defaults()
    return {name: defaults[name] for name in [*defaults.keys()]}


def _kind(rng: Random) -> str:
    return rng.choices([*KINDS], [4, 3, 3, 2])[0]


# What a run may change of what it was given: other names, and what depends on the machine.
RESOLVED = re.compile(r"precision|evaluate\.(max_new_tokens|batch_size|kv_gigabytes)|run_dir")


def train_settings(rng: Random, place: Place, folder: Path) -> Input:
    kind = _kind(rng)
    defaults = _train_defaults(kind)
    run_dir = folder / "run"
    name = rng.choice([*defaults])
    given, must = value(rng, defaults[name])
    if name.startswith("model.") or name == "run_dir":
        must = None
    if name == "run_dir":
        given = _below(folder, given)
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(place.settings(kind, run_dir)))
    arguments = [kind, f"--config={config}"]
    arguments += [f"--{name}", given] if rng.random() < 0.3 else [f"--{name}={given}"]
    trained = _trained(run_dir)

    def effect(outcome: Outcome) -> str | None:
        saved = yaml.safe_load((run_dir / "config.yaml").read_text())
        if not RESOLVED.search(name):
            for part in name.split("."):
                saved = saved[part]
            if not means(given, saved):
                return f"{name} was {given!r} and became {saved!r}"
        return trained(outcome)

    return Input(
        f"setting {name}={given!a}"[:300],
        "train",
        arguments,
        must=must,
        # Self-training may find nothing to keep, whatever else it was told.
        names=(*name.split("."), "option", "evaluate", given[:30], "kept none"),
        endless=is_large(given) or name.endswith("generation.max_tokens"),
        effect=effect if name != "run_dir" else lambda outcome: None,
        unbegun=run_dir / "config.yaml",
    )


def decode_settings(rng: Random, place: Place, folder: Path) -> Input:
    command = rng.choice(["generate", "eval"])
    defaults = _decode_defaults(command)
    name = rng.choice([n for n in defaults if n not in ("prompt", "prompt_file", "model")])
    given, must = value(rng, defaults[name])
    model = rng.choice([place.model, place.chat_model])
    out = folder / "out.json"
    arguments = [f"--model={model}", *SAMPLED]
    if command == "generate":
        arguments += ["--prompt=3*4=?", "--json"]
    else:
        arguments += [f"--task={place.data}", "--n=1", f"--json={out}"]
        arguments += ["--task_options={held_out: 1, whole_numbers: true}"]
    flags = ("json", "escapes", "chat") if command == "generate" else ("chat",)
    if name in flags:
        # A flag takes no value.
        must = "refuse" if given else None
    arguments.append(f"--{name}={given}")

    def effect(outcome: Outcome) -> str | None:
        if command == "generate":
            n = int(float(given)) if name == "n" else 1
            return _decoded(n)(outcome)
        if name == "json":
            return None
        record = json.loads(out.read_text())
        return None if record["parallel" if name != "mode" else given] else "no figures"

    names = {"dtype": ("dtype", "precision")}.get(name, (name.rpartition(".")[2],))
    return Input(
        f"setting {name}={given!a}"[:300],
        command,
        arguments,
        must=must,
        names=(*names, given[:30], *(["unrecognized"] if name in flags else [])),
        writes=given if name in ("json", "responses") else "",
        endless=is_large(given),
        effect=effect,
    )


def task_settings(rng: Random, place: Place, folder: Path) -> Input:
    out = folder / "out"
    command = rng.choice(["multiplication", "write"])
    defaults: dict[str, Any] = {"train": 7, "validation": 5, "seed": 0, "format": None, "out": None}
    if command == "multiplication":
        defaults |= {"digits": 2, "factors": 2, "parallel_share": 1.0}
        arguments = [command, f"--out={out}", "--train=4", "--validation=2"]
    else:
        defaults |= {"task": None, "options": None, "parallel": True}
        arguments = [
            command,
            f"--out={out}",
            "--train=4",
            "--validation=2",
            "--task=multiplication",
        ]
    name = rng.choice([*defaults])
    given, must = value(rng, defaults[name])
    if name == "format":
        must = "refuse" if given not in ("jsonl", "parquet") else None
    if name == "out":
        given = _below(folder, given)
    arguments.append(f"--{name}={given}")

    def effect(outcome: Outcome) -> str | None:
        if name in ("out", "format"):
            return None
        for half, count in (("train", 4), ("validation", 2)):
            wanted = int(float(given)) if name == half else count
            found = len((out / f"{half}.jsonl").read_text().split("\n")) - 1
            if found != wanted:
                return f"{found} rows of {half}, {wanted} asked"
        return None

    return Input(
        f"setting {command} {name}={given!a}"[:300],
        "tasks",
        arguments,
        must=must,
        names=(name, "option", given[:30]),
        endless=is_large(given),
        effect=effect,
        unbegun=out / "train.jsonl",
    )


# Arguments.


def _good(rng: Random, place: Place, folder: Path, command: str) -> list[str]:
    """Arguments that nothing is wrong with."""
    if command == "train":
        kind = _kind(rng)
        config = folder / "settings.yaml"
        config.write_text(yaml.safe_dump(place.settings(kind, folder / "run")))
        return [kind, f"--config={config}"]
    if command == "tasks":
        return ["multiplication", f"--out={folder / 'out'}", "--train=4", "--validation=2"]
    if command == "add_tags":
        return [f"--model={place.model}", f"--out={folder / 'out'}"]
    if command == "bench":
        return ["list"]
    if command == "generate":
        return [f"--model={place.model}", *SAMPLED, "--prompt=3*4=?", "--json"]
    options = "{held_out: 1, whole_numbers: true}"
    return [
        *(f"--model={place.model}", *SAMPLED, f"--task={place.data}", "--n=1"),
        *(f"--task_options={options}", f"--json={folder / 'out.json'}"),
    ]


COMMANDS = ["train", "generate", "eval", "tasks", "add_tags", "bench"]


def unknown_arguments(rng: Random, place: Place, folder: Path) -> Input:
    command = rng.choice(COMMANDS)
    good = _good(rng, place, folder, command)
    at = rng.randrange(len(good))
    what = rng.randrange(6)
    must: Any = "refuse"
    if what == 0:
        bad = rng.choice(["--no_such=1", "--", "-x", "--=", "--é=1", "--no.such=3", "---", "--a b"])
        arguments = [*good, bad]
        must = None if bad == "--" else must
    elif what == 1:
        good = [*good, "--device=cpu"] if command == "bench" else good
        i = rng.choice([i for i, a in enumerate(good) if a.startswith("--")])
        name, equals, rest = good[i].partition("=")
        cut = rng.randrange(3, len(name))
        arguments = [*good]
        arguments[i] = name[:cut] + name[cut + 1 :] + equals + rest
    elif what == 2:
        arguments = [*good, rng.choice(["stray", "", "é", "\ud800", "{}", "3", "\n", "[/b]"])]
    elif what == 3:
        arguments, must = [], "refuse"
    elif what == 4:
        arguments = [a for i, a in enumerate(good) if i != at]
        must = None
    else:
        arguments = [rng.choice(TEXTS), *good]
        must = None
    return Input(f"arguments {arguments!a}"[:600], command, arguments, must=must, endless=True)


def contradictions(rng: Random, place: Place, folder: Path) -> Input:
    run = folder / "run"
    cases: list[tuple[str, list[str], tuple[str, ...]]] = [
        ("generate", ["--prompt_file=/dev/null"], ("prompt",)),
        ("generate", ["--chat"], ("chat",)),
        ("generate", ["--template.system=s"], ("system", "template")),
        ("generate", ["--prompt=" + "1" * 600], ("prompt", "context")),
        ("generate", ["--max_batch_tokens=0"], ("max_batch_tokens",)),
        ("generate", ["--model=/dev/null"], ("/dev/null",)),
        ("generate", ["--kv_gigabytes=1e-9"], ("kv_gigabytes",)),
        ("generate", ["--device=cuda"], ("device", "cuda")),
        ("eval", ["--n=9"], ("9",)),
        ("eval", ["--task=multiplication"], ("option",)),
        ("eval", ["--task_options={held_out: 0}"], ("held_out",)),
        ("eval", ["--task_options={held_out: a}"], ("held_out",)),
        ("eval", ["--task_options={seconds: -1}"], ("seconds",)),
        ("eval", ["--chat"], ("chat",)),
        ("eval", ["--json=/"], ("json",)),
        ("eval", [f"--json={folder}/no/such"], ("json",)),
        ("eval", ["--responses=/dev"], ("responses",)),
        ("tasks", ["--digits=1", "--train=4000"], ("4000",)),
        ("tasks", [f"--out={place.data}"], ("out",)),
        ("tasks", [f"--out={place.data}/x"], ("out",)),
        ("tasks", ["--train=0"], ("train",)),
        ("tasks", ["--format=csv"], ("format",)),
        ("add_tags", [f"--out={place.data}"], ("out",)),
        ("add_tags", [f"--out={place.root}"], ("out",)),
        ("add_tags", ["--model="], ("model",)),
        ("train", ["--resume"], ("run_dir",)),
        ("train", ['--model.arch={"model_type": "qwen3"}'], ("model.arch",)),
        ("train", [f"--run_dir={place.data}"], ("run_dir",)),
        ("train", [f"--run_dir={place.data}/x"], ("run_dir",)),
        ("train", ["--run_dir=/proc/x"], ("run_dir",)),
        ("train", ["--compute.device=cuda"], ("device",)),
        ("train", ["--report.trackers=[no]"], ("trackers",)),
        ("train", ["--model.path=/dev/null"], ("model.path",)),
        ("train", ["--template.system=s"], ("system", "template")),
        ("bench", ["--device=cuda"], ("device",)),
        ("bench", ["--device=tpu"], ("device",)),
    ]
    command, more, names = rng.choice(cases)
    arguments = [*_good(rng, place, folder, command), *more]
    unbegun = run / "config.yaml" if command == "train" else None
    kind = f"contradiction {command} {arguments[0]} {more}"
    must = None if torch.cuda.is_available() and "cuda" in more[0] else "refuse"
    return Input(kind[:200], command, arguments, must=must, names=names, unbegun=unbegun)


# Config files.


def config_files(rng: Random, place: Place, folder: Path) -> Input:
    kind = _kind(rng)
    run_dir, path = folder / "run", folder / "settings.yaml"
    settings = place.settings(kind, run_dir)
    what = rng.choice(["values", "values", "keys", "text", "text", "file"])
    must: Any = None
    names: tuple[str, ...] = ()
    endless = False
    if what == "values":
        owner, key = rng.choice(_owners(settings))
        text, _ = value(rng, rng.choice([None, 1, 1.0, {}, []]))
        new = rng.choice(
            [text, None, 3, -1, 1.5, [], {}, [[]], {"a": 1}, True, float("nan"), 10**30]
        )
        kind_of_change = f"{key}: {new!a}"
        owner[key] = new
        names = (str(key), *(str(k) for k in settings), "kept none")
        endless = isinstance(new, int) or is_large(str(new))
        path.write_text(yaml.safe_dump(settings, allow_unicode=True), errors="surrogatepass")
    elif what == "keys":
        owner, key = rng.choice(_owners(settings))
        new: Any = rng.choice(
            ["", "no_such", 3, None, True, "é", "a.b", "__class__", f"{key}x", "init_args"]
        )
        owner[new] = rng.choice([1, {}, None, "x"])
        kind_of_change = f"key {new!a} beside {key}"
        path.write_text(yaml.safe_dump(settings))
    elif what == "text":
        # Where the run goes is not to be damaged: another run may be there.
        text = yaml.safe_dump({**settings, "run_dir": None})
        name, damaged, must = _damaged_text(rng, text)
        kind_of_change = f"text: {name}"
        path.write_bytes(damaged)
        names = ("settings.yaml", "config", "seed", "no_such", place.data.name, "folder", *settings)
    else:
        name = rng.choice(
            ["missing", "folder", "empty", "null", "list", "binary", "loop", "number"]
        )
        kind_of_change = f"file: {name}"
        must, names = "refuse", ("settings.yaml", "run_dir", "model", "data", "config")
        if name == "folder":
            path.mkdir()
        elif name == "loop":
            path.symlink_to(path)
        elif name != "missing":
            contents = {"empty": b"", "null": b"null", "list": b"- 1\n- a: 2\n", "number": b"3"}
            path.write_bytes(contents.get(name) or rng.randbytes(500) * (name == "binary"))
    return Input(
        f"config of {kind}: {kind_of_change}"[:300],
        "train",
        [kind, f"--config={path}", *([f"--run_dir={run_dir}"] if what == "text" else [])],
        must=must,
        names=names,
        endless=endless,
        effect=_trained(run_dir),
        unbegun=run_dir / "config.yaml",
    )


def _owners(settings: dict[str, Any]) -> list[tuple[dict[str, Any], Any]]:
    """Every (dictionary, key) in nested settings; not what says where files go."""
    found = []
    for key, inner in settings.items():
        if key != "run_dir":
            found.append((settings, key))
        if isinstance(inner, dict):
            found += _owners(inner)
    return found


def _damaged_text(rng: Random, text: str) -> tuple[str, bytes, Any]:
    raw = text.encode()
    at = rng.randrange(len(raw))
    lines = text.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    laughs = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 12))
    cases: dict[str, tuple[bytes, Any]] = {
        "cut": (raw[:at], None),
        "byte": (raw[:at] + rng.randbytes(1) + raw[at + 1 :], None),
        "tab": (raw[:at] + b"\n\t" + raw[at:], None),
        "utf-16": (text.encode("utf-16"), None),
        "mark": (b"\xef\xbb\xbf" + raw, None),
        "not utf-8": (raw + b"x: \xff\n", "refuse"),
        "nul": (raw + b"\0", "refuse"),
        "twice": ((text + lines[0]).encode(), None),
        "line twice": ("".join([*lines[: i + 1], *lines[i:]]).encode(), None),
        "object": (raw + b"seed: !!python/object/apply:os.system ['touch ran']\n", "refuse"),
        "tag": (raw + b"seed: !mine 3\n", "refuse"),
        "alias": (raw + b"seed: *nothing\n", "refuse"),
        "laughs": (raw + b"x0: &x0 lol\n" + laughs.encode(), "refuse"),
        "itself": (raw + b"seed: &a [*a]\n", "refuse"),
        "deep": (raw + b"seed: " + b"[" * 2000 + b"]" * 2000 + b"\n", "refuse"),
        "documents": (raw + b"---\na: 1\n", "refuse"),
        "indent": (
            "".join(f" {line}" if n == i else line for n, line in enumerate(lines)).encode(),
            None,
        ),
        "merge": (raw + b"<<: {no_such: 1}\n", "refuse"),
        "large": (raw + b"seed: " + b"9" * 10_000 + b"\n", "refuse"),
        "long": (raw + b"seed: " + b"x" * 1_000_000 + b"\n", "refuse"),
        "date": (raw + b"seed: 2026-01-01\n", "refuse"),
        "json": (json.dumps(yaml.safe_load(text)).encode(), "accept"),
        "crlf": (text.replace("\n", "\r\n").encode(), "accept"),
        "comment": (b"# \xc3\xa9\n" + raw, "accept"),
    }
    name = rng.choice([*cases])
    return name, *cases[name]


# Data files.


def data_files(rng: Random, place: Place, folder: Path) -> Input:
    made = data.damaged(rng, place.rows, folder / "data")
    reader = rng.choices(["sft", "eval", "tasks", "rl", "self-train"], [5, 3, 3, 1, 1])[0]
    # What names the file, as a line shows it.
    name = Path(made.path).name
    names = (" ".join(made.path.split())[:100], name[:20], "data")
    if reader == "sft":
        settings = place.settings("sft", folder / "run")
        settings["data"]["train"] = made.path
        must = made.trajectories
        if made.malformed and rng.random() < 0.5:
            settings["data"]["malformed"], must = "drop", "accept"
        config = folder / "settings.yaml"
        config.write_text(yaml.safe_dump(settings))
        trained = _trained(folder / "run", made.malformed)

        def effect(outcome: Outcome) -> str | None:
            if must == "accept" and f"{made.rows:,} rows" not in " ".join(outcome.stdout.split()):
                return f"{made.rows} rows are not counted"
            return trained(outcome)

        return Input(
            *(f"data of sft: {made.name}", "train", ["sft", f"--config={config}"], must, names),
            effect=effect,
            unbegun=folder / "run" / "config.yaml",
        )
    must = made.problems
    options = {"held_out": 1 if reader == "eval" else 0.5, "whole_numbers": True}
    if reader == "eval":
        out = folder / "out.json"
        responses = folder / "responses.jsonl"

        def graded(outcome: Outcome) -> str | None:
            found = len(responses.read_text().split("\n")) - 1
            return None if found == made.rows or must is None else f"{found} of {made.rows} rows"

        arguments = [
            *(f"--model={place.model}", *SAMPLED, f"--task={made.path}"),
            *(f"--task_options={json.dumps(options)}", f"--json={out}", f"--responses={responses}"),
        ]
        return Input(f"data of eval: {made.name}", "eval", arguments, must, names, effect=graded)
    if must == "accept":
        must = None  # which rows are held out depends on their texts
    if reader == "tasks":
        out = folder / "out"

        def written(outcome: Outcome) -> str | None:
            counts = [len((out / f"{h}.jsonl").read_text().split("\n")) - 1 for h in HALVES]
            return None if counts == [1, 1] else f"{counts} rows written, 1 and 1 asked"

        arguments = ["write", f"--out={out}", "--train=1", "--validation=1", f"--task={made.path}"]
        arguments.append(f"--options={json.dumps(options)}")
        return Input(
            *(f"data of tasks: {made.name}", "tasks", arguments, must, (*names, "task")),
            effect=written,
            unbegun=out / "train.jsonl",
        )
    settings = place.settings(reader, folder / "run")
    settings["task"] = {"name": made.path, "options": options}
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    return Input(
        *(f"data of {reader}: {made.name}", "train", [reader, f"--config={config}"], must),
        names=(*names, "task", "kept"),
        effect=_trained(folder / "run"),
        unbegun=folder / "run" / "config.yaml",
    )


HALVES = ("train", "validation")


# Models on disk.


def model_folders(rng: Random, place: Place, folder: Path) -> Input:
    model = Path(shutil.copytree(rng.choice([place.model, place.chat_model]), folder / "model"))
    must: Any = "refuse"
    what = rng.randrange(8)
    if what == 0:
        file, content = rng.choice([*FILES, "model.safetensors"]), rng.choice([*CONTENTS])
        (model / file).write_bytes(CONTENTS[content])
        change_made = f"{file} {content}"
    elif what == 1:
        file = rng.choice([*FILES, "model.safetensors"])
        whole = (model / file).read_bytes()
        (model / file).write_bytes(whole[: rng.randrange(len(whole) - 1)])
        change_made = f"{file} cut"
    elif what == 2:
        file = rng.choice([*FILES[1:], "model.safetensors"])
        (model / file).unlink()
        (model / file).mkdir()
        change_made = f"{file} a folder"
    elif what == 3:
        file = rng.choice(["config.json", "tokenizer.json", "model.safetensors"])
        (model / file).unlink()
        change_made = f"no {file}"
    elif what == 4:
        file, fields, _ = rng.choice(FIELDS)
        change(model / file, **fields)
        change_made, must = f"{file} {fields}", None
    elif what == 5:
        i = rng.randrange(len(WEIGHTS))
        # Names in that table are those of another size of model: here some change nothing.
        change_weights(model, WEIGHTS[i][0])
        change_made, must = f"weights {i}", None
    elif what == 6:
        (model / "model.safetensors").unlink()
        index, _ = rng.choice(INDICES)
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        change_made = f"index {index}"
    else:
        file = rng.choice(FILES)
        fields = json.loads((model / file).read_text())
        name = rng.choice([*fields])
        new = rng.choice([None, 0, -1, 10**30, 1.5, "x", "", [], {}, [1], {"a": 1}, True, [[]]])
        change(model / file, **{name: new})
        change_made, must = f"{file} {name}={new!r}", None
    command = rng.choice(["generate", "eval", "add_tags", "train"])
    given = _good(rng, place, folder, command)
    if command == "train":
        given = [rng.choice(["sft", "rl"])]
        config = folder / "settings.yaml"
        settings = place.settings(given[0], folder / "run")
        config.write_text(yaml.safe_dump(settings))
        given += [f"--config={config}", f"--model.path={model}"]
    else:
        given.append(f"--model={model}")
    return Input(
        f"model of {command}: {change_made}"[:300],
        command,
        given,
        must=must,
        # A config without what the model is generated with, say, may be refused by what follows.
        names=("model", str(model)),
        effect=_decoded(1) if command == "generate" else lambda outcome: None,
        unbegun=folder / ("out" if command == "add_tags" else "run/config.yaml"),
    )


# Prompts.

PIECES = [
    *(
        "3*4=?",
        "\n",
        "\r\n",
        " ",
        "\u202e",
        "é☃",
        "\U0001f600",
        "\0",
        "\x1b[2J",
        "<think>",
        "</think>",
    ),
    *("<Parallel>", "</Parallel>", "<Thread>", "<Outline>1: a</Outline>", "<|im_start|>system\n"),
    *("<|im_end|>", "<|endoftext|>", "[INST]", "\\boxed{1}", "\\n", "{}", "%s", "[bold]", "\ufeff"),
    *("<eos>", "a" * 100, "1" * 50, "\x7f", "\u2028", "\ufffe", "{{ 1 }}", "{% for %}"),
]


def prompts(rng: Random, place: Place, folder: Path) -> Input:
    model = rng.choice([place.model, place.chat_model])
    text = "".join(rng.choices(PIECES, k=rng.randrange(6)))
    arguments = [f"--model={model}", *SAMPLED, "--json"]
    n = rng.choice([1, 1, 3])
    must: Any = None
    names: tuple[str, ...] = ("prompt",)
    file = folder / "prompt.txt"
    what = rng.randrange(6)
    if what == 0:
        file.write_text(text, newline="")
        arguments.append(f"--prompt_file={file}")
    elif what == 1:
        name = rng.choice(
            ["missing", "folder", "binary", "half", "device", "loop", "empty", "long"]
        )
        must, names = "refuse", ("prompt",)
        if name == "folder":
            file.mkdir()
        elif name == "binary":
            file.write_bytes(b"\xff" + rng.randbytes(50))
        elif name == "half":
            file.write_bytes("1\ud800".encode(errors="surrogatepass"))
        elif name == "device":
            file = Path(rng.choice(["/dev/null", "/dev/zero", "/dev/tty"]))
        elif name == "loop":
            file.symlink_to(file)
        elif name == "empty":
            file.write_bytes(b"")
            must = None
        elif name == "long":
            file.write_text("1" * 100_000)
        text = name
        arguments.append(f"--prompt_file={file}")
    elif what == 2:
        text += rng.choice(["\ud800", "\udcff", "\udfff\ud800"]) + text
        must = "refuse"
        arguments.append(f"--prompt={text}")
    else:
        arguments.append(f"--prompt={text}")
    if rng.random() < 0.3:
        arguments.append(rng.choice(["--escapes", "--template.use=none", "--mode=sequential"]))
    if model == place.chat_model and rng.random() < 0.4:
        system = rng.choice([*PIECES, "\ud800", ""])
        arguments.append(f"--template.system={system}")
        names += ("system",)
        must = "refuse" if "\ud800" in system else must
    return Input(
        f"prompt {text!a}, {arguments[-1]!a}"[:300],
        "generate",
        [*arguments, f"--n={n}"],
        must=must,
        names=names,
        effect=_decoded(n),
    )


# Runs that go on.


def resumed_runs(rng: Random, place: Place, folder: Path) -> Input:
    run_dir = folder / "run"
    arguments, weights = place.run_to_resume(rng.choice(["sft", "rl"]), run_dir)
    files = sorted(p for p in run_dir.rglob("*") if p.is_file() and p.stat().st_size)
    file = rng.choice([*files, *files, *run_dir.rglob("trainer_state.pt")])
    whole = file.read_bytes()
    what = rng.choice(
        ["empty", "cut", "random", "folder", "gone", "null", "byte", "other", "twice"]
    )
    if what == "gone":
        file.unlink()
    elif what == "folder":
        file.unlink()
        file.mkdir()
    elif what == "other":
        if file.suffix == ".pt":
            state = torch.load(file, weights_only=True)
            name = rng.choice([*state])
            state[name] = rng.choice([None, "x", [], {}, -1, torch.zeros(3)])
            what = f"other {name}"
            torch.save(rng.choice([state, [], {}, 3]), file)
        else:
            file.write_bytes(rng.choice([b"[]", b"{}", b"3", b"- 1", b'{"step": "x"}\n', b"\n\n"]))
    else:
        at = rng.randrange(len(whole))
        contents = {
            "empty": b"",
            "cut": whole[:at],
            "random": rng.randbytes(len(whole)),
            "null": b"null",
            "byte": whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :],
            "twice": whole + whole,
        }
        file.write_bytes(contents[what])

    def effect(outcome: Outcome) -> str | None:
        summary = json.loads((run_dir / "summary.json").read_text())
        found = (Path(summary["checkpoint"]) / "model.safetensors").read_bytes()
        # One byte of the weights is other weights, which nothing can know.
        known = what == "byte" and file.suffix in (".safetensors", ".pt", ".json")
        return None if known or found == weights else "other weights than without the damage"

    return Input(
        f"run of {arguments[0]}: {file.relative_to(run_dir)} {what}",
        "train",
        arguments,
        names=(file.name, run_dir.name + "/"),
        effect=effect,
    )


# Results of benchmarks.


def results(rng: Random, place: Place, folder: Path) -> Input:
    before = place.results(folder / "before")
    after = Path(shutil.copytree(before, folder / "after"))
    file = after / "layout.json"
    what = rng.randrange(4)
    name = ""
    if what == 0:
        content = rng.choice([*CONTENTS])
        file.write_bytes(CONTENTS[content])
        name = content
    elif what == 1:
        record = json.loads(file.read_text())
        owner, key = rng.choice(
            [*_owners(record), *(o for row in record["rows"] for o in _owners(row))]
        )
        owner[key] = rng.choice([None, 0, -1, "x", "", [], {}, [1], {"a": 1}, True, float("nan")])
        name = f"{key}={owner[key]!r}"
        file.write_text(json.dumps(record))
    elif what == 2:
        record = json.loads(file.read_text())
        owner, key = rng.choice(
            [*_owners(record), *(o for row in record["rows"] for o in _owners(row))]
        )
        del owner[key]
        name = f"no {key}"
        file.write_text(json.dumps(record))
    else:
        file.unlink()
        name = rng.choice(["folder", "gone", "loop", "fifo"])
        if name == "folder":
            file.mkdir()
        elif name == "loop":
            file.symlink_to(file)
        elif name == "fifo":
            os.mkfifo(file)
    command = rng.choice(["compare", "compare", "report", "run", "profile", "gpu"])
    must: Any = None
    names: tuple[str, ...] = ("layout.json", "after")
    if command == "compare":
        tolerance = rng.choice(
            [[], [], [], ["--tolerance=nan"], ["--tolerance=-1"], ["--tolerance=x"]]
        )
        arguments = [command, str(before), str(rng.choice([file, after])), *tolerance]
        if tolerance:
            must, names = "refuse", ("tolerance", *names)
    elif command == "report":
        arguments = [command, str(after), f"--out={folder / 'out.md'}"]
    else:
        # What is accepted would take long.
        bad = {
            "run": [
                *(["layout", "--budget=0"], ["layout", "--budget=nan"], ["layout", "--only=x"]),
                *(
                    ["layout", "--only=x=y"],
                    ["no"],
                    ["layout", "--device=x"],
                    ["layout", "--json=/x/y"],
                ),
                *([], ["layout", "--quick=3"], ["layout", "--budget=x"], ["layout", "é"]),
            ],
            "profile": [["no"], [], ["layout", "--only=peer=no"], ["layout", "--json=/no/such/x"]],
            "gpu": [[], ["--out=/x", "--budget=0"], ["--out=/x", "--budget=x"], ["--no"]],
        }[command]
        arguments = [command, *rng.choice(bad)]
        name, must, names = str(arguments), "refuse", ()
    return Input(
        f"bench {command}: {name}",
        "bench",
        arguments,
        must=must,
        names=names,
        exit_codes=(1,) if command == "compare" else (),
    )
