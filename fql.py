"""Flow Q-Learning (FQL): a flow policy clones the data, a one-step policy is distilled from it and improves on it.

Park, Li and Levine, 2025. A flow-matching policy learns to carry Gaussian noise to the data's actions; the one-step policy,
which is deployed, should take the same noise to where the flow takes it, and to a large Q.

It differs from `dtql_continuous.py` in these points:

1. The policy that clones is a flow, integrated in 10 steps of Euler, not a diffusion model; there is no pretraining.
2. The one-step policy stays near it by regression on its samples, noise by noise, in place of the trust region; it is a
   network of state and noise, with neither entropy nor NLL.
3. Q is learned from the one-step policy's actions (SARSA-like), with the mean of the target Qs, without V.
4. One sample is deployed, and no candidates are compared.

Shapes: K models with minibatches of B; obs (K, B, S), actions (K, B, A) in [-1, 1], noise (K, B, A), time (K, B, 1),
rewards, terminals (K, B), both Qs (K, 2, B).
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import common
import evaluation
import stacked
import tasks
from best_of import BestOf
from common import check
from run_folder import Run
from stacked import Batch, LayerNorm, Linear, Metrics, Transitions
from tasks import Task


@dataclass
class Args(common.Args):
    """Flow Q-Learning (FQL). The defaults shown are those of the given task."""

    sweep = ("alpha",)

    # Algorithm specific arguments
    alpha: float | tuple[float, ...] = 3.0
    """weight of the distillation: large clones, small improves"""
    q_target: Literal["mean", "min"] = "mean"
    """whether the critic's target takes the mean or the minimum of the two target Qs"""
    normalize_q: bool = False
    """divide the Q term of the policy's loss by the mean of |Q|"""
    flow_steps: int = 10
    """Euler steps of the flow policy"""
    learning_rate: float = 3e-4
    """of all networks"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak rate of the target Qs"""
    batch_size: int = 64
    """minibatch size"""
    epochs: int = 4
    """training epochs"""

    def check(self) -> None:
        """Raise UserError for invalid settings."""
        super().check()
        check(all(0 <= alpha < math.inf for alpha in self.values("alpha")), f"--alpha must be at least 0, not {self.alpha}")
        check(1 <= self.flow_steps <= 1000, f"--flow-steps must lie in [1, 1000], not {self.flow_steps}")
        check(0 < self.learning_rate < math.inf, f"--learning-rate must be positive, not {self.learning_rate}")
        check(0 <= self.gamma <= 1, f"--gamma must lie in [0, 1], not {self.gamma}")
        check(0 < self.tau <= 1, f"--tau must lie in (0, 1], not {self.tau}")


# By the beginning of the id, the authors' alpha (else 10) and where they take the smaller target (else the mean), for AntMaze v2,
# pen and OGBench; AntMaze v0 as v2; there are none for the others
ALPHA = {
    "antmaze-large-play": 3,
    "antmaze-large-diverse": 3,
    "humanoidmaze": 30,
    "cube": 300,
    "scene": 300,
    "puzzle": 1000,
    "pen": 10_000,
}
SMALLER_TARGET = ("antmaze-large-navigate", "antmaze-giant-navigate", "pen")


def task_defaults(env_id: str) -> dict[str, Any]:
    """Defaults for `env_id` that override those of `Args` (the demo's)."""
    if env_id in tasks.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 8, "dtql/pointmaze-large-v0": 14}.get(env_id)  # as many updates as DTQL's
        return {} if epochs is None else dict(epochs=epochs, eval_every=epochs // 4)
    ogbench, domain, name = tasks.is_ogbench(env_id), tasks.domain(env_id), tasks.d4rl_id(env_id) or env_id
    return dict(
        alpha=float(next((alpha for start, alpha in ALPHA.items() if name.startswith(start)), 10)),
        q_target="min" if name.startswith(SMALLER_TARGET) else "mean",
        batch_size=256,
        epochs=1000 if ogbench else 500,
        gamma=0.995 if ogbench and tasks.is_long(env_id) else 0.99,
        eval_every=100 if ogbench else 50,
        eval_episodes=50 if ogbench else 100 if domain in ("antmaze", "pen", "kitchen") else 10,
    )


def make_data(task: Task, args: Args, device: torch.device) -> Transitions:
    """The data on `device`, in sparse mazes with rewards r - 1."""
    rewards = task.rewards - 1 if task.sparse_goal else task.rewards
    actions = task.actions.clip(-1 + 1e-5, 1 - 1e-5)
    return Transitions(task.obs, actions, rewards, task.terminals, task.next_obs, device)


# ---- networks, written for one model -------------------------------------------------------------------------------------

HIDDEN = 512


def mlp(inputs: int, outputs: int, norm: bool = False) -> nn.Sequential:
    """Four hidden layers with GELU, each with LayerNorm after the activation if `norm`; Xavier-uniform weights, zero biases."""
    layers, width = [], inputs
    for _ in range(4):
        layers += [Linear(width, HIDDEN), nn.GELU(approximate="tanh"), *([LayerNorm(HIDDEN, eps=1e-6)] if norm else [])]
        width = HIDDEN
    net = nn.Sequential(*layers, Linear(HIDDEN, outputs))
    for layer in net:
        if isinstance(layer, Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


class Critic(nn.Module):
    """Q(s, a), of which there are two: obs (K, B, S), actions (K, B, A) -> (K, 2, B)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, 1, norm=True)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat((obs, actions), -1).unsqueeze(-3)).squeeze(-1)


class Velocity(nn.Module):
    """The flow policy's v(s, x_t, t): obs (K, B, S), actions on their way (K, B, A), time (K, B, 1) -> (K, B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim + 1, action_dim)

    def forward(self, obs: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return self.net(torch.cat((obs, x, time), -1))


class Actor(nn.Module):
    """The one-step policy mu(s, z): obs (K, B, S), noise (K, B, A) -> (K, B, A), not clamped."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, action_dim)

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.net(torch.cat((obs, noise), -1))


# ---- the agent ---------------------------------------------------------------------------------------------------------


class FQL(nn.Module):
    """Flow Q-Learning, for K models. Every loss returns (K,) and a dict of metrics (K,) to log."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device, data: Transitions | None = None):
        """Build networks and optimizers on `device`. A policy that is only deployed needs no `data`."""
        super().__init__()
        self.args, self.action_dim, self.device, self.data = args, action_dim, device, data

        def make_model() -> nn.ModuleDict:
            return nn.ModuleDict({
                "critic": stacked.stack([Critic(obs_dim, action_dim), Critic(obs_dim, action_dim)]),
                "flow": Velocity(obs_dim, action_dim),
                "actor": Actor(obs_dim, action_dim),
            })  # fmt: skip

        self.critic, self.flow, self.actor = stacked.stack_seeds(make_model, args.model_seeds).to(device).values()
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        networks = [*self.critic.parameters(), *self.flow.parameters(), *self.actor.parameters()]
        self.optimizer = torch.optim.Adam(networks, args.learning_rate, fused=True)

        self.alpha = args.per_model("alpha", device)
        self.step = stacked.make_step(self.loss, self.optimizer, args.compile)
        self.act = BestOf(self.sample, action_dim, compile=args.compile)

    def critic_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Metrics]:
        """Both Qs on r + gamma Q'(s', a') with the one-step policy's a' from `noise`; trains the critic."""
        with torch.no_grad():
            next_q = self.target_critic(batch.next_obs, self.actor(batch.next_obs, noise).clamp(-1, 1))
            next_q = next_q.mean(1) if self.args.q_target == "mean" else next_q.amin(1)
            target = batch.rewards + self.args.gamma * (1 - batch.terminals) * next_q
        q = self.critic(batch.obs, batch.actions)
        loss = (q - target[:, None]).square().mean((-1, -2))
        return loss, {"critic": loss, "q": q.mean((-1, -2))}

    def flow_loss(self, batch: Batch, noise: Tensor, time: Tensor) -> tuple[Tensor, Metrics]:
        """Flow matching along straight lines, (v((1 - t) x_0 + t a, t) - (a - x_0))^2; trains the flow policy."""
        velocity = self.flow(batch.obs, (1 - time) * noise + time * batch.actions, time)
        loss = (velocity - (batch.actions - noise)).square().mean((-1, -2))
        return loss, {"flow": loss}

    def actor_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Metrics]:
        """alpha times the distance to where the flow carries the same noise, minus Q; trains the one-step policy."""
        with torch.no_grad():
            goal = self.integrate(batch.obs, noise).clamp(-1, 1)
        actions = self.actor(batch.obs, noise)
        distillation = (actions - goal).square().mean((-1, -2))
        # The three losses share one backward pass, so Q's parameters are detached here
        fixed = {name: param.detach() for name, param in self.critic.named_parameters()}
        q = torch.func.functional_call(self.critic, fixed, (batch.obs, actions.clamp(-1, 1))).mean(1)
        scale = q.detach().abs().mean(-1) + 1e-6 if self.args.normalize_q else 1.0
        loss = self.alpha * distillation - q.mean(-1) / scale
        return loss, {"distillation": distillation, "actor_q": q.mean(-1)}

    def integrate(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Where the flow carries noise (K, B, A) from t = 0 to 1, in Euler steps; not clamped."""
        x, steps = noise, self.args.flow_steps
        for step in range(steps):
            x = x + self.flow(obs, x, torch.full_like(x[..., :1], step / steps)) / steps
        return x

    def loss(self, batch: Batch, noise: Tensor, time: Tensor) -> tuple[Tensor, Metrics]:
        """The sum of the three, each of which trains its own network; `noise` (K, 3, B, A)."""
        parts = (
            self.critic_loss(batch, noise[:, 0]),
            self.flow_loss(batch, noise[:, 1], time),
            self.actor_loss(batch, noise[:, 2]),
        )
        return sum(loss for loss, _ in parts), {name: value for _, metrics in parts for name, value in metrics.items()}

    def update(self) -> Metrics:
        """One step of Adam for all networks, then the target Qs. Tensors only, with static shapes."""
        args, shape = self.args, (self.args.num_models, self.args.batch_size)
        batch = self.data.sample(*shape)
        noise = torch.randn(shape[0], 3, shape[1], self.action_dim, device=self.device)
        time = torch.rand(*shape, 1, device=self.device)
        before = copy.deepcopy(self.critic)
        metrics = self.step(batch, noise, time)
        stacked.polyak_update(self.target_critic, before, args.tau)  # as the authors: toward the Qs of before the step
        return metrics

    def sample(self, obs: Tensor, z: Tensor) -> Tensor:
        """An action (K, n, 1, A) of the one-step policy in states (K, n, S), from noise z (K, n, 1, A)."""
        return self.actor(obs, z.squeeze(2)).unsqueeze(2)


def load_policy(checkpoint: str, index: int = 0, device: str = "cpu", seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a function from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's units.
    Raises UserError if the checkpoint cannot be read or has no such model.
    """
    return common.load_policy(checkpoint, __file__, FQL, Args, index, device, seed)


def main(args: Args) -> dict[str, Any]:
    """Train and evaluate. Returns the run's folder and the rows of its eval.csv; raises UserError for bad input."""
    args.check()
    device = common.find_device(args.device)
    task = tasks.load_task(args)
    envs = evaluation.make_envs(task, args)
    common.set_up_torch(args, device)
    data = make_data(task, args, device)
    agent = FQL(args, task.obs.shape[1], task.actions.shape[1], device, data)
    fastest = functools.cache(
        lambda: stacked.fastest(agent.update, agent, args.compile, args.cudagraphs and device.type == "cuda")
    )

    with Run(__file__, args, task, envs, agent) as run:
        while True:
            if run.evaluation_due():
                run.evaluate(agent.act)
            if run.ended:
                break
            update = fastest()
            for _ in range(run.until_log()):
                run.advance(update())
            run.log()
        run.save()
    return run.summary()


if __name__ == "__main__":
    common.run(main, lambda: common.parse_args(Args, task_defaults))
