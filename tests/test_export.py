"""Exported policies: every method, with and without noise, in the environment's units."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import METHODS, make_args, run_here, run_inside

import common
import dtql_continuous as dtql
from common import UserError
from tools import export

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_networks")]


@pytest.fixture
def run_dir(tmp_path):
    """Trains a method on data with asymmetric bounds and large observations; returns the run's folder."""

    class Env(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (4,))
        action_space = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([3, 0.5], np.float32))

        def reset(self, seed=None, options=None):
            return np.zeros(4), {}

        def step(self, action):
            return np.zeros(4), 0.0, True, False, {}

    gym.register("Lopsided-v0", Env, max_episode_steps=9, disable_env_checker=True)
    rng, n = np.random.default_rng(0), 400
    actions = np.column_stack((rng.uniform(-1, 3, n), rng.uniform(0, 0.5, n))).astype(np.float32)
    columns = dict(observations=5 + 10 * rng.standard_normal((n, 4)), actions=actions, rewards=rng.standard_normal(n))
    np.savez(tmp_path / "data.npz", **columns, terminals=np.arange(n) % 20 == 19)

    def train(module, **changes) -> str:
        settings = dict(env_id="Lopsided-v0", data=str(tmp_path / "data.npz"), epochs=1, **changes)
        return module.main(make_args(tmp_path, module, **settings))["run_dir"]

    return train


@pytest.mark.parametrize("module", METHODS, ids=lambda module: module.__name__)
def test_every_method_is_exported(run_dir, module):
    pytest.importorskip("onnxscript")
    folder = run_dir(module, num_seeds=2)
    kind = "onnx" if module.__name__ in ("dtql_continuous", "idql", "bc", "fql") else "torch"
    assert export.main(export.Args(folder, index=1, format=kind)) < 1e-5
    if module.__name__ in ("idql", "dql"):
        assert export.main(export.Args(folder, mode="best", num_candidates=5, format="torch")) < 1e-5


@pytest.mark.parametrize("settings", [{"policy": "implicit", "nll": False}, {"normalize": True}], ids=str)
def test_onnx_runs_without_torch(run_dir, settings):
    """The best of five candidates, with any number of observations; metadata say what it is."""
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = run_dir(dtql, **settings)
    assert export.main(export.Args(folder, mode="best", num_candidates=5)) < 1e-5
    session = onnxruntime.InferenceSession(str(Path(folder) / "policy.onnx"))
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["method"]) == "dtql_continuous" and json.loads(about["action_low"]) == [-1, 0]
    noise = session.get_inputs()[1].shape[1:]
    for batch in (1, 7):
        inputs = {"observations": np.zeros((batch, 4), np.float32), "noise": np.random.randn(batch, *noise).astype(np.float32)}
        (actions,) = session.run(None, inputs)
        assert actions.shape == (batch, 2) and (actions >= [-1, 0]).all() and (actions <= [3, 0.5]).all()


def test_chunks_and_torch(run_dir):
    import dtql_chunk

    folder = run_dir(dtql_chunk, chunk=3)
    assert export.main(export.Args(folder, format="torch", out=f"{folder}/p.pt2")) < 1e-5
    assert torch.export.load(f"{folder}/p.pt2").module()(torch.zeros(3, 4)).shape == (3, 3, 2)


@pytest.mark.parametrize("module", METHODS, ids=lambda module: module.__name__)
def test_a_policy_alone_acts_as_its_run(run_dir, module, tmp_path):
    """It needs no network that the run does not deploy, and cannot be resumed."""
    folder, out = run_dir(module, num_seeds=2), tmp_path / "small"
    assert export.main(export.Args(folder, index=1, format="policy", out=str(out))) == 0
    whole = common.open_checkpoint(f"{folder}/checkpoint.pt")["agent"]
    small = common.open_checkpoint(out / "checkpoint.pt")
    assert small["agent"].keys() < whole.keys() and (small["left_out"] or module.__name__ == "bc")
    acts = [module.load_policy(f"{path}/checkpoint.pt", index, seed=3) for path, index in ((folder, 1), (out, 0))]
    obs = np.random.default_rng(1).standard_normal((5, 4), np.float32)
    assert np.array_equal(acts[0](obs), acts[1](obs))
    with pytest.raises(UserError, match="its checkpoint does not fit"):
        run_here(module, "--resume", out)


def test_bad_input(run_dir, monkeypatch):
    folder = run_dir(dtql)
    with pytest.raises(UserError, match="there is no 3"):
        export.main(export.Args(folder, index=3))
    with pytest.raises(UserError, match="--num-candidates needs --mode best"):
        export.main(export.Args(folder, num_candidates=4))
    with pytest.raises(UserError, match="--mode is for"):
        export.main(export.Args(folder, format="policy", mode="best"))
    result = run_inside("/nowhere", script="tools.export")
    assert result.returncode == 2 and "is not a run" in result.stderr
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install -r requirements-dev.txt"):
        export.main(export.Args(folder))
    assert not list(Path(folder).glob("policy*"))
