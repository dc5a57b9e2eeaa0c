"""AdamW whose moments and step are on the host, with a GPU that is the host too: torchao's streams,
events and pinned memory are stand-ins that do nothing, all else runs as on a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torchao", reason="needs the extra memory")

from torchao.optim import cpu_offload  # pyright: ignore[reportMissingImports]

from tests.train.conftest import weights_of_resumed
from tests.train.test_optimizer import check_room_is_what_a_checkpoint_takes
from threadweaver.train.optimizer import clip_gradient


class Stream:
    def wait_stream(self, other: Stream) -> None: ...

    def record_event(self) -> Stream:
        return self

    def synchronize(self) -> None: ...


class Torch:
    """torch, as cpu_offload knows it."""

    cuda = SimpleNamespace(
        Stream=Stream, current_stream=Stream, stream=lambda stream: nullcontext()
    )

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty_like(tensor, pin_memory: bool = False, **options):
        return torch.empty_like(tensor, **options)


@pytest.fixture
def gpu_that_is_the_host(monkeypatch):
    monkeypatch.setattr(cpu_offload, "torch", Torch())
    monkeypatch.setattr(cpu_offload, "get_available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("threadweaver.train.run.check_optimizers", lambda config, device: None)


def test_copies_that_come_late_are_clipped_once(gpu_that_is_the_host, monkeypatch):
    """A GPU copies gradients to the host beside what else it computes: here when it is waited for,
    which is as late as can be."""
    from threadweaver.train.adamw_offload import CPUOffloadOptimizer

    model = torch.nn.Linear(128, 64, bias=False)
    optimizer = CPUOffloadOptimizer([model.weight], torch.optim.AdamW)
    (1000 * model(torch.randn(8, 128))).sum().backward()
    (host,) = optimizer.param_d2h_map.values()
    host.grad.zero_()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: host.grad.copy_(model.weight.grad))
    assert clip_gradient(model, optimizer, 1.0) > 2  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(host.grad, model.weight.grad)
    assert host.grad.norm().item() == pytest.approx(1, rel=1e-4)


def run_of(new_run, name: str, optimizer: str, **compute: str):
    run = new_run(name)
    run.settings["optimization"] |= {"optimizer": optimizer, "gradient_clip": 0.5}
    run.settings["compute"].pop("precision")
    run.settings["compute"] |= compute or {"precision": "fp32"}
    return run


def test_it_trains_as_adamw_does(new_run, gpu_that_is_the_host):
    """Clipped gradients, rates of the schedule and weight decay included."""
    runs = [run_of(new_run, name, name) for name in ("adamw", "adamw-offload")]
    assert [run() for run in runs] == [0, 0]
    records = [[(r["loss"], r["gradient_norm"]) for r in run.metrics()] for run in runs]
    assert max(norm for _, norm in records[0]) > 0.5
    assert records[0] == records[1]
    assert runs[0].weights() == runs[1].weights()


@pytest.mark.parametrize("compute", [{}, {"parameters": "bf16"}], ids=["fp32", "bf16"])
def test_it_resumes_bit_for_bit(new_run, gpu_that_is_the_host, eager, compute):
    whole = run_of(new_run, "whole", "adamw-offload", **compute)
    assert whole() == 0
    stopped = run_of(new_run, "stopped", "adamw-offload", **compute)
    assert weights_of_resumed(stopped) == whole.weights()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_room_for_a_checkpoint_is_what_it_takes(
    gpu_that_is_the_host, eager, tmp_path, monkeypatch, dtype
):
    check_room_is_what_a_checkpoint_takes("adamw-offload", dtype, tmp_path, monkeypatch)
