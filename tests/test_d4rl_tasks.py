"""The 26 D4RL tasks: registration, AntMaze's frame and physics, pen, kitchen, locomotion."""

import os
import pickle
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from helpers import ROOT, load_task, make_args, write_d4rl

import dtql_continuous as dtql
import evaluation
from common import UserError
from tasks import d4rl
from tasks.d4rl import TASKS

DIMENSIONS = {  # of observations and actions
    "halfcheetah": (17, 6),
    "hopper": (11, 3),
    "walker2d": (17, 6),
    "antmaze": (29, 8),
    "pen": (45, 24),
    "kitchen": (60, 9),
}


@pytest.fixture(scope="module", params=["umaze-v0", "medium-play-v2", "large-diverse-v2"])
def antmaze(request):
    env = gym.make(f"d4rl/antmaze-{request.param}")
    env.reset(seed=0)
    yield env
    env.close()


def make(env_id: str) -> gym.Env:
    return gym.make(gym.spec(f"d4rl/{env_id}"))


def test_there_are_26_ids_that_gym_makes_by_either_name():
    assert len(TASKS) == 26
    for env_id, task in TASKS.items():
        for name in (env_id, f"d4rl/{env_id}"):
            assert gym.spec(name).max_episode_steps == task.limit
    env = gym.make("antmaze-large-diverse-v0")
    obs, _ = env.reset(seed=0)
    assert obs.shape == (29,) and env.action_space.shape == (8,)
    assert isinstance(env.unwrapped, d4rl.AntMazeEnv)


def test_importing_twice_or_beside_another_registration_does_no_harm():
    code = (
        "import gymnasium as gym, importlib; gym.register('hopper-medium-v2', lambda: 'theirs');"
        "import tasks.d4rl; importlib.reload(tasks.d4rl); print(gym.spec('hopper-medium-v2').entry_point());"
        "print(gym.make('d4rl/hopper-medium-v2').unwrapped)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    theirs, ours = result.stdout.split("\n")[:2]
    assert theirs == "theirs" and "HopperEnv" in ours


@pytest.mark.parametrize("env_id", TASKS)
def test_spaces_fit_the_files(env_id):
    env, (obs_dim, action_dim) = make(env_id), DIMENSIONS[env_id.split("-")[0]]
    obs, _ = env.reset(seed=0)
    assert obs.shape == env.observation_space.shape == (obs_dim,)
    assert env.action_space.shape == (action_dim,)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    other, _ = make(env_id).reset(seed=0)
    np.testing.assert_array_equal(obs, other)  # seeding
    assert np.isfinite(env.step(env.action_space.sample())[0]).all()
    env.close()


# ---- AntMaze -------------------------------------------------------------------------------------------------------------


def test_ant_has_d4rls_physics(antmaze):
    model, env = antmaze.unwrapped.model, antmaze.unwrapped
    assert model.opt.timestep == 0.02 and env.frame_skip == 5 and env.dt == pytest.approx(0.1)
    assert (model.actuator_gear[:, 0] == 30).all()
    np.testing.assert_allclose(model.geom_solimp[:, :3], np.tile((0.8, 0.8, 0.01), (model.ngeom, 1)))
    env.data.ctrl[:] = 5.0  # beyond the limits of [-1, 1]
    env.do_simulation(np.ones(8), 1)
    assert env.data.actuator_force.max() <= 1 and np.abs(env.data.qfrc_actuator).max() == pytest.approx(30)
    antmaze.reset(seed=0)
    before = env.data.time
    antmaze.step(np.zeros(8))
    assert env.data.time - before == pytest.approx(0.1)


def test_the_frame_is_d4rls(antmaze):
    """Start cell at the origin, x along columns, y along rows (downwards in the map), 4 m cells, walls 2 m high."""
    env = antmaze.unwrapped
    rows = d4rl.MAZES[env.spec.kwargs["maze"]].split()
    obs, _ = antmaze.reset(seed=1)
    assert np.abs(obs[:2]).max() <= 0.1
    np.testing.assert_array_equal(obs, np.concatenate((env.data.qpos[:15], env.data.qvel[:14])))
    walls = {env.model.geom(i).name: env.model.geom(i) for i in range(env.model.ngeom)}
    assert sum(name.startswith("block") for name in walls) == "".join(rows).count("1")
    for row, line in enumerate(rows):
        for col, symbol in enumerate(line):
            if symbol == "1":
                np.testing.assert_allclose(walls[f"block_{row}_{col}"].pos, (4 * (col - 1), 4 * (row - 1), 1))
                np.testing.assert_allclose(walls[f"block_{row}_{col}"].size, (2, 2, 1))


def test_pushed_east_x_grows(antmaze):
    env = antmaze.unwrapped
    antmaze.reset(seed=0)
    qpos, qvel = env.init_qpos.copy(), env.init_qvel.copy()
    qvel[0] = 3.0
    env.set_state(qpos, qvel)
    obs = [antmaze.step(np.zeros(8))[0] for _ in range(10)][-1]
    assert obs[0] > 0.5 and abs(obs[1]) < 0.3


@pytest.mark.parametrize(("maze", "cell"), [("umaze", (0, 8)), ("medium", (20, 20)), ("large", (32, 24))])
def test_goals_lie_at_the_goal_cell(maze, cell):
    name = {"umaze": "umaze", "medium": "medium-play", "large": "large-play"}[maze]
    env = make(f"antmaze-{name}-v2")
    goals = []
    for seed in range(300):
        env.reset(seed=seed)
        goals.append(env.unwrapped.target_goal - cell)
    goals = np.array(goals)
    assert (goals >= 0).all() and (goals <= 1.5).all()
    np.testing.assert_allclose(goals.mean(0), 0.75, atol=0.08)
    np.testing.assert_allclose(goals.var(0), 1 / 12 + 0.25 / 12, atol=0.03)


def test_v0_keeps_its_goal_and_v2_does_not_and_nothing_else_differs():
    v0, v2 = make("antmaze-umaze-v0"), make("antmaze-umaze-v2")
    goals = {"v0": [], "v2": []}
    for name, env in (("v0", v0), ("v2", v2)):
        for seed in (5, 6, 7):
            env.reset(seed=seed)
            goals[name].append(tuple(env.unwrapped.target_goal))
    assert len(set(goals["v0"])) == 1 and len(set(goals["v2"])) == 3
    assert make("antmaze-umaze-v0").unwrapped.target_goal is None
    for field in (
        "body_mass",
        "body_inertia",
        "geom_pos",
        "geom_size",
        "geom_solimp",
        "jnt_range",
        "actuator_gear",
        "dof_damping",
    ):
        np.testing.assert_array_equal(getattr(v0.unwrapped.model, field), getattr(v2.unwrapped.model, field))
    qpos, qvel = v0.unwrapped.init_qpos, v0.unwrapped.init_qvel
    steps = []
    for env in (v0, v2):
        env.unwrapped.set_state(qpos, qvel)
        steps.append([env.step(np.full(8, 0.3))[0] for _ in range(20)][-1])
    np.testing.assert_array_equal(*steps)


def test_reaching_the_goal_pays_1_and_ends_the_episode(antmaze):
    env = antmaze.unwrapped
    antmaze.reset(seed=3)
    for distance, reached in ((0.55, False), (0.45, True)):
        qpos = env.init_qpos.copy()
        qpos[:2] = env.target_goal - (distance, 0)
        env.set_state(qpos, env.init_qvel * 0)
        _, reward, terminated, truncated, info = antmaze.step(np.zeros(8))
        assert (reward, terminated, info["success"]) == (float(reached), reached, reached)


def test_a_fallen_ant_goes_on_until_the_limit():
    env = make("antmaze-umaze-v2")
    env.reset(seed=0)
    qpos = env.unwrapped.init_qpos.copy()
    qpos[3:7] = (0, 1, 0, 0)  # upside down
    env.unwrapped.set_state(qpos, env.unwrapped.init_qvel)
    for step in range(1, 701):
        _, reward, terminated, truncated, _ = env.step(np.zeros(8))
        assert reward == 0 and not terminated and truncated == (step == 700)


def test_resets_are_d4rls():
    env = make("antmaze-umaze-v2")
    starts = np.array([env.reset(seed=seed)[0] for seed in range(300)])
    offsets = starts[:, :15] - env.unwrapped.init_qpos
    assert np.abs(offsets).max() <= 0.1 and offsets.std() == pytest.approx(0.2 / np.sqrt(12), rel=0.05)
    assert starts[:, 15:].std() == pytest.approx(0.1, rel=0.05)


def test_antmaze_pickles():
    env = d4rl.AntMazeEnv("umaze", True)
    env.reset(seed=0)
    copy = pickle.loads(pickle.dumps(env))
    assert copy.resample_goal and copy.model.nq == env.model.nq


# ---- pen, kitchen, locomotion ----------------------------------------------------------------------------------------------


def test_pen_ends_when_dropped_and_after_100_steps():
    env = make("pen-human-v1")
    env.reset(seed=0)
    heights, terminated, truncated = [], False, False
    while not (terminated or truncated):
        obs, _, terminated, truncated, _ = env.step(-np.ones(24))
        heights.append(obs[26])
    assert terminated == (heights[-1] < 0.075) and all(height >= 0.075 for height in heights[:-1])
    lengths = []
    for seed in range(6):
        env.reset(seed=seed)
        for step in range(1, 101):
            obs, _, terminated, truncated, _ = env.step(env.action_space.sample() * (seed < 3))
            assert terminated == (obs[26] < 0.075)
            if terminated or truncated:
                break
        lengths.append((step, terminated))
    assert any(dropped for _, dropped in lengths) and all(step == 100 or dropped for step, dropped in lengths)


@pytest.mark.parametrize(
    ("env_id", "elements"),
    [
        ("kitchen-complete-v0", {19: 0.37, 17: -0.69, 18: -0.05}),
        ("kitchen-partial-v0", {19: 0.37, 17: -0.69, 18: -0.05}),
        ("kitchen-mixed-v0", {11: -0.88, 12: -0.01, 17: -0.69, 18: -0.05}),
    ],
)
def test_kitchen_observation_goal_and_return(env_id, elements):
    env = make(env_id)
    obs, _ = env.reset(seed=0)
    goal = np.zeros(30)
    goal[[22, 23, 24, 25, 26, 27, 28, 29]] = (-0.75, -0.23, 0.75, 1.62, 0.99, 0, 0, -0.06)  # microwave, kettle
    goal[list(elements)] = list(elements.values())
    np.testing.assert_array_equal(obs[30:], goal)
    qpos = env.unwrapped.robot_env.data.qpos
    np.testing.assert_allclose(obs[9:30], qpos[9:30], atol=1e-3)  # objects
    noise = np.array([env.reset(seed=seed)[0][:9] for seed in range(40)]) - qpos[:9]
    assert 0.001 < np.abs(noise).max() <= 0.1001  # the robot's joints, with D4RL's noise of 0.1 x 0.1

    robot, total = env.unwrapped.robot_env, 0.0
    indices = {name: d4rl_tasks_indices()[name] for name in env.unwrapped.goal}
    for done, (name, where) in enumerate(indices.items(), start=1):
        state = robot.data.qpos.copy()
        state[where] = env.unwrapped.goal[name]
        robot.set_state(state, robot.data.qvel * 0)
        _, reward, terminated, truncated, _ = env.step(np.zeros(9))
        total += reward
        assert total == done and terminated == (done == 4) and not truncated
    env.close()


def d4rl_tasks_indices() -> dict:
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_INDICES

    return OBS_ELEMENT_INDICES


def test_kitchen_episodes_last_280_steps():
    env = make("kitchen-mixed-v0")
    env.reset(seed=0)
    flags = [env.step(np.zeros(9))[2:4] for _ in range(280)]
    assert flags[-1] == (False, True) and not any(truncated for _, truncated in flags[:-1])


@pytest.mark.parametrize(
    ("env_id", "reference"),
    [("hopper-medium-v2", "Hopper-v4"), ("walker2d-medium-v2", "Walker2d-v4"), ("halfcheetah-medium-v2", "HalfCheetah-v4")],
)
def test_locomotion_is_gymnasiums_v4(env_id, reference):
    ours, theirs = make(env_id), gym.make(reference)
    np.testing.assert_array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    theirs.action_space.seed(0)
    for _ in range(15):
        action = theirs.action_space.sample()
        a, b = ours.step(action), theirs.step(action)
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1:4] == b[1:4]


# ---- the table, and training on each family --------------------------------------------------------------------------------


def test_files_and_scores_of_the_table():
    assert TASKS["walker2d-medium-replay-v2"].path == "gym_mujoco_v2/walker2d_medium_replay-v2.hdf5"
    v0, v2 = TASKS["antmaze-large-diverse-v0"], TASKS["antmaze-large-diverse-v2"]
    assert v0.path == "ant_maze_new/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse.hdf5"
    assert v2.path == "ant_maze_v2/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5"
    assert {task.limit for name, task in TASKS.items() if "umaze" in name} == {700}
    assert TASKS["pen-cloned-v1"].min_score == 96.262799 and TASKS["pen-cloned-v1"].max_score == 3076.8331017826877


def test_the_page_lists_every_row_of_the_table():
    page = (ROOT / "docs" / "tasks.md").read_text()
    for env_id, task in TASKS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{env_id}` |"))
        for cell in (f"`{task.file}`", f" {task.min_score:g} to {task.max_score:g} ", f" {task.limit} ", task.minari or "none"):
            assert cell in row, (env_id, cell)


@pytest.mark.parametrize("env_id", ["antmaze-umaze-v0", "antmaze-large-diverse-v0", "pen-cloned-v1", "kitchen-mixed-v0"])
def test_every_family_trains_and_is_evaluated_in_its_environment(env_id, tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    task = TASKS[env_id]
    timeouts = None if env_id.startswith("kitchen") else np.arange(600) % 50 == 49
    obs_dim, action_dim = DIMENSIONS[env_id.split("-")[0]]
    rewards = np.zeros(600, np.float32) if env_id.startswith("antmaze") else np.ones(600, np.float32)
    write_d4rl(tmp_path / task.file, 600, obs_dim, action_dim, timeouts=timeouts, rewards=rewards)
    spec = gym.spec(f"d4rl/{env_id}")
    monkeypatch.setattr(spec, "max_episode_steps", 15)
    args = make_args(
        tmp_path,
        **{
            **dtql.task_defaults(env_id),
            **dict(
                env_id=env_id, pretrain_epochs=0, epochs=1, steps_per_epoch=5, eval_episodes=3, num_candidates=4, batch_size=32
            ),
        },
    )
    (row,) = dtql.main(args)["rows"]
    assert row["score_mean"] == pytest.approx(100 * (row["return_mean"] - task.min_score) / (task.max_score - task.min_score))
    assert 0 < row["length_mean"] <= 15


def test_a_file_of_another_task_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    file = write_d4rl(tmp_path / TASKS["kitchen-mixed-v0"].file, obs_dim=59, action_dim=9)
    with pytest.raises(UserError, match="data of another task") as error:
        load_task("kitchen-mixed-v0")
    assert str(file) in str(error.value)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_antmaze_evaluation_in_worker_processes_is_the_same_and_ends_them():
    seeds = evaluation.episode_seeds([0], 1, 5)
    results = []
    for workers in (1, 2):
        envs = evaluation.LockstepEnvs(lambda: gym.wrappers.TimeLimit(d4rl.AntMazeEnv("umaze", True), 20), range(3), workers)
        act = lambda obs: np.sin(np.arange(8) + obs[..., :1]).astype(np.float32)
        results.append(evaluation.run_episodes(envs, act, seeds))
        envs.close()
        assert not any(process.is_alive() for process in envs.processes)
    np.testing.assert_array_equal(results[0], results[1])
