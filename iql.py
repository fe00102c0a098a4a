"""Implicit Q-Learning (IQL; Kostrikov, Nair and Levine 2021): offline reinforcement learning that never asks for the value of an
action outside the data.

Expectile regression makes V an upper expectile of Q over the data's actions; Q bootstraps from V; a Gaussian policy is
extracted by advantage-weighted regression. Settings and order of updates are those of the official code.

It differs from `dtql_continuous.py` in these points:

1. There is no diffusion policy and no trust region: the policy clones the data, weighted by exp(beta advantage).
2. V regresses on the target Qs, not on the online ones; it comes first, and policy and Q use the new V.
3. Networks have two hidden layers with ReLU and no LayerNorm; every layer starts orthogonal with gain sqrt(2).
4. Rewards of locomotion tasks are scaled by the range of the data's returns; data actions are clipped to 1 - 1e-5.
5. The policy's learning rate falls to 0 along a cosine over all updates. Its mean is deployed; no candidates are drawn.

Shapes, for one model: obs (B, S), actions (B, A) in [-1, 1], rewards, terminals, Q and V (B,).
"""

import contextlib
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
import data
import stacked
from stacked import Batch, Net, Params


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
    """share of the policy's hidden units that is dropped in training"""
    learning_rate: float = 3e-4
    """of all networks; the policy's falls to 0 along a cosine"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the target Qs towards the online Qs"""
    batch_size: int = 64
    """transitions per update and model"""
    epochs: int = 12
    """training epochs"""


# Official settings: expectile, beta, dropout
SETTINGS = {
    "locomotion": (0.7, 3.0, 0.0),
    "antmaze": (0.9, 10.0, 0.0),
    "pen": (0.7, 0.5, 0.1),
    "kitchen": (0.7, 0.5, 0.1),
    "hopper-medium-expert-v2": (0.5, 6.0, 0.0),  # by common consent of reimplementations; unstable with the official ones
}


def task_defaults(env_id: str) -> dict[str, Any]:
    """The arguments in which a task's defaults differ from those of `Args`, which are the demo's."""
    if env_id in data.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 8, "dtql/pointmaze-large-v0": 14}.get(env_id)  # as many updates as DTQL's
        return {} if epochs is None else dict(epochs=epochs, eval_every=epochs // 4)
    domain = data.domain(env_id)
    expectile, beta, dropout = SETTINGS.get(
        data.d4rl_id(env_id), SETTINGS.get("antmaze" if domain == "ogbench" else domain, SETTINGS["locomotion"])
    )
    return dict(
        expectile=expectile,
        beta=beta,
        dropout=dropout,
        batch_size=256,
        epochs=1000,
        gamma=data.discount(env_id),
        eval_episodes=100 if domain in ("antmaze", "pen", "kitchen") else 10,
    ) | data.ogbench_defaults(env_id)


def check_args(args: Args) -> None:
    """Raise UserError for settings that cannot work."""
    common.check_args(args)
    common.check_range(
        args, expectile="(0, 1)", beta="[0, inf)", dropout="[0, 1)", learning_rate="(0, inf)", gamma="[0, 1]", tau="(0, 1]"
    )


def transform_rewards(task: data.Task, env_id: str) -> np.ndarray:
    """Rewards (N,) to train on: sparse mazes r - 1, locomotion with returns over a range of 1000, others as they are."""
    if task.sparse_goal:
        return task.rewards - 1
    if data.domain(env_id) == "locomotion" and len(task.rewards):
        return task.rewards * np.float32(1000 / data.return_range(task))
    return task.rewards


# ---- networks, each of one model -------------------------------------------------------------------------------------

HIDDEN = 256


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Two hidden layers; all weights orthogonal with gain sqrt(2), the output's too."""
    net = nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, outputs),
    )  # fmt: skip
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return net


class Critic(nn.Module):
    """Q(s, a): obs (B, S), actions (B, A) -> (B,)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat((obs, actions), -1)).squeeze(-1)


class Value(nn.Module):
    """V(s): obs (B, S) -> (B,)."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, 1)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


class GaussianActor(nn.Module):
    """a ~ N(tanh(MLP(s)), std^2), std independent of the state: obs (B, S) -> mean (B, A), log_std (A,)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`masks` (2, B, 256): dropout of the hidden layers, 0 or 1 / (1 - share); None where there is none."""
        x, hidden = obs, 0
        for layer in self.net:
            x = layer(x)
            if isinstance(layer, nn.ReLU) and masks is not None:
                x, hidden = x * masks[hidden], hidden + 1
        return torch.tanh(x), self.log_std.clamp(-5, 2)


# ---- losses of one model ---------------------------------------------------------------------------------------------


def expectile_loss(u: Tensor, expectile: float | Tensor) -> Tensor:
    """Mean of |expectile - 1(u < 0)| u^2."""
    return ((expectile - (u < 0).float()).abs() * u**2).mean()


def q_target(rewards: Tensor, terminals: Tensor, next_v: Tensor, gamma: float) -> Tensor:
    """r + gamma V(s'), without V(s') where the episode ended."""
    return rewards + gamma * (1 - terminals) * next_v


def advantage_weights(advantages: Tensor, beta: float | Tensor) -> Tensor:
    """min(exp(beta advantage), 100)."""
    return torch.exp(beta * advantages).clamp(max=100)


def gaussian_log_prob(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """log N(a; mean, std^2), summed over dimensions: (B,). The mean is squashed, the action is not: no tanh correction."""
    z = (actions - mean) * torch.exp(-log_std)
    return -(0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


# ---- the agent ---------------------------------------------------------------------------------------------------------


class IQL:
    """Implicit Q-Learning, for K models at once. A loss is that of one model, whose parameters by network are `p`."""

    def __init__(self, args: Args, task: data.Task, device: torch.device):
        """The models on `device`, with the data beside them."""
        self.args, self.device = args, device
        actions = task.actions.clip(-1 + 1e-5, 1 - 1e-5)
        rewards = transform_rewards(task, args.env_id)
        self.data = stacked.Transitions(task.obs, actions, rewards, task.terminals, task.next_obs, device)
        dims = task.obs.shape[1], task.actions.shape[1]
        self.critic = Net(lambda: Critic(*dims), device, copies=2)
        self.value = Net(lambda: Value(dims[0]), device)
        self.actor = Net(lambda: GaussianActor(*dims), device)

        nets = {"critic": self.critic, "value": self.value, "actor": self.actor}
        metrics = ["critic", "value", "actor", "q", "advantage", "weight", "entropy"]
        self.models = stacked.Learner(nets, args.model_seeds, metrics, device, args.compile, args.model_settings)
        self.models.add_target("target_critic", "critic")
        self.models.optimize(self.value_loss, "value", lr=args.learning_rate)
        self.models.optimize(self.actor_loss, "actor", lr=args.learning_rate)
        self.models.optimize(self.critic_loss, "critic", lr=args.learning_rate)
        self.train_step = self.models.buffers["train_step"] = torch.zeros((), device=device)
        self.best_of = stacked.BestOf(self.sample, None, ("actor",), 1, task.action_low, task.action_high, device, args.compile)

    def advantage(self, p: dict[str, Params], batch: Batch) -> Tensor:
        """min Q'(s, a) - V(s), (B,); only V has a gradient."""
        return self.critic(p["target_critic"], batch.obs, batch.actions).amin(0) - self.value(p["value"], batch.obs)

    def value_loss(self, p: dict[str, Params], batch: Batch) -> tuple[Tensor, Params]:
        """Expectile regression of V on the smaller target Q."""
        loss = expectile_loss(self.advantage(p, batch), p["settings"]["expectile"])
        return loss, {"value": loss}

    def actor_loss(self, p: dict[str, Params], batch: Batch, masks: Tensor | None = None) -> tuple[Tensor, Params]:
        """Advantage-weighted regression. Q and V are fixed."""
        advantages = self.advantage(p, batch)
        weights = advantage_weights(advantages, p["settings"]["beta"])
        mean, log_std = self.actor(p["actor"], batch.obs, masks)
        loss = -(weights * gaussian_log_prob(mean, log_std, batch.actions)).mean()
        entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return loss, {"actor": loss, "advantage": advantages.mean(), "weight": weights.mean(), "entropy": entropy}

    def critic_loss(self, p: dict[str, Params], batch: Batch) -> tuple[Tensor, Params]:
        """Both Qs on r + gamma V(s'); V is fixed."""
        q = self.critic(p["critic"], batch.obs, batch.actions)
        target = q_target(batch.rewards, batch.terminals, self.value(p["value"], batch.next_obs), self.args.gamma)
        loss = (target - q).square().mean(1).sum()
        return loss, {"critic": loss, "q": q.mean()}

    def update(self) -> None:
        """One update: V, policy, Q, targets, all on one minibatch. Tensors only, of static shapes."""
        args, models, shape = self.args, self.models, (self.models.num_models, self.args.batch_size)
        batch, masks = self.data.sample(*shape), ()
        if args.dropout:
            keep = torch.rand(models.num_models, 2, args.batch_size, HIDDEN, device=self.device) >= args.dropout
            masks = (keep / (1 - args.dropout),)
        decay = (1 + torch.cos(math.pi * self.train_step / args.total_steps)) / 2

        models.step(self.value_loss, batch)
        models.step(self.actor_loss, batch, *masks, decay=decay)
        models.step(self.critic_loss, batch)
        models.average("target_critic", "critic", args.tau)
        self.train_step += 1

    # The choice of an action

    def sample(self, p: dict[str, Params], obs: Tensor, z: Tensor) -> Tensor:
        """The policy's mean (..., A) in observations (..., S); the noise is not used."""
        return self.actor(p["actor"], obs)[0]


def load_policy(checkpoint: str, index: int = 0, device: str = "cpu", seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a callable from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's own
    units. Raises UserError if the checkpoint cannot be read or has no such model.
    """
    args, spaces, learner = common.open_policy(checkpoint, __file__, Args, index, device)
    agent = IQL(args, data.Task.without_data(**spaces), torch.device(device))
    agent.models.load_state_dict(learner)
    return agent.best_of.of_one(agent.models.params, index, spaces["obs_dim"], seed, args.about(index))


def evaluate(agent: IQL, task: data.Task, envs: common.LockstepEnvs, epoch: int) -> common.Evaluation:
    """Episodes of all models in lock-step."""
    act = lambda obs, generator: agent.best_of(agent.models.params, obs, generator)
    return common.evaluate(task, envs, act, agent.args, epoch, agent.device)


def main(args: Args) -> dict[str, Any]:
    """Train and evaluate. Returns the run's folder and the rows of its eval.csv; raises UserError for bad input."""
    check_args(args)
    device = common.find_device(args)
    task = data.task_of(args)
    envs = common.make_lockstep_envs(task, args)
    common.seed_everything(args.seed, args.torch_deterministic)
    agent = IQL(args, task, device)
    prepare = functools.cache(lambda: agent.models.prepare(agent.update, args.cudagraphs and args.cuda))

    with contextlib.closing(envs), common.Run(__file__, args, task, agent.models, device) as run:
        while True:
            if run.evaluation_due():
                run.add_evaluation(evaluate(agent, task, envs, run.epoch))
            if run.step == args.total_steps:
                break
            update = prepare()
            for _ in range(run.until_log()):
                update()
                run.advance()
            run.log()
        run.save()
    return run.summary()


if __name__ == "__main__":
    common.run(main, lambda: common.parse_args(Args, task_defaults))
