"""The backend: which device and library serve a run, and the memory it reports."""

from __future__ import annotations

import sys

import pytest
import torch

from shardwise.errors import LaunchError
from shardwise.machine.backend import Backend
from tests.conftest import Pool

CPU = Backend.cpu()


def test_the_device_is_chosen_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWISE_DEVICE", "cpu")
    assert Backend.detect(2) == CPU
    assert CPU.device(1) == torch.device("cpu")
    monkeypatch.setenv("SHARDWISE_DEVICE", "tpu")
    with pytest.raises(LaunchError, match="must be cpu or cuda, but is 'tpu'"):
        Backend.detect()
    monkeypatch.setenv("SHARDWISE_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Backend.detect(2) == Backend.cuda()
    with pytest.raises(LaunchError, match="3 ranks need a CUDA device each, but this machine has 2"):
        Backend.detect(3)
    monkeypatch.delenv("SHARDWISE_DEVICE")
    assert Backend.detect(2) == Backend.cuda()
    assert Backend.detect(3) == CPU


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_rises_and_resets(pool: Pool) -> None:
    def peaks() -> tuple[bool, int, int, int]:
        reset = CPU.reset_peak_memory()
        before = CPU.peak_memory()
        block = torch.ones(16 << 20)  # 64 MiB
        del block
        high = CPU.peak_memory()
        CPU.reset_peak_memory()
        return reset, before, high, CPU.peak_memory()

    for reset, before, high, after in pool(2).run(peaks):
        assert 1 << 20 < before < CPU.total_memory()
        assert high > before + (60 << 20)
        assert not reset or after < high - (50 << 20)
