"""`--data`: files of one's own, with an environment and without one; what is refused, with the question that is open."""

import json
import os

import gymnasium as gym
import h5py
import numpy as np
import pytest
from helpers import FLAGS, load_task, make_args, run_here, run_script

import dtql_continuous as dtql
import evaluation
import fql
import iql
from common import UserError


def columns(rows: int = 60, obs_dim: int = 3, action_dim: int = 1, length: int = 20) -> dict[str, np.ndarray]:
    """Trajectories of Pendulum's shapes; every second one ends in a terminal, the others are cut."""
    rng, last = np.random.default_rng(0), np.arange(1, rows + 1) % length == 0
    second = np.arange(rows) // length % 2 == 1
    return dict(
        observations=rng.standard_normal((rows, obs_dim)).astype(np.float32),
        actions=rng.uniform(-2, 2, (rows, action_dim)).astype(np.float32),
        rewards=rng.standard_normal(rows),
        terminals=last & second,
        timeouts=last & ~second,
    )


def save(file, **arrays):
    if file.suffix == ".npz":
        np.savez(file, **arrays)
    else:
        with h5py.File(file, "w") as target:
            for key, array in arrays.items():
                target[key] = array
    return str(file)


@pytest.mark.parametrize("name", ["log.npz", "log.hdf5"])
def test_transitions(tmp_path, name):
    arrays = columns()
    task = load_task(env_id="Pendulum-v1", data=save(tmp_path / name, **arrays))
    kept = np.flatnonzero(~arrays["timeouts"])  # the last row is cut here, and so gone
    np.testing.assert_array_equal(task.obs, arrays["observations"][kept])
    np.testing.assert_array_equal(task.next_obs[:-1], arrays["observations"][kept[:-1] + 1])
    np.testing.assert_array_equal(task.terminals, arrays["terminals"][kept])
    np.testing.assert_allclose(task.actions, arrays["actions"][kept] / 2, atol=1e-6)
    np.testing.assert_allclose(task.rewards, arrays["rewards"][kept], rtol=1e-6)
    assert task.score_name == "return" and task.score(np.array([3.0])) == 3


def test_the_last_row_stays_if_it_is_terminal(tmp_path):
    arrays = columns(40)
    del arrays["timeouts"]
    task = load_task(env_id="Pendulum-v1", data=save(tmp_path / "a.npz", **arrays))
    assert len(task.obs) == 40 and task.terminals[-1] == 1
    task = load_task(env_id="Pendulum-v1", data=save(tmp_path / "a.npz", **columns(50)))
    assert len(task.obs) == 50 - 1 - 1  # one timeout, and the last row, which is neither


def test_next_observations_are_taken_as_they_are(tmp_path):
    arrays = columns()
    arrays["next_observations"] = arrays["observations"] + 1
    task = load_task(env_id="Pendulum-v1", data=save(tmp_path / "a.npz", **arrays))
    assert len(task.obs) == 60  # a cut row has a next observation, and bootstraps
    np.testing.assert_array_equal(task.next_obs, task.obs + 1)


def test_d4rls_score_and_settings_go_with_its_id(tmp_path):
    arrays = columns(60, 11, 3)
    arrays["actions"] /= 2
    task = load_task("hopper-medium-v2", data=save(tmp_path / "a.npz", **arrays))
    assert task.score_name == "D4RL normalised score"


@pytest.mark.slow
@pytest.mark.parametrize("module", [dtql, iql, fql])
def test_trains_and_evaluates(tmp_path, module):
    file = save(tmp_path / "log.npz", **columns())
    result = module.main(make_args(tmp_path, module, env_id="Pendulum-v1", data=file, eval_episodes=1))
    assert len(result["rows"]) == 1 and result["rows"][0]["length_mean"] == 200


@pytest.mark.slow
def test_without_an_environment(tmp_path, capsys):
    """The command line: losses, a checkpoint and a policy in the data's units, and no evaluation; resumed too."""
    file = save(tmp_path / "arm.hdf5", **columns())
    result = run_script("--data", file, *FLAGS, "--pretrain-epochs=1", "--run-dir", tmp_path / "runs")
    assert result.returncode == 0, result.stderr
    assert "action bounds are the range of" in result.stdout and "without a score" in result.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("arm__dtql_continuous__0__")
    assert not (run_dir / "eval.csv").exists() and (run_dir / "checkpoint.pt").exists()
    assert json.loads((run_dir / "config.json").read_text())["args"]["env_id"] == ""
    again = run_script("--resume", run_dir)
    assert again.returncode == 0, again.stderr
    actions, own = dtql.load_policy(str(run_dir / "checkpoint.pt"))(columns()["observations"]), columns()["actions"]
    assert actions.shape == (60, 1) and own.min() <= actions.min() and actions.max() <= own.max()


def test_given_bounds(tmp_path):
    file = save(tmp_path / "a.npz", **columns(action_dim=2))
    task = load_task(data=file, action_low=(-4.0,), action_high=(4.0, 8.0))
    np.testing.assert_array_equal(task.action_low, [-4, -4])
    np.testing.assert_array_equal(task.action_high, [4, 8])
    np.testing.assert_allclose(task.actions[0], 2 * (columns(action_dim=2)["actions"][0] + 4) / [8, 12] - 1, rtol=1e-5)


ONES = np.ones(60)


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        (None, {}, "no such file"),
        (b"text", {}, "cannot read .*damaged"),
        (dict(rewards=None), {}, "lacks rewards"),
        (dict(observations=np.array([["a"] * 3] * 60)), {}, "not numbers"),
        (dict(observations=np.zeros((60, 4, 4))), {}, "flatten each row"),
        (dict(actions=np.zeros(60)), {}, r"Save it as \(N, 1\)"),
        (dict(actions=np.zeros((60, 1), int)), {}, "discrete"),
        (dict(rewards=np.zeros(59)), {}, "which belong together"),
        (dict(terminals=2 * ONES), {}, "values other than 0 and 1"),
        (dict(terminals=ONES, timeouts=ONES), {}, "or only the recording"),
        (dict(terminals=0 * ONES, timeouts=None), {}, "where does a trajectory end"),
        (dict(next_observations=np.zeros((60, 2))), {}, "differ in shape"),
        (dict(rewards=np.full(60, np.nan)), {}, "NaN or infinite rewards"),
        (dict(actions=np.ones((60, 1))), {}, "what are the bounds"),
        ({}, dict(action_low=(-1.0,), action_high=(1.0,)), "outside the given bounds"),
        ({}, dict(action_low=(-1.0,)), "belong together"),
        ({}, dict(action_low=(-1.0, 0.0), action_high=(1.0,)), "one for all, or one for each"),
        ({}, dict(action_low=(1.0,), action_high=(-1.0,)), "the upper ones larger"),
        ({}, dict(env_id="Nothing-v7"), "must be a registered Gymnasium id"),
        ({}, dict(env_id="CartPole-v1"), "bounded vector"),
        ({}, dict(env_id="MountainCarContinuous-v0"), "data of another task"),
        ({}, dict(env_id="Pendulum-v1", action_low=(-1.0,), action_high=(1.0,)), "has its own bounds"),
    ],
)
def test_bad_data_is_refused_with_its_question(tmp_path, changes, flags, message):
    file = tmp_path / "log.npz"
    if isinstance(changes, bytes):
        file.write_bytes(changes)
    elif changes is not None:
        save(file, **{key: value for key, value in (columns() | changes).items() if value is not None})
    with pytest.raises(UserError, match=message) as error:
        dtql.main(make_args(tmp_path, **{"env_id": "", "data": str(file), **flags}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["truncations", "truncated", "timeouts"])
def test_gymnasiums_names_for_ends_are_read(tmp_path, name):
    arrays = columns()
    arrays[name] = arrays.pop("timeouts")[:, None]
    arrays["terminations"] = arrays.pop("terminals")
    arrays["infos"] = np.random.default_rng(0).standard_normal((60, 7))
    task = load_task("Pendulum-v1", data=save(tmp_path / "a.npz", **arrays))
    kept = np.flatnonzero(~columns()["timeouts"])
    np.testing.assert_array_equal(task.obs, arrays["observations"][kept])


@pytest.mark.parametrize("name", ["dones", "episode_ends", "is_last", "final"])
def test_unknown_columns_that_could_be_ends_are_asked_about(tmp_path, name, capsys):
    arrays = columns()
    arrays[name] = arrays["timeouts"]
    with pytest.raises(UserError, match=f"does {name}, a column of 0 and 1, mark ends of episodes"):
        load_task("Pendulum-v1", data=save(tmp_path / "a.hdf5", **arrays))
    arrays[name] = np.arange(60.0)
    load_task("Pendulum-v1", data=save(tmp_path / "b.hdf5", **arrays))
    assert f"not used: {name}" in capsys.readouterr().err


def test_a_file_in_which_no_trajectory_ends(tmp_path):
    arrays = columns() | dict(terminals=np.zeros(60), timeouts=np.zeros(60))
    with pytest.raises(UserError, match="where does a trajectory end"):
        load_task("Pendulum-v1", data=save(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [(-1e10, 1e10, "too wide for float32"), (-np.inf, np.inf, "must be finite"), (1.0, 1.0, "the upper ones larger"),
     (-4.0, 4.0, None), (-2.0, 1e4, None)],
)  # fmt: skip
def test_wide_and_odd_bounds(tmp_path, low, high, message):
    file = save(tmp_path / "a.npz", **columns())
    if message:
        with pytest.raises(UserError, match=message):
            load_task(data=file, action_low=(low,), action_high=(high,))
    else:
        task, actions = load_task(data=file, action_low=(low,), action_high=(high,)), columns()["actions"]
        restored = evaluation.to_env_units(task.actions, task.action_low, task.action_high)
        np.testing.assert_allclose(restored, actions[np.flatnonzero(~columns()["timeouts"])], atol=1e-3 * np.ptp(actions))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_never_leave_the_bounds_and_have_their_dtype(dtype):
    rng = np.random.default_rng(0)
    low = rng.uniform(-3, 0, 1000).astype(dtype)
    high = (low + rng.uniform(0.1, 3, 1000)).astype(dtype)
    space = gym.spaces.Box(low, high, dtype=dtype)
    for value in (-1.0, 1.0, 0.3):
        assert space.contains(evaluation.to_env_units(np.full(1000, value, np.float32), space.low, space.high))


class Wrong(gym.Env):
    """An environment with one thing wrong."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-2.0, 2.0, (1,))

    def __init__(self, what: str):
        self.what = what
        if what == "integers":
            self.action_space = gym.spaces.Box(-2, 2, (1,), np.int64)

    def reset(self, seed=None, options=None):
        return np.zeros(1 if self.what == "shape" else 3), {}

    def step(self, action):
        if self.what == "exit":
            raise SystemExit(0)
        if self.what == "vanish":
            os._exit(0)
        if self.what == "error":
            raise ZeroDivisionError("by zero")
        obs = np.full(3, np.nan) if self.what == "nan" else np.zeros(3)
        reward = np.zeros(1) if self.what == "reward" else 0.0
        return (obs, reward, True, {}) if self.what == "old" else (obs, reward, True, False, {})


@pytest.mark.parametrize(
    ("what", "message"),
    [("shape", r"of shape \(1,\), not \(3,\)"), ("exit", "SystemExit"), ("vanish", "has died"),
     ("error", "ZeroDivisionError: by zero.*test_own_data.py:"), ("nan", "NaN"), ("reward", "not one finite number"),
     ("old", "ValueError"), ("integers", "vector of floats")],
)  # fmt: skip
def test_an_environment_that_is_wrong_is_found_before_training(tmp_path, what, message):
    gym.register("Wrong-v0", lambda: Wrong(what), disable_env_checker=True, order_enforce=False)
    file = save(tmp_path / "a.npz", **columns())
    with pytest.raises(UserError, match=message):
        dtql.main(make_args(tmp_path, env_id="Wrong-v0", data=file))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("limit", [None, 10**6])
def test_an_environment_that_hardly_ever_ends(tmp_path, capsys, limit):
    gym.register("Endless-v0", lambda: Wrong("nothing"), max_episode_steps=limit, disable_env_checker=True)
    settings = dict(env_id="Endless-v0", data=save(tmp_path / "a.npz", **columns()))
    load_task(**settings)
    assert f"note: the environment {'cuts' if limit else 'never cuts'}" in capsys.readouterr().err
    env = load_task(**settings, max_episode_steps=7).make_env()
    assert env.spec.max_episode_steps == 7 and "note:" not in capsys.readouterr().err


def test_own_data_may_move(tmp_path, monkeypatch):
    """A run resumes in another working folder, and with data that has moved; not with other data."""
    save(tmp_path / "log.npz", **columns())
    monkeypatch.chdir(tmp_path)
    run_dir = dtql.main(make_args(tmp_path, env_id="", data="log.npz"))["run_dir"]
    monkeypatch.chdir("/")
    run_here(dtql, "--resume", run_dir)
    (tmp_path / "log.npz").rename(tmp_path / "moved.npz")
    run_here(dtql, "--resume", run_dir, "--data", tmp_path / "moved.npz")
    save(tmp_path / "moved.npz", **columns(50))
    with pytest.raises(UserError, match="not the data"):
        run_here(dtql, "--resume", run_dir, "--data", tmp_path / "moved.npz")


@pytest.mark.slow
def test_bounds_without_data_are_refused(hopper, tmp_path):
    result = run_script("--env-id", "hopper-medium-v2", "--action-low", "0", "--run-dir", tmp_path / "runs")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "belong to --data" in result.stderr
