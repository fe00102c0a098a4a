"""OGBench's ids: small files in its format, training and evaluation without a network, what is refused."""

import contextlib
import json
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from helpers import load_task, make_args
from ogbench.relabel_utils import relabel_dataset

import common
import dtql_continuous as dtql
import evaluation
import fql
import idql
import iql
import srpo
import tasks.make
from common import UserError
from tasks import ogbench

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_networks")]

IDS = (
    "antmaze-large-navigate-singletask-v0",
    "cube-single-play-singletask-task2-v0",
    "scene-play-singletask-v0",
    "puzzle-3x3-play-singletask-v0",
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path / "ogbench"))
    monkeypatch.setenv("OGBENCH_BASE_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(ogbench, "SOURCES", ())
    monkeypatch.setattr(ogbench, "MIRROR", None)
    (tmp_path / "ogbench").mkdir()
    return tmp_path / "ogbench"


def write(folder, env_id: str, trajectories: int = 4, length: int = 20):
    """A file in OGBench's format: random states of the environment itself; the third state of each trajectory is solved."""
    name, kind, number = ogbench.ID.fullmatch(env_id).groups()
    env = ogbench.make_env(f"{name}-singletask{number or ''}-v0")
    inner, rng, columns = env.unwrapped, np.random.default_rng(0), {}
    state = inner.data if "maze" in name else inner._data
    for _ in range(trajectories):
        obs, _ = env.reset(seed=0)
        for step in range(length):
            qpos = state.qpos.copy()
            buttons = getattr(inner, "_cur_button_states", np.zeros(0)).copy()
            if step == 2:
                if "maze" in name:
                    qpos[:2] = inner.cur_goal_xy
                else:
                    for i in range(getattr(inner, "_num_cubes", 0)):
                        qpos[14 + 7 * i : 17 + 7 * i] = state.mocap_pos[i]
                    if hasattr(inner, "_target_button_states"):
                        buttons = inner._target_button_states.copy()
                    if "scene" in name:
                        at = 14 + 7 * inner._num_cubes + inner._num_buttons
                        qpos[at : at + 2] = inner._target_drawer_pos, inner._target_window_pos
            action = rng.uniform(-1, 1, env.action_space.shape)
            row = dict(observations=obs, actions=action, qpos=qpos, qvel=state.qvel.copy(), terminals=step == length - 1)
            if len(buttons):
                row["button_states"] = buttons
            for key, value in row.items():
                columns.setdefault(key, []).append(value)
            obs = env.step(action)[0]
    env.close()
    arrays = {key: np.array(column, np.float32 if key != "button_states" else int) for key, column in columns.items()}
    np.savez(folder / f"{name}-{kind}-v0.npz", **arrays)


@pytest.mark.parametrize("env_id", IDS)
def test_masks_decide_the_bootstrap_and_a_run_ends(env_id, folder, tmp_path):
    write(folder, env_id)
    task = load_task(env_id)
    assert len(task.obs) == 4 * 19  # the last row of a trajectory has no successor
    solved = np.tile(np.arange(19) == 2, 4)
    np.testing.assert_array_equal(task.terminals, solved)
    np.testing.assert_array_equal(task.rewards[solved], 0)
    assert (task.rewards[~solved] < 0).all() and (task.rewards == np.round(task.rewards)).all()
    np.testing.assert_array_equal(task.obs[1:19], task.next_obs[:18])
    assert task.score(np.array([1.0])) == 100 and not task.sparse_goal

    result = dtql.main(make_args(tmp_path, env_id=env_id, eval_episodes=1, epochs=1))
    (row,) = result["rows"]
    assert row["score_mean"] in (0.0, 100.0) and row["length_mean"] > 1
    with open(f"{result['run_dir']}/config.json") as config:
        assert json.load(config)["versions"]["ogbench"] == "1.2.2"


@pytest.mark.parametrize(
    "gym_id", ["antmaze-teleport-singletask-v0", "antsoccer-arena-singletask-v0", "cube-single-singletask-v0"]
)
def test_evaluation_is_as_random_as_its_seeds(gym_id):
    """Also where the environment draws from numpy's global state, in any order of copies, with one worker and with two."""
    make_env = lambda: ogbench.make_env(gym_id)
    seeds = np.arange(4)

    def paths(workers: int, order: list[int]) -> dict[int, np.ndarray]:
        envs = evaluation.LockstepEnvs(make_env, seeds, workers)
        everyone, found = np.arange(4), []
        np.random.seed(workers)
        obs = envs.reset(everyone, seeds[order])
        for step in range(15):
            np.random.rand()
            found.append(obs)
            actions = np.random.default_rng(step).uniform(-1, 1, envs_actions)
            obs = envs.step(everyone, np.tile(actions, (4, 1)))[0]
        envs.close()
        return {int(seeds[order][i]): np.array([step[i] for step in found]) for i in range(4)}

    env = make_env()
    envs_actions = env.action_space.shape
    env.close()
    first, second, third = paths(1, [0, 1, 2, 3]), paths(1, [3, 1, 0, 2]), paths(2, [0, 1, 2, 3])
    for seed in first:
        np.testing.assert_array_equal(first[seed], second[seed])
        np.testing.assert_array_equal(first[seed], third[seed])
    if "cube" not in gym_id:
        assert not np.array_equal(first[0], first[1])


def test_the_wrapper_leaves_numpys_global_state_alone_and_ends_when_solved():
    env = ogbench.make_env("antmaze-teleport-singletask-v0")
    np.random.seed(5)
    expected = np.random.RandomState(5).rand(3)
    env.reset(seed=1)
    values = [np.random.rand()]
    env.step(env.action_space.sample())
    values += [np.random.rand(), np.random.rand()]
    np.testing.assert_array_equal(values, expected)

    class Solved(gym.Wrapper):
        def step(self, action):
            obs, reward, _, truncated, info = self.env.step(action)
            return obs, reward, False, truncated, info | {"success": 1.0}

    env.env = Solved(env.env)
    assert env.step(env.action_space.sample())[1:3] == (1.0, True)
    env.close()


@pytest.mark.parametrize(
    "env_id",
    [
        "visual-antmaze-large-navigate-singletask-v0",
        "antmaze-large-navigate-v0",
        "antmaze-large-singletask-v0",
        "cube-single-play-oraclerep-v0",
        "cube-single-play-v0",
        "powderworld-easy-play-singletask-v0",
        "antmaze-large-navigate-singletask-task6-v0",
    ],
)
def test_other_kinds_are_refused_by_name(env_id):
    with pytest.raises(UserError, match="state-based single tasks") as error:
        load_task(env_id)
    assert "\n" not in str(error.value)


def test_bad_files(folder, tmp_path):
    env_id = IDS[1]
    file = folder / "cube-single-play-v0.npz"
    with pytest.raises(UserError, match="put cube-single-play-v0.npz into"):
        load_task(env_id)
    file.write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read as an OGBench file"):
        load_task(env_id)
    np.savez(file, observations=np.zeros((5, 3)))
    with pytest.raises(UserError, match="cannot be read as an OGBench file"):
        load_task(env_id)
    write(folder, env_id)
    arrays = dict(np.load(file))
    np.savez(file, **arrays | {"observations": arrays["observations"][:, :5]})
    with pytest.raises(UserError, match="data of another task"):
        load_task(env_id)
    np.savez(file, **arrays | {"actions": np.full_like(arrays["actions"], np.nan)})
    with pytest.raises(UserError, match="NaN or infinite actions"):
        load_task(env_id)
    with pytest.raises(UserError, match="OGBench has no cube-none-singletask-v0"):
        load_task("cube-none-play-singletask-v0")


def test_settings():
    flags = lambda module, env_id: common.parse_args(module.Args, module.task_defaults, ["--env-id", env_id])
    args = flags(fql, "puzzle-3x3-play-singletask-v0")
    assert (args.alpha, args.gamma, args.total_steps, args.eval_every, args.eval_episodes) == (1000, 0.99, 10**6, 100, 50)
    assert (flags(fql, "cube-double-play-singletask-v0").alpha, flags(fql, IDS[0]).alpha) == (300, 10)
    assert flags(fql, IDS[0]).q_target == "min" and flags(fql, "humanoidmaze-medium-navigate-singletask-v0").gamma == 0.995
    assert flags(dtql, "antsoccer-arena-navigate-singletask-v0").gamma == 0.995
    assert flags(dtql, IDS[0]).batch_size == 256 and flags(dtql, "cube-single-play-singletask-v0").gamma == 0.99
    cube, maze = (flags(iql, env_id) for env_id in ("cube-single-play-singletask-v0", IDS[0]))
    assert [(args.layers, args.width, args.layer_norm) for args in (cube, maze)] == [(4, 256, True), (4, 512, True)]
    assert flags(fql, "antmaze-large-diverse-v2").alpha == 3 and flags(fql, "pen-human-v1").alpha == 10_000


# FQL's paper, Table 6 and Appendix E.2: IQL's beta, IDQL's candidates, SRPO's beta, FQL's alpha; the discount
STATED = {
    "antmaze-large-navigate": (10, 32, 0.3, 10, 0.99),
    "antmaze-giant-navigate": (10, 32, 0.3, 10, 0.995),
    "humanoidmaze-medium-navigate": (10, 32, 0.3, 30, 0.995),
    "humanoidmaze-large-navigate": (10, 32, 0.3, 30, 0.995),
    "cube-single-play": (1, 32, 0.03, 300, 0.99),
    "cube-double-play": (0.3, 32, 0.1, 300, 0.99),
    "scene-play": (10, 32, 0.1, 300, 0.99),
    "puzzle-3x3-play": (10, 32, 0.1, 1000, 0.99),
    "puzzle-4x4-play": (3, 32, 0.1, 1000, 0.99),
}


@pytest.mark.parametrize("name", STATED)
@pytest.mark.parametrize("number", ["", "-task3"])
def test_the_siblings_settings_are_those_that_are_stated(name, number):
    each = {module: module.task_defaults(f"{name}-singletask{number}-v0") for module in (iql, idql, srpo, fql)}
    gammas = {settings["gamma"] for settings in each.values()}
    found = each[iql]["beta"], each[idql]["num_candidates"], each[srpo]["beta"], each[fql]["alpha"], *gammas
    assert found == STATED[name]
    expectile = 0.9 if name.startswith(tasks.MANIPULATION) else 0.7
    assert each[iql]["expectile"] == 0.9 and each[idql]["expectile"] == each[srpo]["expectile"] == expectile
    assert (each[idql]["epochs"], each[idql]["eval_every"], each[fql]["epochs"]) == (3000, 250, 1000)
    assert dtql.task_defaults(f"{name}-singletask{number}-v0")["normalize"] == ("maze" in name)


# ---- data made at home -------------------------------------------------------------------------------------------------


def make(name: str, episodes: int = 2, **settings) -> None:
    tasks.make.main(tasks.make.Args(name, episodes=episodes, **{"workers": 1, **settings}))


@pytest.mark.parametrize(
    ("name", "env_id"),
    [
        ("pointmaze-medium-stitch-v0", "pointmaze-medium-stitch-singletask-v0"),
        ("cube-single-play-v0", "cube-single-play-singletask-v0"),
        ("scene-noisy-v0", "scene-noisy-singletask-v0"),
        ("puzzle-3x3-play-v0", "puzzle-3x3-play-singletask-task1-v0"),
    ],
)
def test_data_made_at_home_train_and_say_what_they_are(folder, tmp_path, capsys, monkeypatch, name, env_id):
    monkeypatch.setattr(tasks.make, "maker", tasks.make.maker_of(name), raising=False)
    monkeypatch.setattr(tasks.make, "make", lambda _, number, __: list(map(tasks.make.make_episode, range(number))))
    make(name)
    with np.load(folder / f"{name}.npz") as made, np.load(folder / f"{name}-val.npz") as val:
        length = 201 if "stitch" in name else 1001
        assert len(made["observations"]) == 2 * length and len(val["observations"]) == length
        np.testing.assert_array_equal(np.flatnonzero(made["terminals"]), [length - 1, 2 * length - 1])
        kinds = {key: made[key].dtype for key in made if key != "about"}
        floats = dict.fromkeys(("observations", "actions", "qpos", "qvel"), np.float32)
        states = {"button_states": np.int64} if name.startswith(("scene", "puzzle")) else {}
        assert kinds == {**floats, "terminals": bool, **states}
        assert np.abs(made["actions"]).max() <= 1 and json.loads(str(made["about"]))["seed"] == 0
        check_replay(name, made)
    result = dtql.main(make_args(tmp_path, env_id=env_id, eval_episodes=1, epochs=1, max_episode_steps=20))
    assert "made at home" in capsys.readouterr().out.splitlines()[-1] and len(result["rows"]) == 1
    task = load_task(env_id)
    assert task.max_copies == (64 if "maze" in name else 16)  # 64 robot arms would take 11 GiB
    with contextlib.closing(evaluation.make_envs(task._replace(max_copies=2), make_args(tmp_path, eval_episodes=3))) as envs:
        assert envs.num_copies == 2
    with pytest.raises(UserError, match="is there already"):
        make(name)


def check_replay(name: str, made) -> None:
    """In the file's states the environment gives the rewards that OGBench's relabelling computes from qpos and button_states."""
    kind = name.removesuffix("-v0").rpartition("-")[0]
    env = ogbench.make_env(f"{kind}-singletask-v0")
    relabelled = {key: made[key][::97] for key in ("qpos", "qvel", "button_states", "observations") if key in made}
    relabel_dataset(f"{kind}-singletask-v0", env, relabelled)
    inner = env.unwrapped
    for row, qpos in enumerate(relabelled["qpos"]):
        if "maze" in name:
            inner.set_xy(qpos[:2])
            reward = float(inner.compute_success()) - 1
        else:
            inner._data.qpos[:] = qpos
            if "button_states" in relabelled:
                inner._cur_button_states = relabelled["button_states"][row].copy()
            reward = inner.compute_reward()
        assert relabelled["rewards"][row] == reward, row
    env.close()


@pytest.mark.parametrize("name", ["puzzle-3x3-noisy-v0", "scene-play-v0", "pointmaze-teleport-navigate-v0"])
def test_an_episode_does_not_depend_on_those_before_it(name, monkeypatch):
    monkeypatch.setattr(tasks.make, "maker", tasks.make.maker_of(name), raising=False)
    alone = tasks.make.make_episode(7)
    for seed in (5, 7):
        again = tasks.make.make_episode(seed)
    for key, column in alone.items():
        np.testing.assert_array_equal(again[key], column)


def test_any_number_of_workers_makes_the_same_bytes(folder, monkeypatch):
    make("pointmaze-medium-stitch-v0", 5, workers=2)
    first = (folder / "pointmaze-medium-stitch-v0.npz").read_bytes()
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(folder / "again"))
    make("pointmaze-medium-stitch-v0", 5, workers=1)
    assert (folder / "again" / "pointmaze-medium-stitch-v0.npz").read_bytes() == first
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(folder / "third"))
    make("pointmaze-medium-stitch-v0", 5, seed=1)
    assert (folder / "third" / "pointmaze-medium-stitch-v0.npz").read_bytes() != first


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("antmaze-large-navigate-v0", {}, "needs a trained expert"),
        ("humanoidmaze-medium-stitch-v0", {}, "needs a trained expert"),
        ("cube-single-navigate-v0", {}, "cannot be made"),
        ("../cube-single-play-v0", {}, "cannot be made"),
        ("cube-single-play-v0", {"workers": 0}, "--workers must be at least 1"),
        ("cube-single-play-v0", {"episodes": 0}, "--episodes must be at least 1"),
    ],
)
def test_what_cannot_be_made(folder, name, settings, message):
    with pytest.raises(UserError, match=message):
        make(name, **settings)
    assert list(folder.iterdir()) == []


def test_no_room(folder, monkeypatch):
    monkeypatch.setattr(tasks.make.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="MiB may be needed and 0 are free"):
        make("pointmaze-medium-navigate-v0", 1000)
    assert not list(folder.glob("*.npz"))


def test_a_failed_download_says_how_to_make_the_file(folder):
    with pytest.raises(UserError, match="python -m tasks.make cube-double-noisy-v0"):
        load_task("cube-double-noisy-singletask-v0")
    with pytest.raises(UserError) as error:
        load_task("antmaze-large-navigate-singletask-v0")
    assert "tasks.make" not in str(error.value)


def test_sparse_rewards(folder):
    write(folder, "puzzle-3x3-play-singletask-v0")
    dense = load_task("puzzle-3x3-play-singletask-v0").rewards
    sparse = load_task("puzzle-3x3-play-singletask-v0", sparse_rewards=True).rewards
    assert dense.min() < -1 and set(np.unique(sparse)) == {-1, 0}
    np.testing.assert_array_equal(sparse == 0, dense == 0)
    with pytest.raises(UserError, match="--sparse-rewards is for OGBench"):
        load_task("dtql/pointmaze-umaze-v0", sparse_rewards=True)
