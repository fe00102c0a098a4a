"""What several tests need: small data, agents, the scripts as a user runs them."""

import contextlib
import csv
import functools
import io
import itertools
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

import common
import dtql_continuous as dtql
import run_folder
import stacked
import tasks
from tasks import Task
from tools import import_method, methods

ROOT = Path(__file__).parent.parent
TINY = dict(epochs=2, steps_per_epoch=20, eval_episodes=2, batch_size=32, device="cpu", compile=False)
METHODS = [import_method(name) for name in methods()]
# Shorter and smaller where a method's own flags allow it
OWN = {
    "pretrain_epochs": 1,
    "num_candidates": 8,
    "diffusion_epochs": 1,
    "critic_epochs": 1,
    "diffusion_batch_size": 32,
    "online_steps": 20,
    "chunk": 1,
    "width": 64,
}
VARIANTS = [  # each method, and what its flags change in losses and updates
    *((module, {}) for module in METHODS),
    *(
        (import_method(name), changes)
        for name, changes in (
            ("dtql_continuous", {"policy": "implicit", "nll": False}),
            ("dtql_continuous", {"lr_decay": True}),
            ("kl_distill", {"q": False}),
            ("bc", {"policy": "gaussian"}),
            ("bc", {"policy": "diffusion"}),
            ("iql", {"dropout": 0.1}),
            ("iql", {"layers": 3, "layer_norm": True}),
            ("dql", {"max_q_backup": True}),
            ("fql", {"normalize_q": True, "q_target": "min"}),
            ("dtql_chunk", {"chunk": 3}),
            ("fan", {"critic": "q", "normalize_q": True}),
        )
    ),
]


def own(module) -> dict[str, int]:
    """The settings in `OWN` that a method has."""
    return {name: value for name, value in OWN.items() if hasattr(module.Args, name)}


def agent_class(module) -> type:
    """The agent of a method: its nn.Module with an `act` and losses."""
    (cls,) = (
        cls
        for cls in vars(module).values()
        if isinstance(cls, type)
        and issubclass(cls, torch.nn.Module)
        and cls.__module__ == module.__name__
        and hasattr(cls, "sample")
    )
    return cls


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


def make_args(tmp_path: Path, module=dtql, **changes):
    """Arguments of a small run of `module` on hopper-medium-v2."""
    settings = {**module.task_defaults("hopper-medium-v2"), **TINY, **own(module), "run_dir": str(tmp_path / "runs"), **changes}
    return module.Args(**{"env_id": "hopper-medium-v2", **settings})


def command(*arguments: object, script: str = "dtql_continuous.py") -> list[str]:
    program = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]  # tools are modules
    return [sys.executable, *program, *map(str, arguments)]


def run_script(*arguments: object, script: str = "dtql_continuous.py", **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments, script=script),
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_inside(*arguments: object, script: str = "dtql_continuous.py") -> subprocess.CompletedProcess:
    """What `run_script` gives, but in this process, which saves the imports: for what ends before any training."""
    streams = [io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code, argv, path = 0, sys.argv, list(sys.path)
    sys.argv = [script, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # runpy's, that a tool is imported already
            if script.endswith(".py"):
                sys.path.insert(0, str((ROOT / script).parent))
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    finally:
        sys.argv, sys.path[:] = argv, path
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    return subprocess.CompletedProcess(arguments, code, out, err)


def run_here(module, *flags: object) -> Path:
    """The folder of a run of a script's `main` with these flags, in this process."""
    return Path(module.main(common.parse_args(module.Args, module.task_defaults, [*map(str, flags)]))["run_dir"])


def make_task(*arrays: np.ndarray, low: float = -1.0, high: float = 1.0) -> Task:
    """A task of the given obs, actions, rewards, terminals, next_obs, with an environment that nobody steps."""
    arrays = [np.asarray(array, np.float32) for array in arrays]
    obs_dim, action_dim = arrays[0].shape[1], arrays[1].shape[1]

    class Env(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,))
        action_space = gym.spaces.Box(low, high, (action_dim,))

    return Task(*arrays, Env, lambda x: x, "return", False, "test", Env.action_space.low, Env.action_space.high)


def make_agent(num_seeds: int = 1, obs_dim: int = 3, action_dim: int = 2, rows: int = 512, module=dtql, device="cpu", **changes):
    """An agent of `module` on random transitions."""
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal((rows, obs_dim)),
        rng.uniform(-1, 1, (rows, action_dim)),
        rng.standard_normal(rows),
        rng.random(rows) < 0.1,
        rng.standard_normal((rows, obs_dim)),
    ]
    settings = {**TINY, **own(module), "num_seeds": num_seeds, "device": device, **changes}
    data = stacked.Transitions(*(array.astype(np.float32) for array in arrays), torch.device(device))
    extra = {"ends": torch.as_tensor(arrays[3], dtype=torch.float32, device=device)} if "chunk" in settings else {}
    return agent_class(module)(module.Args(**settings), obs_dim, action_dim, torch.device(device), data, **extra)


def updates(agent) -> list:
    """The agent's update in each of its phases, in order."""
    if hasattr(agent, "phases"):
        return [update for update, _ in agent.phases]
    if hasattr(agent, "start_training"):
        return [functools.partial(agent.update, training) for training in (False, True)]
    return [agent.update]


def train(agent) -> dict[str, Tensor]:
    """One update of every phase. Returns the metrics of all."""
    metrics = {}
    for update in updates(agent):
        metrics |= update()
    return metrics


def plain(net: torch.nn.Module, *index: int) -> torch.nn.Module:
    """One network of stacked ones as a plain module: `plain(agent.critic, 0, 1)` is the second Q of model 0."""
    return stacked.with_parameters(net, {name: param.detach().clone()[index] for name, param in net.named_parameters()})


def snapshot(agent) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in stacked.state_of(agent).items()}


def changed_networks(agent, before: dict[str, Tensor]) -> set[str]:
    """The networks whose parameters differ from a snapshot."""
    return {name.split(".")[0] for name, param in agent.named_parameters() if not torch.equal(param, before[name])}


# ---- runs and their folders --------------------------------------------------------------------------------------------

FLAGS = [
    f"--{'' if value is not False else 'no-'}{name.replace('_', '-')}{'' if isinstance(value, bool) else f'={value}'}"
    for name, value in TINY.items()
]


def rows_of(run_dir: str | Path, table: str = "eval.csv") -> list[dict[str, str]]:
    with open(Path(run_dir) / table) as file:
        return list(csv.DictReader(file))


def params_of(run_dir: str | Path) -> dict[str, Tensor]:
    return common.open_checkpoint(Path(run_dir) / "checkpoint.pt")["agent"]


def assert_same_end(one: str | Path, other: str | Path) -> None:
    """Parameters equal to the bit, and the same evaluations but for the seconds they took."""
    a, b = params_of(one), params_of(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    results = [[{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(run)] for run in (one, other)]
    assert results[0] == results[1]
    assert rows_of(one, "episodes.csv") == rows_of(other, "episodes.csv")


def whole_and_resumed(tmp_path: Path, monkeypatch, module=dtql, **settings) -> tuple[str, str]:
    """The folders of a run of `module` and of one that was stopped after 33 updates and resumed."""
    whole = module.main(make_args(tmp_path, module, **settings))["run_dir"]
    count, advance = [], run_folder.Run.advance

    def stop_in_training(run: run_folder.Run, metrics: dict[str, Tensor]) -> None:
        count.append(run)
        if len(count) == 33:
            common.request_stop(15)
        advance(run, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Run, "advance", stop_in_training)
        with pytest.raises(common.Interrupted):
            module.main(make_args(tmp_path, module, **settings))
    module.main(make_args(tmp_path, module, **settings, resume=str(count[0].dir)))
    return whole, str(count[0].dir)


def start(*arguments: object, script: str = "dtql_continuous.py", **environment: str) -> subprocess.Popen:
    """A script in a process group of its own, as a shell or a scheduler starts it."""
    return subprocess.Popen(
        command(*arguments, script=script),
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(condition: Callable[[], Any], seconds: float) -> None:
    """Wait for a condition; the test fails if it does not come true."""
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.01)


def wait_for(parent: Path, pattern: str = "*/checkpoint.pt") -> Path:
    """The folder of the first file below `parent` that matches, as soon as there is one."""
    until(lambda: any(parent.glob(pattern)), 120)
    return next(parent.glob(pattern)).parent


# ---- pages -------------------------------------------------------------------------------------------------------------


def table(text: str, heading: str) -> dict[str, dict[str, str]]:
    """The first Markdown table below a heading: first cell of a row -> column -> cell."""
    is_row = lambda line: line.startswith("|")
    lines = itertools.dropwhile(lambda line: not is_row(line), text[text.index(heading) :].splitlines())
    lines = list(itertools.takewhile(is_row, lines))
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    rows = {}
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.setdefault(cells[0].strip("`"), dict(zip(head, cells, strict=True)))
    return rows


# ---- tasks -------------------------------------------------------------------------------------------------------------


def load_task(env_id: str = "", **more) -> Task:
    """The task of `--env-id` and `--data`."""
    return tasks.load_task(common.Args(env_id=env_id, **more))


def write_minari(env_id: str, env: gym.Env, episodes: int = 3, steps: int = 30, **metadata) -> Path:
    """A local Minari data set of random actions in `env`, written as Minari does but without its collector, which needs jax."""
    import minari
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for number in range(episodes):
        obs, _ = env.reset(seed=number)
        env.action_space.seed(number)
        observations, actions, rewards, terminations, truncations = [obs], [], [], [], []
        for step in range(steps):
            actions.append(env.action_space.sample())
            obs, reward, terminated, truncated, _ = env.step(actions[-1])
            observations.append(obs)
            rewards.append(float(reward))
            terminations.append(terminated)
            truncations.append(truncated or step == steps - 1)
            if terminated or truncated:
                break
        if isinstance(obs, dict):
            observations = {key: np.stack([each[key] for each in observations]) for key in obs}
        buffers.append(EpisodeBuffer(number, number, None, observations, actions, rewards, terminations, truncations, None))
    known = dict(algorithm_name="random", author="t", author_email="t", code_permalink="t", description="t") | metadata
    minari.create_dataset_from_buffers(env_id, buffers, env=env, **known)
    return Path(os.environ["MINARI_DATASETS_PATH"]) / env_id
