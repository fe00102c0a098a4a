"""The fixtures that several tests need."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and so do the scripts that they start

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts

from helpers import METHODS, write_d4rl  # noqa: E402

from tasks import d4rl  # noqa: E402


@pytest.fixture
def hopper(tmp_path, monkeypatch) -> Path:
    """A folder with hopper-medium-v2's file, known to D4RL_DATASET_DIR."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("D4RL_BASE_URL", "http://127.0.0.1:9/")  # nothing listens there
    return write_d4rl(tmp_path / "data" / d4rl.TASKS["hopper-medium-v2"].file)


@pytest.fixture
def uncompiled(monkeypatch):
    """`torch.compile` that does nothing."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def tiny_networks(monkeypatch):
    """Networks of 64 hidden units, which train faster, in every method that this process imports."""
    for module in METHODS:
        monkeypatch.setattr(module, "HIDDEN", 64, raising=False)  # IQL has a flag
