"""Score Regularized Policy Optimization (SRPO): a deterministic policy climbs Q and the score of a diffusion model of the data.

Chen et al., 2024. Three phases: a diffusion model clones the data; IQL learns Q; a one-step policy follows the gradient of Q and,
weighted by noise level, the diffusion model's score at its own action, without sampling from the diffusion model
or differentiating through it.

It differs from `idql.py` in these points:

1. A deterministic one-step policy is trained and deployed: one action, no candidates. (`kl_distill.py` has the same idea with a
   generator, whose score a second diffusion model must learn.) It climbs the mean of the target Qs.
2. Diffusion model, Q and policy learn one after the other; V learns after Q; the diffusion model has no average.
3. Noise is a continuous variance-preserving process, not a chain of 5 steps, and nothing is sampled from it.
4. The diffusion model has Mish and fixed frequencies; the Qs and V have PyTorch's initial weights, V no LayerNorm.

Shapes: K models with minibatches of B; obs (K, B, S), actions (K, B, A) in [-1, 1], time (K, B, 1), noise (K, B, A),
masks (3, K, B, 256), rewards, terminals and V (K, B), both Qs (K, 2, B).
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
from stacked import Batch, LayerNorm, Linear, Metrics, Mish, Transitions
from tasks import Task


@dataclass
class Args(common.Args):
    """Score Regularized Policy Optimization (SRPO). The defaults shown are those of the given task."""

    sweep = ("beta", "expectile")

    # Algorithm specific arguments
    beta: float | tuple[float, ...] = 0.05
    """weight of Q in the policy's loss: large improves, 0 clones"""
    expectile: float | tuple[float, ...] = 0.9
    """expectile of the value loss"""
    normalize_gradient: bool = True
    """scale Q's gradient at each action to mean square 1 over its dimensions"""
    baseline: bool = False
    """subtract the noise from the predicted noise: less variance, the same expectation; the authors' code does not"""
    policy_layers: int = 2
    """hidden layers of the policy"""
    learning_rate: float = 3e-4
    """of all networks; the policy's falls to 0 along a cosine"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak rate of the target Qs"""
    diffusion_epochs: int = 6
    """epochs that train only the diffusion model"""
    diffusion_batch_size: int = 64
    """minibatch size there"""
    critic_epochs: int = 8
    """epochs that then train only Q and V"""
    batch_size: int = 64
    """minibatch size"""
    epochs: int = 4
    """training epochs of the policy"""

    @property
    def pretrain_steps(self) -> int:
        """Updates of the first two phases."""
        return (self.diffusion_epochs + self.critic_epochs) * self.steps_per_epoch

    def check(self) -> None:
        """Raise UserError for invalid settings."""
        super().check()
        check(all(0 <= beta < math.inf for beta in self.values("beta")), f"--beta must be at least 0, not {self.beta}")
        check(all(0 < tau < 1 for tau in self.values("expectile")), f"--expectile must lie in (0, 1), not {self.expectile}")
        check(1 <= self.policy_layers <= 100, f"--policy-layers must lie in [1, 100], not {self.policy_layers}")
        check(0 < self.learning_rate < math.inf, f"--learning-rate must be positive, not {self.learning_rate}")
        check(0 <= self.gamma <= 1, f"--gamma must lie in [0, 1], not {self.gamma}")
        check(0 < self.tau <= 1, f"--tau must lie in (0, 1], not {self.tau}")
        for name in ("diffusion_epochs", "critic_epochs"):
            check(0 <= getattr(self, name) <= 1e9, f"--{name.replace('_', '-')} must not be negative, not {getattr(self, name)}")
        check(
            1 <= self.diffusion_batch_size <= 1e9, f"--diffusion-batch-size must be at least 1, not {self.diffusion_batch_size}"
        )


# beta: the authors' (for AntMaze v2, which the DTQL paper took for v0 too); there are none for pen and kitchen
BETA = {
    "halfcheetah-medium": 0.2,
    "halfcheetah-medium-replay": 0.2,
    "halfcheetah-medium-expert": 0.01,
    "hopper-medium": 0.05,
    "hopper-medium-replay": 0.2,
    "hopper-medium-expert": 0.01,
    "walker2d-medium": 0.05,
    "walker2d-medium-replay": 0.5,
    "walker2d-medium-expert": 0.1,
    "antmaze-umaze": 0.02,
    "antmaze-umaze-diverse": 0.04,
    "antmaze-medium-play": 0.08,
    "antmaze-medium-diverse": 0.05,
    "antmaze-large-play": 0.06,
    "antmaze-large-diverse": 0.05,
}


def task_defaults(env_id: str) -> dict[str, Any]:
    """Defaults for `env_id` that override those of `Args` (the demo's)."""
    if env_id in tasks.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 8, "dtql/pointmaze-large-v0": 14}.get(env_id)
        return {} if epochs is None else dict(diffusion_epochs=6, critic_epochs=epochs, epochs=6, eval_every=2)
    ogbench, domain, name = tasks.is_ogbench(env_id), tasks.domain(env_id), tasks.d4rl_id(env_id) or ""
    beta, manipulation = BETA.get(name.rpartition("-")[0], 0.05), env_id.startswith(tasks.MANIPULATION)
    if ogbench:  # those of FQL's authors
        beta = 0.03 if env_id.startswith("cube-single") else 0.1 if manipulation else 0.3
    return dict(
        beta=beta,
        expectile=0.9 if domain == "antmaze" or manipulation else 0.7,
        normalize_gradient=domain in ("antmaze", "ogbench"),
        policy_layers=4 if domain == "antmaze" else 2,
        diffusion_epochs=2000,
        diffusion_batch_size=2048,
        critic_epochs=1500,
        batch_size=256,
        epochs=1000,
        gamma=0.995 if ogbench and tasks.is_long(env_id) else 0.99,
        eval_every=100 if ogbench else 50,
        eval_episodes=50 if ogbench else 100 if domain in ("antmaze", "pen", "kitchen") else 10,
    )


def return_range(task: Task) -> float:
    """Largest minus smallest return in the data as the authors count: what they call an episode ends at a terminal or after
    1000 rows, and rows after the last end do not count. Data without two such episodes: as IQL counts."""
    returns, total, length = [], 0.0, 0
    for reward, terminal in zip(task.rewards.tolist(), task.terminals.tolist()):
        total, length = total + reward, length + 1
        if terminal or length == 1000:
            returns.append(total)
            total, length = 0.0, 0
    return max(returns) - min(returns) if len(set(returns)) > 1 else tasks.return_range(task)


def make_data(task: Task, args: Args, device: torch.device) -> Transitions:
    """The data on `device`. Rewards: sparse mazes r - 1, OGBench as they are, others divided by the range of returns / 1000."""
    rewards = task.rewards - 1 if task.sparse_goal else task.rewards
    if not task.sparse_goal and not tasks.is_ogbench(args.env_id):
        rewards = rewards * np.float32(1000 / return_range(task))
    return Transitions(task.obs, task.actions, rewards, task.terminals, task.next_obs, device)


# ---- noise: a_t = c_data(t) a + c_noise(t) noise, t in (0, 1) --------------------------------------------------------


def c_data(time: Tensor) -> Tensor:
    return torch.exp(-0.25 * time**2 * (20 - 0.1) - 0.5 * time * 0.1)


def c_noise(time: Tensor) -> Tensor:
    return torch.sqrt(1 - c_data(time) ** 2)


# ---- networks, written for one model -------------------------------------------------------------------------------------

HIDDEN, BLOCKS, DROPOUT = 256, 3, 0.1


def mlp(inputs: int, outputs: int, layers: int = 2) -> nn.Sequential:
    """Hidden layers of 256 with ReLU."""
    hidden = []
    for layer in range(layers):
        hidden += [Linear(HIDDEN if layer else inputs, HIDDEN), nn.ReLU()]
    return nn.Sequential(*hidden, Linear(HIDDEN, outputs))


class Critic(nn.Module):
    """Q(s, a), of which there are two: obs (K, B, S), actions (K, B, A) -> (K, 2, B)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat((obs, actions), -1).unsqueeze(-3)).squeeze(-1)


class Value(nn.Module):
    """V(s): obs (K, B, S) -> (K, B)."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, 1)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


class Actor(nn.Module):
    """a = tanh(MLP(s)): obs (K, B, S) -> (K, B, A)."""

    def __init__(self, obs_dim: int, action_dim: int, layers: int):
        super().__init__()
        self.net = mlp(obs_dim, action_dim, layers)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.net(obs))


class Block(nn.Module):
    """x + MLP(LayerNorm(dropout(x))): (K, B, 256) -> (K, B, 256)."""

    def __init__(self):
        super().__init__()
        self.norm = LayerNorm(HIDDEN)
        self.net = nn.Sequential(Linear(HIDDEN, 4 * HIDDEN), Mish(), Linear(4 * HIDDEN, HIDDEN))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.net(self.norm(x if mask is None else x * mask))


class Denoiser(nn.Module):
    """The noise in a_t: noisy actions (K, B, A), time (K, B, 1), obs (K, B, S) -> (K, B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        frequencies = 30 * torch.randn(32, generator=torch.Generator().manual_seed(0))  # fixed, the same for all models
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(Linear(64, 128), Mish(), Linear(128, 128))
        self.first = Linear(action_dim + obs_dim + 128, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.last = nn.Sequential(Mish(), Linear(HIDDEN, action_dim))

    def forward(self, noisy_actions: Tensor, time: Tensor, obs: Tensor, masks: Tensor | None = None) -> Tensor:
        """`masks` (3, K, B, 256): dropout before each block, 0 or 1 / (1 - p); None where there is none."""
        angles = 2 * math.pi * time * self.frequencies
        x = self.first(torch.cat((noisy_actions, obs, self.time(torch.cat((angles.sin(), angles.cos()), -1))), -1))
        for i, block in enumerate(self.blocks):
            x = block(x, None if masks is None else masks[i])
        return self.last(x)


# ---- the agent ---------------------------------------------------------------------------------------------------------


class SRPO(nn.Module):
    """Score Regularized Policy Optimization, for K models. Every loss returns (K,) and a dict of metrics (K,) to log."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device, data: Transitions | None = None):
        """Build networks and optimizers on `device`. A policy that is only deployed needs no `data`."""
        super().__init__()
        self.args, self.action_dim, self.device, self.data = args, action_dim, device, data

        def make_model() -> nn.ModuleDict:
            return nn.ModuleDict({
                "critic": stacked.stack([Critic(obs_dim, action_dim), Critic(obs_dim, action_dim)]),
                "value": Value(obs_dim),
                "denoiser": Denoiser(obs_dim, action_dim),
                "actor": Actor(obs_dim, action_dim, args.policy_layers),
            })  # fmt: skip

        self.critic, self.value, self.denoiser, self.actor = stacked.stack_seeds(make_model, args.model_seeds).to(device).values()
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.denoiser_optimizer = torch.optim.AdamW(self.denoiser.parameters(), args.learning_rate, weight_decay=0.01, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.learning_rate, fused=True)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), args.learning_rate, fused=True)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.learning_rate, fused=True)
        self.register_buffer("train_step", torch.zeros((), device=device))

        self.beta, self.expectile = args.per_model("beta", device), args.per_model("expectile", device)
        self.step_denoiser = stacked.make_step(self.denoiser_loss, self.denoiser_optimizer, args.compile)
        self.step_critic = stacked.make_step(self.critic_loss, self.critic_optimizer, args.compile)
        self.step_value = stacked.make_step(self.value_loss, self.value_optimizer, args.compile)
        self.step_actor = stacked.make_step(self.actor_loss, self.actor_optimizer, args.compile)
        self.act = BestOf(self.sample, action_dim, compile=args.compile)
        self.phases = [  # what an update trains, and for how many epochs
            (self.update_denoiser, args.diffusion_epochs),
            (self.update_critic, args.critic_epochs),
            (self.update_actor, args.epochs),
        ]

    def phase(self, epoch: int) -> int:
        """The index of the phase that an epoch belongs to, counted from the start of the run."""
        ends = np.cumsum([epochs for _, epochs in self.phases])
        return int((epoch >= ends).sum())

    def denoiser_loss(self, batch: Batch, time: Tensor, noise: Tensor, masks: Tensor) -> tuple[Tensor, Metrics]:
        """Squared error of the predicted noise, summed over dimensions: the diffusion model clones the data."""
        noisy = c_data(time) * batch.actions + c_noise(time) * noise
        loss = (self.denoiser(noisy, time, batch.obs, masks) - noise).square().sum(-1).mean(-1)
        return loss, {"denoiser": loss}

    def value_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Expectile regression of V on the smaller target Q."""
        q = self.target_critic(batch.obs, batch.actions).amin(1)
        loss = expectile_loss(q - self.value(batch.obs), self.expectile)
        return loss, {"value": loss}

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Both Qs on r + gamma V(s'), also averaged over the two."""
        q = self.critic(batch.obs, batch.actions)
        with torch.no_grad():
            target = batch.rewards + self.args.gamma * (1 - batch.terminals) * self.value(batch.next_obs)
        loss = (target[:, None] - q).square().mean((-1, -2))
        return loss, {"critic": loss, "q": q.mean((-1, -2))}

    def actor_loss(self, batch: Batch, time: Tensor, noise: Tensor) -> tuple[Tensor, Metrics]:
        """Up the mean of the target Qs and the diffusion model's score: a loss whose gradient at each action is
        c_noise^2 score - beta dQ/da. Trains the policy only."""
        actions = self.actor(batch.obs)
        fixed = actions.detach().requires_grad_()
        with torch.no_grad():
            score = self.denoiser(c_data(time) * fixed + c_noise(time) * noise, time, batch.obs)
            score = score - noise if self.args.baseline else score
        q = self.target_critic(batch.obs, fixed).mean(1)
        (gradient,) = torch.autograd.grad(q.sum(), [fixed])
        if self.args.normalize_gradient:
            gradient = gradient / (gradient.square().mean(-1, keepdim=True).sqrt() + 1e-8)
        direction = c_noise(time) ** 2 * score - self.beta[:, None, None] * gradient
        loss = (direction * actions).sum(-1).mean(-1)
        return loss, {"actor": loss, "actor_q": q.mean(-1)}

    # The updates of the three phases. Tensors only, with static shapes

    def sample_noise(self, batch_size: int, low: float, high: float) -> tuple[Tensor, Tensor]:
        """Uniform times in [low, high) and Gaussian noise, (K, B, 1) and (K, B, A)."""
        shape = self.args.num_models, batch_size
        time = low + (high - low) * torch.rand(*shape, 1, device=self.device)
        return time, torch.randn(*shape, self.action_dim, device=self.device)

    def update_denoiser(self) -> Metrics:
        """The diffusion model."""
        num_models, batch_size = self.args.num_models, self.args.diffusion_batch_size
        batch, inputs = self.data.sample(num_models, batch_size), self.sample_noise(batch_size, 0.001, 1.0)
        keep = torch.rand(num_models, BLOCKS, batch_size, HIDDEN, device=self.device) >= DROPOUT
        return self.step_denoiser(batch, *inputs, (keep / (1 - DROPOUT)).transpose(0, 1))

    def update_critic(self) -> Metrics:
        """Q, with V as it was; V; target Qs."""
        batch = self.data.sample(self.args.num_models, self.args.batch_size)
        metrics = self.step_critic(batch)
        metrics |= self.step_value(batch)
        stacked.polyak_update(self.target_critic, self.critic, self.args.tau)
        return metrics

    def update_actor(self) -> Metrics:
        """The policy."""
        args = self.args
        batch, inputs = self.data.sample(args.num_models, args.batch_size), self.sample_noise(args.batch_size, 0.02, 0.98)
        factor = (1 + torch.cos(math.pi * self.train_step / (args.epochs * args.steps_per_epoch))) / 2
        stacked.set_learning_rate(self.actor_optimizer, factor)
        metrics = self.step_actor(batch, *inputs)
        self.train_step += 1
        return metrics

    def sample(self, obs: Tensor, z: Tensor) -> Tensor:
        """The policy's action (K, n, 1, A) in states (K, n, S); the noise is not used."""
        return self.actor(obs).unsqueeze(2)


def expectile_loss(u: Tensor, expectile: Tensor) -> Tensor:
    """Mean of |expectile - 1(u < 0)| u^2; u (K, B), expectile (K,) -> (K,)."""
    return ((expectile[:, None] - (u < 0).float()).abs() * u**2).mean(-1)


def load_policy(checkpoint: str, index: int = 0, device: str = "cpu", seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a function from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's units.
    Raises UserError if the checkpoint cannot be read or has no such model.
    """
    return common.load_policy(checkpoint, __file__, SRPO, Args, index, device, seed)


def main(args: Args) -> dict[str, Any]:
    """Train and evaluate. Returns the run's folder and the rows of its eval.csv; raises UserError for bad input."""
    args.check()
    device = common.find_device(args.device)
    task = tasks.load_task(args)
    envs = evaluation.make_envs(task, args)
    common.set_up_torch(args, device)
    data = make_data(task, args, device)
    agent = SRPO(args, task.obs.shape[1], task.actions.shape[1], device, data)
    fastest = functools.lru_cache(1)(  # of one phase at a time: a graph's memory goes with it
        lambda phase: stacked.fastest(agent.phases[phase][0], agent, args.compile, args.cudagraphs and device.type == "cuda")
    )

    with Run(__file__, args, task, envs, agent) as run:
        while True:
            if run.evaluation_due():
                run.evaluate(agent.act)
            if run.ended:
                break
            update = fastest(agent.phase(run.step // args.steps_per_epoch))
            for _ in range(run.until_log()):
                run.advance(update())
            run.log()
        run.save()
    return run.summary()


if __name__ == "__main__":
    common.run(main, lambda: common.parse_args(Args, task_defaults))
