"""How the processes that torchrun started find each other, and which commands they may run."""

import contextlib
import io
import sys

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.run import get_args_parser

from threadweaver import command, rank_errors, ranks
from threadweaver.__main__ import MODULES
from threadweaver.evaluate.options import build_parser
from threadweaver.train.__main__ import KINDS
from threadweaver.train.config import parser_of


@pytest.fixture
def torchrun_store(monkeypatch):
    """That of torchrun's own process, which outlives its ranks."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    yield store
    ranks.leave()


@pytest.mark.parametrize("counts", [("0", "1"), ("0", "0")], ids=["one node", "another's restart"])
def test_ranks_that_are_restarted_see_nothing_of_those_before(torchrun_store, monkeypatch, counts):
    for count in counts:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        store, other = ranks.join(), ranks.another_client()
        assert not store.check(["failed"]) and not other.check(["failed"])
        assert ranks.SharedQueue("problems", 1).take() == 0
        store.set("failed", "1")
        assert other.check(["failed"])  # ranks of one start share it
        ranks.leave()


def test_a_world_size_without_the_rest_of_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="2"), rank_errors.joined():
        pass
    error = capsys.readouterr().err
    assert error.startswith("error: WORLD_SIZE is 2, and RANK is not set: ")
    assert error.count("\n") == 1


def test_seconds_to_join_that_are_no_number_are_named(torchrun_store, monkeypatch):
    monkeypatch.setenv("TW_JOIN_SECONDS", "1m")
    with pytest.raises(ValueError, match=r"^TW_JOIN_SECONDS is 1m: "):
        ranks.join()


def test_ranks_that_cannot_reach_each_other_say_so(torchrun_store, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise RuntimeError("Gloo connectFullMesh failed\nwith a trace")

    monkeypatch.setattr(ranks.dist, "init_process_group", refuse)
    with pytest.raises(SystemExit, match="2"), rank_errors.joined():
        pass
    error = capsys.readouterr().err
    assert error.startswith("error: rank 0 cannot join the others at 127.0.0.1:")
    assert "(Gloo connectFullMesh failed with a trace)" in error and error.count("\n") == 1


def test_a_port_that_is_taken_is_named(torchrun_store, monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")  # this rank makes the store itself
    with pytest.raises(SystemExit, match="2"), rank_errors.joined():
        pass
    error = capsys.readouterr().err
    assert f"rank 0 cannot join the others at 127.0.0.1:{torchrun_store.port} (" in error
    assert error.count("error: ") == 1 and "Traceback" not in error


@pytest.mark.parametrize("module", ["threadweaver.eval", "threadweaver.train"])
def test_torchrun_hands_on_every_option(module):
    """It takes what abbreviates several options of its own, as --n does, for an error."""
    if module == "threadweaver.eval":
        parsers, commands = [build_parser()], [[]]
    else:
        parsers = [parser_of(kind) for kind in KINDS.values()]
        commands = [[name] for name in KINDS]
    for parser, start in zip(parsers, commands, strict=True):
        for action in parser._actions:
            names = [name for name in action.option_strings if name.startswith("--")]
            assert not names or any(is_handed_on([module, *start], name) for name in names), names


def is_handed_on(start: list[str], option: str) -> bool:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        given = ["-m", *start, option, "4"]
        return get_args_parser().parse_args(given).training_script_args[-2:] == given[-2:]
    return False


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"train", "evaluate", "eval"}))
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_command_of_one_process_is_refused_on_several_ranks(name, rank, monkeypatch, capsys):
    monkeypatch.setattr(command, "SECONDS_FOR_FIRST", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    module = MODULES[name]
    __import__(module if name == "add-tags" else f"{module}.__main__")
    main = sys.modules[module if name == "add-tags" else f"{module}.__main__"].main
    with pytest.raises(SystemExit, match="2"):
        main()
    printed = capsys.readouterr()
    assert printed.out == ""
    if rank == "0":
        assert printed.err.startswith("error: this command runs in one process: ")
        assert printed.err.count("\n") == 1
    else:
        assert printed.err == ""
