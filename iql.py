"""Implicit Q-Learning (IQL; Kostrikov, Nair and Levine 2021): offline reinforcement learning that never evaluates
actions outside the data.

Expectile regression makes V an upper expectile of Q over the data's actions; Q bootstraps from V; a Gaussian policy is
extracted by advantage-weighted regression. Settings and order of updates are those of the official code.

It differs from `dtql_continuous.py` in these points:

1. There is no diffusion policy and no trust region: the policy clones the data, weighted by exp(beta advantage).
2. V regresses on the target Qs, not on the online ones; it comes first, and policy and Q use the new V.
3. Networks have two hidden layers with ReLU and no LayerNorm; every layer starts orthogonal with gain sqrt(2).
4. Rewards of locomotion tasks are scaled by the range of the data's returns; data actions are clipped to ±(1 - 1e-5).
5. The policy's learning rate falls to 0 along a cosine over all updates. Its mean is deployed; no candidates are sampled.

Shapes: K models with minibatches of B; obs (K, B, S), actions (K, B, A) in [-1, 1], rewards, terminals and
V (K, B), both Qs (K, 2, B).
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
from tasks import Task, return_range


@dataclass
class Args(common.Args):
    """Implicit Q-Learning. The defaults shown are those of the given task."""

    sweep = ("expectile", "beta")

    # Algorithm specific arguments
    expectile: float | tuple[float, ...] = 0.9
    """expectile of the value loss, the paper's tau"""
    beta: float | tuple[float, ...] = 10.0
    """inverse temperature of the advantage weights"""
    dropout: float = 0.0
    """dropout probability of the policy's hidden layers"""
    layers: int = 2
    """hidden layers of every network"""
    width: int = 256
    """units of each hidden layer"""
    layer_norm: bool = False
    """LayerNorm after the hidden layers of Q and V"""
    learning_rate: float = 3e-4
    """of all networks; the policy's falls to 0 along a cosine"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak rate of the target Qs"""
    batch_size: int = 64
    """minibatch size"""
    epochs: int = 12
    """training epochs"""

    def check(self) -> None:
        """Raise UserError for invalid settings."""
        super().check()
        check(all(0 < tau < 1 for tau in self.values("expectile")), f"--expectile must lie in (0, 1), not {self.expectile}")
        check(all(0 <= beta < math.inf for beta in self.values("beta")), f"--beta must be at least 0, not {self.beta}")
        check(1 <= self.layers <= 100, f"--layers must lie in [1, 100], not {self.layers}")
        check(1 <= self.width <= 100_000, f"--width must lie in [1, 100000], not {self.width}")
        check(0 <= self.dropout < 1, f"--dropout must lie in [0, 1), not {self.dropout}")
        check(0 < self.learning_rate < math.inf, f"--learning-rate must be positive, not {self.learning_rate}")
        check(0 <= self.gamma <= 1, f"--gamma must lie in [0, 1], not {self.gamma}")
        check(0 < self.tau <= 1, f"--tau must lie in (0, 1], not {self.tau}")


# Official settings: expectile, beta, dropout
SETTINGS = {
    "locomotion": (0.7, 3.0, 0.0),
    "antmaze": (0.9, 10.0, 0.0),
    "pen": (0.7, 0.5, 0.1),
    "kitchen": (0.7, 0.5, 0.1),
    "hopper-medium-expert-v2": (0.5, 6.0, 0.0),  # as reimplementations do; unstable with the official ones
}
# OGBench: beta of FQL's authors, by the beginning of the id (else 10), with expectile 0.9 and their networks' sizes
OGBENCH = {"antsoccer": 1.0, "cube-single": 1.0, "cube-double": 0.3, "puzzle-4x4": 3.0}


def task_defaults(env_id: str) -> dict[str, Any]:
    """Defaults for `env_id` that override those of `Args` (the demo's)."""
    if env_id in tasks.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 8, "dtql/pointmaze-large-v0": 14}.get(env_id)  # as many updates as DTQL's
        return {} if epochs is None else dict(epochs=epochs, eval_every=epochs // 4)
    domain, ogbench = tasks.domain(env_id), tasks.is_ogbench(env_id)
    expectile, beta, dropout = SETTINGS.get(tasks.d4rl_id(env_id), SETTINGS.get(domain, SETTINGS["locomotion"]))
    if ogbench:
        expectile, beta = 0.9, next((beta for start, beta in OGBENCH.items() if env_id.startswith(start)), 10.0)
    return dict(
        layers=4 if ogbench else 2,
        width=512 if ogbench and not env_id.startswith(tasks.MANIPULATION) else 256,
        layer_norm=ogbench,
        expectile=expectile,
        beta=beta,
        dropout=dropout,
        batch_size=256,
        epochs=1000,
        gamma=0.995 if ogbench and tasks.is_long(env_id) else 0.99,
        eval_every=100 if ogbench else 50,
        eval_episodes=50 if ogbench else 100 if domain in ("antmaze", "pen", "kitchen") else 10,
    )


def make_data(task: Task, args: Args, device: torch.device) -> Transitions:
    """The data on `device`. Rewards: sparse mazes r - 1, locomotion divided by the range of returns / 1000, others raw."""
    rewards = task.rewards - 1 if task.sparse_goal else task.rewards
    if tasks.domain(args.env_id) == "locomotion":
        rewards = rewards * np.float32(1000 / return_range(task))
    actions = task.actions.clip(-1 + 1e-5, 1 - 1e-5)
    return Transitions(task.obs, actions, rewards, task.terminals, task.next_obs, device)


# ---- networks, written for one model -------------------------------------------------------------------------------------


def mlp(inputs: int, outputs: int, args: Args, norm: bool = False) -> nn.Sequential:
    """All weights orthogonal with gain sqrt(2), the output's too; LayerNorm after each activation if `norm`."""
    net = nn.Sequential()
    for size in (inputs, *[args.width] * (args.layers - 1)):
        net.extend((Linear(size, args.width), nn.ReLU(), *([LayerNorm(args.width, eps=1e-6)] if norm else [])))
    net.append(Linear(args.width, outputs))
    for layer in net:
        if isinstance(layer, Linear):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return net


class Critic(nn.Module):
    """Q(s, a), of which there are two: obs (K, B, S), actions (K, B, A) -> (K, 2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, 1, args, args.layer_norm)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat((obs, actions), -1).unsqueeze(-3)).squeeze(-1)


class Value(nn.Module):
    """V(s): obs (K, B, S) -> (K, B)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        self.net = mlp(obs_dim, 1, args, args.layer_norm)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


class GaussianActor(nn.Module):
    """a ~ N(tanh(MLP(s)), std^2), std independent of the state: obs (K, B, S) -> mean (K, B, A), log_std (K, 1, A)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = mlp(obs_dim, action_dim, args)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`masks` (layers, K, B, width): dropout of the hidden layers, 0 or 1 / (1 - p); None where there is none."""
        x, hidden = obs, 0
        for layer in self.net:
            x = layer(x)
            if isinstance(layer, nn.ReLU) and masks is not None:
                x, hidden = x * masks[hidden], hidden + 1
        return torch.tanh(x), self.log_std.clamp(-5, 2).unsqueeze(-2)


# ---- the agent ---------------------------------------------------------------------------------------------------------


class IQL(nn.Module):
    """Implicit Q-Learning, for K models. Every loss returns (K,) and a dict of metrics (K,) to log."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device, data: Transitions | None = None):
        """Build networks and optimizers on `device`. A policy that is only deployed needs no `data`."""
        super().__init__()
        self.args, self.action_dim, self.device, self.data = args, action_dim, device, data

        def make_model() -> nn.ModuleDict:
            return nn.ModuleDict({
                "critic": stacked.stack([Critic(obs_dim, action_dim, args) for _ in range(2)]),
                "value": Value(obs_dim, args),
                "actor": GaussianActor(obs_dim, action_dim, args),
            })  # fmt: skip

        self.critic, self.value, self.actor = stacked.stack_seeds(make_model, args.model_seeds).to(device).values()
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), args.learning_rate, fused=True)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.learning_rate, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.learning_rate, fused=True)
        self.register_buffer("train_step", torch.zeros((), device=device))

        self.expectile, self.beta = args.per_model("expectile", device), args.per_model("beta", device)
        self.step_value = stacked.make_step(self.value_loss, self.value_optimizer, args.compile)
        self.step_actor = stacked.make_step(self.actor_loss, self.actor_optimizer, args.compile)
        self.step_critic = stacked.make_step(self.critic_loss, self.critic_optimizer, args.compile)
        self.act = BestOf(self.sample, action_dim, compile=args.compile)

    def advantage(self, batch: Batch) -> Tensor:
        """min Q'(s, a) - V(s), (K, B)."""
        return self.target_critic(batch.obs, batch.actions).amin(1) - self.value(batch.obs)

    def value_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Expectile regression of V on the smaller target Q."""
        loss = expectile_loss(self.advantage(batch), self.expectile)
        return loss, {"value": loss}

    def actor_loss(self, batch: Batch, masks: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """Advantage-weighted regression. Trains the policy only."""
        with torch.no_grad():
            advantages = self.advantage(batch)
            weights = torch.exp(self.beta[:, None] * advantages).clamp(max=100)
        mean, log_std = self.actor(batch.obs, masks)
        loss = -(weights * gaussian_log_prob(mean, log_std, batch.actions)).mean(-1)
        entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum((-1, -2))
        return loss, {"actor": loss, "advantage": advantages.mean(-1), "weight": weights.mean(-1), "entropy": entropy}

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Both Qs on r + gamma V(s')."""
        q = self.critic(batch.obs, batch.actions)
        with torch.no_grad():
            target = batch.rewards + self.args.gamma * (1 - batch.terminals) * self.value(batch.next_obs)
        loss = (target[:, None] - q).square().mean(-1).sum(1)
        return loss, {"critic": loss, "q": q.mean((-1, -2))}

    def update(self) -> Metrics:
        """One update: V, policy, Q, target Qs, all on one minibatch. Tensors only, with static shapes."""
        args, shape = self.args, (self.args.num_models, self.args.batch_size)
        batch, masks = self.data.sample(*shape), None
        if args.dropout:
            keep = torch.rand(shape[0], args.layers, shape[1], args.width, device=self.device) >= args.dropout
            masks = (keep / (1 - args.dropout)).transpose(0, 1)
        factor = (1 + torch.cos(math.pi * self.train_step / args.total_steps)) / 2
        stacked.set_learning_rate(self.actor_optimizer, factor)

        metrics = self.step_value(batch)
        metrics |= self.step_actor(batch, masks)
        metrics |= self.step_critic(batch)
        stacked.polyak_update(self.target_critic, self.critic, args.tau)
        self.train_step += 1
        return metrics

    def sample(self, obs: Tensor, z: Tensor) -> Tensor:
        """The policy's mean (K, n, 1, A) in states (K, n, S); the noise is not used."""
        return self.actor(obs)[0].unsqueeze(2)


def expectile_loss(u: Tensor, expectile: Tensor) -> Tensor:
    """Mean of |expectile - 1(u < 0)| u^2; u (K, B), expectile (K,) -> (K,)."""
    return ((expectile[:, None] - (u < 0).float()).abs() * u**2).mean(-1)


def gaussian_log_prob(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """log N(a; mean, std^2), summed over dimensions: (K, B). The mean is squashed, the action is not: no tanh correction."""
    z = (actions - mean) * torch.exp(-log_std)
    return -(0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def load_policy(checkpoint: str, index: int = 0, device: str = "cpu", seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a function from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's units.
    Raises UserError if the checkpoint cannot be read or has no such model.
    """
    return common.load_policy(checkpoint, __file__, IQL, Args, index, device, seed)


def main(args: Args) -> dict[str, Any]:
    """Train and evaluate. Returns the run's folder and the rows of its eval.csv; raises UserError for bad input."""
    args.check()
    device = common.find_device(args.device)
    task = tasks.load_task(args)
    envs = evaluation.make_envs(task, args)
    common.set_up_torch(args, device)
    data = make_data(task, args, device)
    agent = IQL(args, task.obs.shape[1], task.actions.shape[1], device, data)
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
