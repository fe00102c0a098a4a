"""Small data sets in D4RL's format, and the script as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dtql_continuous as dtql  # noqa: E402
import d4rl_tasks  # noqa: E402

TINY = dict(pretrain_epochs=1, epochs=2, steps_per_epoch=20, eval_episodes=2, num_candidates=8, batch_size=32,
            cuda=False, compile=False, cudagraphs=False)


def write_d4rl(file: Path, rows: int = 600, obs_dim: int = 11, action_dim: int = 3, **changes) -> Path:
    """A file in D4RL's format: random walks of 50 steps. `changes` replace keys; None leaves a key out."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (rows, action_dim)).astype(np.float32)
    arrays = {
        "observations": rng.standard_normal((rows, obs_dim)).astype(np.float32),
        "actions": actions,
        "rewards": (1 - (actions**2).sum(1)).astype(np.float32),
        "terminals": np.arange(rows) % 97 == 96,
        "timeouts": np.arange(rows) % 50 == 49,
        **changes,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as target:
        for key, value in arrays.items():
            if value is not None:
                target[key] = value
    return file


@pytest.fixture
def hopper(tmp_path, monkeypatch) -> Path:
    """A folder with hopper-medium-v2's file, known to D4RL_DATASET_DIR."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("D4RL_BASE_URL", "http://127.0.0.1:9/")  # nothing listens there
    return write_d4rl(tmp_path / "data" / d4rl_tasks.TASKS["hopper-medium-v2"].file)


def make_args(tmp_path: Path, **changes) -> dtql.Args:
    settings = {**dtql.task_defaults("hopper-medium-v2"), **TINY, "run_dir": str(tmp_path / "runs"), **changes}
    return dtql.Args(**{"env_id": "hopper-medium-v2", **settings})


def command(*arguments: object, script: str = "dtql_continuous.py") -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def run_script(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
