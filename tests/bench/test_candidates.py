"""bench.candidates: kernels that no figure has chosen yet."""

import re
from pathlib import Path

import pytest
import torch

from bench import attention_setup, candidate_kernels, candidates, shapes
from bench.candidate_kernels import CANDIDATES, SOURCES, __main__
from bench.suite import Skip
from tests.kernels.cubins import compiled, figures
from tw_kernels import cuda_build
from tw_kernels.attention import cuda

BY_NAME = {candidate.name: candidate for candidate in CANDIDATES}


def kernel_source(name: str) -> tuple[Path, list[str]]:
    """The file of csrc that a candidate compiles, and the macros it sets."""
    *defines, include = BY_NAME[name].source.read_text().splitlines()
    file, macros = re.fullmatch(r'#include "(.+)"', include), []
    for line in defines:
        define = re.fullmatch(r"#define (\w+) [1-9]", line)
        assert define
        macros.append(define[1])
    assert file and macros
    return cuda_build.SOURCES / file[1], macros


def test_every_file_is_a_candidate():
    assert {path.stem for path in SOURCES.glob("*.cu")} == BY_NAME.keys()


@pytest.mark.parametrize("name", BY_NAME)
def test_a_candidate_is_a_kernel_with_macros_that_are_off(name):
    source, macros = kernel_source(name)
    replaced = getattr(cuda, BY_NAME[name].replaces)
    assert source in cuda_build.sources() and replaced.stem == source.stem
    for macro in macros:
        off = rf"#ifndef {macro} // bench/candidates.py\n#define {macro} [01]\n#endif\n"
        assert re.search(off, source.read_text())


def setup(what, head_dim, heads=4):
    problem = attention_setup.Problem(shapes.pack(2, 8), "cpu", heads, 1, head_dim)
    return attention_setup.AttentionSetup(problem, torch.bfloat16, what)


@pytest.mark.parametrize("name", BY_NAME)
def test_its_cubin_is_launched_in_its_pass_and_only_in_its_calls(name, monkeypatch):
    candidate = BY_NAME[name]
    kept, seen = getattr(cuda, candidate.replaces), []

    def attend(*_, **options):
        assert options["backend"] == "cuda"
        seen.append(getattr(cuda, candidate.replaces))
        raise RuntimeError("launched")

    monkeypatch.setattr(cuda, "why_not", lambda *_: None)
    monkeypatch.setattr(candidates, "trie_attention", attend)
    monkeypatch.setattr(candidates, "compiled", lambda candidate: candidate.cubin)
    head_dim = candidate.head_dims[0]
    other = "bwd" if candidate.what == "fwd" else "fwd"
    same = [setup(other, head_dim)]
    same += [setup(candidate.what, d) for d in {64, 128}.difference(candidate.head_dims)]
    for unchanged in same:
        with pytest.raises(Skip, match="the kernel that runs is the same there"):
            candidates._prepare(unchanged, candidate)
    if candidate.group > 1:
        with pytest.raises(Skip, match="query heads of a KV head are not a multiple of 4"):
            candidates._prepare(setup(candidate.what, head_dim, heads=6), candidate)
    call = candidates._prepare(setup(candidate.what, head_dim), candidate)
    assert getattr(cuda, candidate.replaces) == kept
    with pytest.raises(RuntimeError, match="launched"):
        call(0)
    assert seen == [candidate.cubin] and getattr(cuda, candidate.replaces) == kept


def test_candidates_are_left_out_where_they_cannot_run(monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda *_: "no Hopper")
    for peer in candidates.SUITE.peers[1:]:
        assert peer.why_absent("cpu") == "no Hopper"
    with pytest.raises(Skip, match="no Hopper"):
        candidates._prepare(setup("fwd", 64), BY_NAME["forward_in_turns"])


def test_a_candidate_that_does_not_compile_is_named_and_the_others_are_kept(
    tmp_path, monkeypatch, capsys
):
    def compile_kernels(source, cubin):
        if source.stem == "dkv_runs_on":
            raise RuntimeError("nvcc failed")
        cubin.touch()

    monkeypatch.setattr(candidate_kernels, "CUBINS", tmp_path / "cubins")
    monkeypatch.setattr(cuda_build, "compile_kernels", compile_kernels)
    monkeypatch.setattr(cuda_build, "why_not", lambda: None)
    assert __main__.main([]) == 1
    assert "dkv_runs_on: nvcc failed" in capsys.readouterr().err
    there = {path.name.split("-")[0] for path in (tmp_path / "cubins").iterdir()}
    assert there == BY_NAME.keys() - {"dkv_runs_on"}
    monkeypatch.setattr(cuda_build, "why_not", lambda: "no nvcc")
    for arguments, line in (([], "no nvcc"), (["--device=cuda"], "unknown setting")):
        assert __main__.main(arguments) == 2
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1


def test_a_cubin_is_named_by_what_it_is_compiled_from_and_how(monkeypatch):
    words = ["nvcc", "-O3", "-I/here", "-o=to"]
    monkeypatch.setattr(cuda_build, "command", lambda *_: words)
    candidate = CANDIDATES[0]
    name = candidate.cubin.name
    words[:] = ["/other/nvcc", "-O3", "-I/there", "-o=elsewhere"]
    assert candidate.cubin.name == name
    words[1] = "-O2"
    assert candidate.cubin.name != name and CANDIDATES[1].cubin.name != name


@pytest.mark.slow
def test_candidates_compile_as_cleanly_as_the_kernels_that_run(tmp_path, monkeypatch):
    if reason := cuda_build.why_not():
        pytest.skip(reason)
    logs, compile_kernels = [], cuda_build.compile_kernels

    def compile_and_log(source, cubin):
        logs.append(compile_kernels(source, cubin))
        return logs[-1]

    monkeypatch.setattr(candidate_kernels, "CUBINS", tmp_path / "cubins")
    monkeypatch.setattr(cuda_build, "compile_kernels", compile_and_log)
    assert __main__.main([]) == 0 and len(logs) == len(CANDIDATES)
    assert __main__.main([]) == 0 and len(logs) == len(CANDIDATES)  # they are there
    assert not any("C75" in log or "warning" in log.lower() for log in logs)
    for candidate in CANDIDATES:
        usual = figures(compiled(kernel_source(candidate.name)[0].stem)[0])
        kernels = figures(candidate.cubin)
        assert kernels.keys() == usual.keys()
        for name, kernel in kernels.items():
            assert not kernel["stack"] and "LDL" not in kernel and "STL" not in kernel
            assert kernel.get("HGMMA") == usual[name].get("HGMMA")
    usual = figures(compiled("trie_attention_fwd")[0])
    turns = figures(BY_NAME["forward_in_turns"].cubin)
    # Two of a turn, the first arrival and the last wait.
    assert all(turns[name]["BAR"] == usual[name]["BAR"] + 4 for name in turns)
    clusters = figures(BY_NAME["forward_in_clusters"].cubin)
    for name, kernel in clusters.items():
        # Tiles of K and V are 2 boxes, of which a block copies one to both.
        copies = kernel["UTMALDG"], kernel.get("UTMALDG.3D.MULTICAST", 0)
        assert copies == ((8, 4) if "_128_" in name else (usual[name]["UTMALDG"], 0))
