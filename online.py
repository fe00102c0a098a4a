"""Learning online: transitions collected by K models in K environments, beside the data."""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn as nn
import tyro
from torch import Tensor

import common
import evaluation
import stacked
from common import check
from stacked import Batch, Transitions


@dataclass
class Args(common.Args):
    """The arguments of every script with an online phase."""

    online_steps: int = 20_000
    """steps in the environment after the offline phase, with an update each"""
    warmup_steps: int = 0
    """steps in the environment before the first of --online-steps, without updates"""
    offline: Annotated[str | None, tyro.conf.arg(name="from", metavar="RUN_DIR")] = None
    """run of dtql_continuous.py with the same task and networks, which takes the place of the offline phase"""

    def check(self) -> None:
        """Raise UserError for invalid settings."""
        super().check()
        check(0 <= self.online_steps <= 1e9, f"--online-steps must not be negative, not {self.online_steps}")
        check(0 <= self.warmup_steps <= 1e9, f"--warmup-steps must not be negative, not {self.warmup_steps}")

    @property
    def offline_steps(self) -> int:
        """Updates before the online phase."""
        return self.pretrain_steps + self.epochs * self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.offline_steps + self.online_steps

    def evaluated_at(self, step: int) -> bool:
        """As offline, at the end of the offline phase, and after 1/8, 1/4, 1/2 and all of the online steps."""
        if step < self.offline_steps:
            return super().evaluated_at(step)
        return step - self.offline_steps in (0, *(self.online_steps // part for part in (8, 4, 2, 1)))

    def phase(self, step: int) -> str:
        """The phase that an evaluation after `step` updates belongs to."""
        return "offline" if step <= self.offline_steps else "online"


class Replay(nn.Module):
    """The data, and the transitions that each model has collected, of which there are `size`. The rows are not in its state."""

    def __init__(self, data: Transitions, num_models: int, steps: int):
        """Room for `steps` transitions of each model."""
        super().__init__()
        self.data, device = data, data.rows.device
        self.rows = torch.zeros(num_models, max(1, steps), data.rows.shape[1], device=device)
        self.register_buffer("size", torch.zeros((), dtype=torch.long, device=device))
        self.register_buffer("checksum", torch.zeros((), dtype=torch.long, device=device))  # of the rows on disk
        self.register_buffer("episode_steps", torch.zeros(num_models, dtype=torch.long, device=device))  # of each running episode

    def sample(self, num_models: int, batch_size: int, ratio: float | None = None) -> Batch:
        """Minibatches (K, B), with static shapes; `ratio`: the share of the data, else all transitions are equally likely."""
        data, n = self.data.rows, len(self.data.rows)
        u = torch.rand(num_models, batch_size, device=data.device)
        if ratio is None:
            index = (u * (n + self.size)).long()
        else:
            from_data = torch.arange(batch_size, device=data.device) < round(ratio * batch_size)
            index = torch.where(from_data, (u * n).long(), n + (u * self.size).long())
        index = torch.minimum(index, n + self.size - 1)  # u * m may round up to m
        old, new = data[index.clamp(max=n - 1)], self.rows.take_along_dim((index - n).clamp(min=0)[..., None], 1)
        return self.data.columns(torch.where((index < n)[..., None], old, new))


class Collector:
    """K environments, one per model, that step together; what is seen in them goes to the agent's `replay`.

    A resumed run brings them back to where they were: each episode has its seed, and its actions are the last rows.
    """

    def __init__(self, agent: Any, task: Any, transform: Callable[[np.ndarray], np.ndarray], run_dir: Path):
        """agent: with `replay` and `explore(obs (K, 1, S), generator) -> actions (K, 1, A)`. transform: of the rewards."""
        self.agent, self.task, self.transform, self.replay, self.saved = agent, task, transform, agent.replay, 0
        self.size, self.steps = int(self.replay.size), self.replay.episode_steps.cpu().numpy().copy()
        self.everyone, self.generator = np.arange(len(self.steps)), stacked.default_generator(self.replay.size.device)
        instances = np.random.SeedSequence([agent.args.seed, 1]).generate_state(len(self.steps))
        self.envs = evaluation.LockstepEnvs(task.make_env, instances)
        self.obs = task.normalized(self.envs.reset(self.everyone, self.seeds(self.everyone)))
        if self.size:
            self.restore(run_dir)

    def seeds(self, which: np.ndarray) -> np.ndarray:
        """Seeds of the episodes that run: of the model, and of the step at which each began."""
        pairs = [(self.agent.args.model_seeds[model], int(self.size - self.steps[model])) for model in which]
        return np.array([np.random.SeedSequence([seed, 1, begun]).generate_state(1)[0] for seed, begun in pairs])

    def to_env(self, actions: Tensor) -> np.ndarray:
        return evaluation.to_env_units(actions.cpu().numpy(), self.task.action_low, self.task.action_high)

    def step(self) -> None:
        """One step of every environment."""
        device = self.agent.device
        obs = torch.as_tensor(self.obs, device=device)
        actions = self.agent.explore(obs[:, None], self.generator)[:, 0]
        next_obs, _, done, terminated, rewards = self.envs.step(self.everyone, self.to_env(actions))
        next_obs = self.task.normalized(next_obs)
        outcome = np.column_stack([self.transform(rewards), terminated, next_obs]).astype(np.float32)
        self.replay.rows[:, self.size] = torch.cat([obs, actions, torch.as_tensor(outcome, device=device)], 1)
        self.size += 1
        self.replay.size.fill_(self.size)
        self.steps += 1
        self.steps[done], self.obs = 0, next_obs
        self.replay.episode_steps.copy_(torch.as_tensor(self.steps))
        if done.any():
            self.obs[done] = self.task.normalized(self.envs.reset(self.everyone[done], self.seeds(self.everyone[done])))

    def save(self, run_dir: Path) -> None:
        """Append the new rows to online.f32 beside the checkpoint, which says how many of them count."""
        rows = self.replay.rows[:, self.saved : self.size].transpose(0, 1).contiguous().cpu().numpy().tobytes()
        with open(run_dir / "online.f32", "ab") as file:
            file.truncate(self.saved * self.replay.rows[:, 0].nbytes)  # rows after the checkpoint of a run that was killed
            file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        self.replay.checksum.fill_(zlib.crc32(rows, int(self.replay.checksum)))
        self.saved = self.size

    def restore(self, run_dir: Path) -> None:
        """Read the rows of a run that is resumed, and play the episodes that were running up to where they were."""
        rows, file = self.replay.rows, run_dir / "online.f32"
        saved = np.fromfile(file, np.float32, self.size * rows[:, 0].numel()) if file.exists() else b""
        check(zlib.crc32(saved) == self.replay.checksum, f"{file} is missing, cut off or damaged: the run cannot be resumed")
        rows[:, : self.size] = torch.as_tensor(saved.reshape(self.size, *rows[:, 0].shape), device=rows.device).transpose(0, 1)
        self.saved, start = self.size, self.obs.shape[1]
        for ago in range(int(self.steps.max()), 0, -1):
            running = self.everyone[self.steps >= ago]
            actions = rows[running, self.size - ago, start : start + len(self.task.action_low)]
            self.obs[running] = self.task.normalized(self.envs.step(running, self.to_env(actions))[0])


def load_offline(agent: Any, run_dir: str) -> None:
    """Take networks and optimizers of a run of dtql_continuous.py. Raises UserError if they do not fit."""
    saved = common.open_checkpoint(Path(run_dir) / "checkpoint.pt", agent.device)
    check(saved["exp_name"] == "dtql_continuous", f"--from {run_dir} is not a run of dtql_continuous.py: give one that is")
    same, task = saved["args"]["env_id"] == agent.args.env_id, saved["args"]["env_id"]
    check(same, f"--from {run_dir} was trained on {task}, not {agent.args.env_id}: give a run on this task")
    same = saved["args"].get("normalize", False) == agent.args.normalize
    check(same, f"--from {run_dir}: its --normalize differs from this run's: give the same")
    try:
        own = {name: value for name, value in stacked.state_of(agent).items() if name.startswith("replay.")}
        stacked.load_state(agent, own | saved["agent"])
    except ValueError as error:
        raise common.UserError(f"--from {run_dir}: {error}: give the flags of that run") from None
