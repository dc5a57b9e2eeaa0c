"""A teacher in our engine whose replies keep to their form, whatever its weights say."""

from __future__ import annotations

import asyncio
import importlib.util
import json

import pytest
import torch

from tests.annotate.problems import gym_rows, save_student, write_rows
from threadweaver.annotate.__main__ import main
from threadweaver.annotate.engine_teacher import EngineTeacher
from threadweaver.annotate.failures import Breach, Refused
from threadweaver.annotate.form import Form
from threadweaver.annotate.grammar import (
    FormConstraint,
    Grammars,
    independent_form,
    outline_form,
)
from threadweaver.annotate.independent import read_independent
from threadweaver.annotate.map import read_map
from threadweaver.annotate.map_form import map_form
from threadweaver.annotate.outline import read_outlines
from threadweaver.annotate.settings import TeacherSettings
from threadweaver.generate.load import load_engine
from threadweaver.generate.options import EngineSettings
from threadweaver.trajectory import TemplateConfig


def short_replacements() -> Form:
    """Of replacements of a few words, for weights that never want to end one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("threadweaver.annotate.grammar.MOST_PIECES", 1)
        return independent_form()


FORMS = {
    "map": (map_form(12), lambda reply: read_map(reply, 12)),
    "independent": (short_replacements(), lambda reply: read_independent(reply, "a b c")),
    "outline": (outline_form(2), lambda reply: read_outlines(reply, ["a", "b"], "")),
}
ASKED = [{"role": "user", "content": "How?"}]
needs_xgrammar = pytest.mark.skipif(
    importlib.util.find_spec("xgrammar") is None, reason="xgrammar is not installed"
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """An engine of random weights."""
    torch.manual_seed(0)
    folder = save_student(tmp_path_factory.mktemp("teacher"))
    settings = EngineSettings(device="cpu", precision="fp32", kv_gigabytes=0.02)
    template = TemplateConfig(instruction="")
    return *load_engine(folder, settings, parallel=False, template=template), folder


def replies(loaded, form: Form, count: int, constrain: bool = True) -> list:
    engine, tokenizer, _ = loaded
    grammars = None
    if constrain:
        grammars, note = Grammars.of(tokenizer, engine.codec.end_ids)
        assert grammars is not None and note is None
    settings = TeacherSettings(model="x", temperature=1.0, max_tokens=3000 if constrain else 50)
    teacher = EngineTeacher(engine, settings, grammars)

    async def ask_all():
        return await asyncio.gather(*(teacher.ask(ASKED, form, seed) for seed in range(count)))

    return asyncio.run(ask_all())


@needs_xgrammar
@pytest.mark.parametrize("name", FORMS)
def test_every_reply_ends_and_can_be_read_and_a_map_keeps_its_rules(loaded, name):
    form, read = FORMS[name]
    found = replies(loaded, form, 2)
    assert len({reply.text for reply in found}) > 1  # each with draws of its own
    for reply in found:
        assert reply.finish == "stop"
        try:
            read(reply.text)
        except Breach as breach:
            assert breach.kind == "rule" and name != "map", (reply.text, breach)


@needs_xgrammar
def test_a_form_allows_good_replies(loaded):
    engine, tokenizer, _ = loaded
    grammars, _ = Grammars.of(tokenizer, engine.codec.end_ids)
    assert grammars is not None
    good = {
        "map": "1 [1-3] understand: what n is\n2 [4-12] work: é, both\n2.1 [4-9] work: odd\n"
        "2.2 [10-12] dead-end: even\nparallel 2.1 | 2.2\n",
        "independent": '[{"src": "a \\"b\\"\\n", "dest": ""}, {"src": "b", "dest": "é"}]',
        "outline": "<Outlines>\n<Outline>1: odd n</Outline>\n<Outline>2: even n</Outline>\n"
        "</Outlines>",
    }  # fmt: skip
    for name, text in good.items():
        constraint = FormConstraint(grammars, FORMS[name][0])
        for id in [*tokenizer.encode(text, add_special_tokens=False), engine.codec.eos_id]:
            assert constraint.allowed(400)[id], (name, tokenizer.decode([id]))
            constraint.accept(id)


def test_without_a_grammar_replies_are_free_and_a_long_one_is_cut_off(loaded):
    (reply,) = replies(loaded, FORMS["map"][0], 1, constrain=False)
    assert reply.finish == "length" and reply.completion_tokens == 50
    assert reply.prompt_tokens == len("How?")


def test_a_prompt_that_leaves_no_room_is_refused(loaded):
    engine, *_ = loaded
    teacher = EngineTeacher(engine, TeacherSettings(model="x"), None)
    long = [{"role": "user", "content": "x" * 10_000}]
    with pytest.raises(Refused, match="context"):
        asyncio.run(teacher.ask(long, lambda text: None, 0))


def test_a_missing_package_is_named(monkeypatch, loaded):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    engine, tokenizer, _ = loaded
    grammars, note = Grammars.of(tokenizer, engine.codec.end_ids)
    assert grammars is None and note is not None and "threadweaver[grammar]" in note


@needs_xgrammar
def test_a_model_is_its_own_teacher(loaded, tmp_path):
    pytest.importorskip("reasoning_gym")
    folder = loaded[2]
    (row,) = gym_rows(1)
    row["response"] = f"<think>\nOne.\nTwo.\n</think>\n\\boxed{{{row['answer']}}}"
    data = write_rows([row], tmp_path / "data.jsonl")
    options = ["--data", data, "--student", folder, "--teacher.model", folder]
    options += ["--engine.kv_gigabytes=0.02", "--engine.device=cpu", "--engine.precision=fp32"]
    assert main([*options, "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    asked = summary["steps"]["1-map"]
    assert asked["requests"] >= 1 and asked["breaches"] == {}
