"""Flow Q-Learning (FQL): a flow policy clones the data, a one-step policy is distilled from it and improves on it.

Park, Li and Levine, 2025. A flow-matching policy learns to carry Gaussian noise to the data's actions; the one-step policy,
which is deployed, should take the same noise to where the flow takes it, and to a large Q.

It differs from `dtql_continuous.py` in these points:

1. The policy that clones is a flow, integrated in 10 steps of Euler, not a diffusion model; there is no pretraining.
2. The one-step policy stays near it by regression on its samples, noise by noise, in place of the trust region; it is a
   network of state and noise, with neither entropy nor NLL.
3. Q is learned from the one-step policy's actions (SARSA-like), by the mean of the targets, without V.
4. One sample is deployed, and no candidates are compared.

Shapes, for one model: obs (B, S), actions (B, A) in [-1, 1], noise (B, A), time (B, 1).
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import common
import data
import stacked
from stacked import Batch, Net, Params, detach


@dataclass
class Args(common.Args):
    """Flow Q-Learning (FQL). The defaults shown are those of the given task."""

    sweep = ("alpha",)

    # Algorithm specific arguments
    alpha: float | tuple[float, ...] = 3.0
    """weight of the distillation: large clones, small improves"""
    q_target: Literal["mean", "min"] = "mean"
    """which of the two target Qs' values the critic learns from"""
    normalize_q: bool = False
    """divide the Q term of the policy's loss by the mean of |Q|"""
    flow_steps: int = 10
    """Euler steps of the flow policy"""
    learning_rate: float = 3e-4
    """of all networks"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the target Qs towards the online Qs"""
    batch_size: int = 64
    """transitions per update and model"""
    epochs: int = 4
    """training epochs"""


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
    """The arguments in which a task's defaults differ from those of `Args`, which are the demo's."""
    if env_id in data.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 8, "dtql/pointmaze-large-v0": 14}.get(env_id)  # as many updates as DTQL's
        return {} if epochs is None else dict(epochs=epochs, eval_every=epochs // 4)
    domain, name = data.domain(env_id), data.d4rl_id(env_id) or env_id
    return dict(
        alpha=float(next((alpha for start, alpha in ALPHA.items() if name.startswith(start)), 10)),
        q_target="min" if name.startswith(SMALLER_TARGET) else "mean",
        batch_size=256,
        epochs=500,
        gamma=data.discount(env_id),
        eval_episodes=100 if domain in ("antmaze", "pen", "kitchen") else 10,
    ) | data.ogbench_defaults(env_id)


def check_args(args: Args) -> None:
    """Raise UserError for settings that cannot work."""
    common.check_args(args)
    common.check_range(args, alpha="[0, inf)", flow_steps="[1, 1000]", learning_rate="(0, inf)", gamma="[0, 1]", tau="(0, 1]")


# ---- networks, each of one model -------------------------------------------------------------------------------------

HIDDEN = 512


def mlp(inputs: int, outputs: int, norm: bool = False) -> nn.Sequential:
    """Four hidden layers with GELU, each with LayerNorm after the activation if `norm`; Xavier-uniform weights, zero biases."""
    layers, width = [], inputs
    for _ in range(4):
        layers += [nn.Linear(width, HIDDEN), nn.GELU(approximate="tanh"), *([nn.LayerNorm(HIDDEN, eps=1e-6)] if norm else [])]
        width = HIDDEN
    net = nn.Sequential(*layers, nn.Linear(HIDDEN, outputs))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


class Critic(nn.Module):
    """Q(s, a): obs (B, S), actions (B, A) -> (B,)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, 1, norm=True)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat((obs, actions), -1)).squeeze(-1)


class Velocity(nn.Module):
    """The flow policy's v(s, x_t, t): obs (B, S), actions on their way (B, A), time (B, 1) -> (B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim + 1, action_dim)

    def forward(self, obs: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return self.net(torch.cat((obs, x, time), -1))


class Actor(nn.Module):
    """The one-step policy mu(s, z): obs (B, S), noise (B, A) -> (B, A), not clamped."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, action_dim)

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.net(torch.cat((obs, noise), -1))


# ---- losses of one model ---------------------------------------------------------------------------------------------


def flow_loss(velocity: Callable[[Tensor, Tensor], Tensor], actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Flow matching along straight lines: mean of (v((1 - t) x_0 + t a, t) - (a - x_0))^2."""
    return (velocity((1 - time) * noise + time * actions, time) - (actions - noise)).square().mean()


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Where the flow carries noise (..., A) from t = 0 to 1, in Euler steps; not clamped."""
    x = noise
    for step in range(steps):
        x = x + velocity(x, torch.full_like(x[..., :1], step / steps)) / steps
    return x


def q_target(rewards: Tensor, terminals: Tensor, next_q: Tensor, gamma: float) -> Tensor:
    """r + gamma Q'(s', a'), without Q' where the episode ended."""
    return rewards + gamma * (1 - terminals) * next_q


# ---- the agent ---------------------------------------------------------------------------------------------------------


class FQL:
    """Flow Q-Learning, for K models at once. A loss is that of one model, whose parameters by network are `p`."""

    def __init__(self, args: Args, task: data.Task, device: torch.device):
        """The models on `device`, with the data beside them."""
        self.args, self.device = args, device
        rewards = task.rewards - 1 if task.sparse_goal else task.rewards
        self.data = stacked.Transitions(task.obs, task.actions, rewards, task.terminals, task.next_obs, device)
        self.action_dim = task.actions.shape[1]
        dims = task.obs.shape[1], self.action_dim
        self.critic = Net(lambda: Critic(*dims), device, copies=2)
        self.flow = Net(lambda: Velocity(*dims), device)
        self.actor = Net(lambda: Actor(*dims), device)

        nets = {"critic": self.critic, "flow": self.flow, "actor": self.actor}
        metrics = ["critic", "flow", "distillation", "actor_q", "q"]
        self.models = stacked.Learner(nets, args.model_seeds, metrics, device, args.compile, args.model_settings)
        self.models.add_target("target_critic", "critic")
        self.models.optimize(self.loss, "critic", "flow", "actor", lr=args.learning_rate)
        self.best_of = stacked.BestOf(self.sample, None, ("actor",), 1, task.action_low, task.action_high, device, args.compile)

    def velocity(self, params: Params, obs: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The flow policy with `params` in the states `obs`."""
        return lambda x, time: self.flow(params, obs, x, time)

    def critic_loss(self, p: dict[str, Params], batch: Batch, noise: Tensor) -> tuple[Tensor, Params]:
        """Both Qs on r + gamma Q'(s', a') with the one-step policy's a' from `noise`; trains the critic."""
        next_actions = self.actor(detach(p["actor"]), batch.next_obs, noise).clamp(-1, 1)
        next_q = self.critic(p["target_critic"], batch.next_obs, next_actions)
        next_q = next_q.mean(0) if self.args.q_target == "mean" else next_q.amin(0)
        q = self.critic(p["critic"], batch.obs, batch.actions)
        loss = (q - q_target(batch.rewards, batch.terminals, next_q, self.args.gamma)).square().mean()
        return loss, {"critic": loss, "q": q.mean()}

    def clone_loss(self, p: dict[str, Params], batch: Batch, noise: Tensor, time: Tensor) -> tuple[Tensor, Params]:
        """Flow matching; trains the flow policy."""
        loss = flow_loss(self.velocity(p["flow"], batch.obs), batch.actions, noise, time)
        return loss, {"flow": loss}

    def actor_loss(self, p: dict[str, Params], batch: Batch, noise: Tensor) -> tuple[Tensor, Params]:
        """alpha times the distance to where the flow carries the same noise, minus Q; trains the one-step policy."""
        with torch.no_grad():
            goal = euler(self.velocity(detach(p["flow"]), batch.obs), noise, self.args.flow_steps).clamp(-1, 1)
        actions = self.actor(p["actor"], batch.obs, noise)
        distillation = (actions - goal).square().mean()
        q = self.critic(detach(p["critic"]), batch.obs, actions.clamp(-1, 1)).mean(0)
        scale = q.detach().abs().mean() + 1e-6 if self.args.normalize_q else 1.0
        loss = p["settings"]["alpha"] * distillation - q.mean() / scale
        return loss, {"distillation": distillation, "actor_q": q.mean()}

    def loss(self, p: dict[str, Params], batch: Batch, noise: Tensor, time: Tensor) -> tuple[Tensor, Params]:
        """The sum of the three, each of which reaches its own network; `noise` (3, B, A)."""
        parts = (
            self.critic_loss(p, batch, noise[0]),
            self.clone_loss(p, batch, noise[1], time),
            self.actor_loss(p, batch, noise[2]),
        )
        return sum(loss for loss, _ in parts), {name: value for _, metrics in parts for name, value in metrics.items()}

    def update(self) -> None:
        """One step of Adam for all networks, then the targets. Tensors only, of static shapes."""
        args, models, shape = self.args, self.models, (self.models.num_models, self.args.batch_size)
        batch = self.data.sample(*shape)
        noise = torch.randn(models.num_models, 3, args.batch_size, self.action_dim, device=self.device)
        time = torch.rand(*shape, 1, device=self.device)
        models.step(self.loss, batch, noise, time)
        models.average("target_critic", "critic", args.tau)

    # The choice of an action

    def sample(self, p: dict[str, Params], obs: Tensor, z: Tensor) -> Tensor:
        """Actions (..., A) of the one-step policy in observations (..., S), from noise z (..., A)."""
        return self.actor(p["actor"], obs.expand(*z.shape[:-1], -1), z)


def load_policy(checkpoint: str, index: int = 0, device: str = "cpu", seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a callable from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's own
    units. Raises UserError if the checkpoint cannot be read or has no such model.
    """
    args, spaces, learner = common.open_policy(checkpoint, __file__, Args, index, device)
    agent = FQL(args, data.Task.without_data(**spaces), torch.device(device))
    agent.models.load_state_dict(learner)
    return agent.best_of.of_one(agent.models.params, index, spaces["obs_dim"], seed, args.about(index))


def evaluate(agent: FQL, task: data.Task, envs: common.LockstepEnvs, epoch: int) -> common.Evaluation:
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
    agent = FQL(args, task, device)
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
