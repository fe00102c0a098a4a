"""Diffusion Q-Learning (DQL): a diffusion policy that clones and climbs Q through its own sampling chain.

Wang, Hunt and Zhou, 2023. The policy is a chain of 5 denoising steps; its loss is that of cloning plus -Q at an action sampled
with the whole chain, differentiated back through all of it. The method whose cost DTQL avoids.

It differs from `idql.py` in these points:

1. The diffusion policy itself is improved and deployed; its moving average makes the next actions in Q's target.
2. Q is learned from sampled next actions, without V; with `--max-q-backup` from the best of ten.
3. The chain clamps the predicted action, not its state; the network is a plain MLP, without dropout.
4. Of 50 candidates one is drawn with probability softmax(min(Q1', Q2')).
5. Gradients are clipped, of each model on its own.

Shapes, for one model: obs (B, S), actions (B, A) in [-1, 1], step (B, 1), noise (B, A), z (B, 5 A), coin ().
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
from stacked import Batch, Mish, Net, Params


@dataclass
class Args(common.Args):
    """Diffusion Q-Learning (DQL). The defaults shown are those of the given task."""

    sweep = ("eta",)

    # Algorithm specific arguments
    eta: float | tuple[float, ...] = 2.0
    """weight of Q in the policy's loss: large improves, 0 clones"""
    max_q_backup: bool = False
    """learn Q from the best of ten next actions, not from one"""
    max_norm: float = 2.0
    """the gradients of policy and of Qs are clipped to this norm"""
    num_candidates: int = 50
    """actions drawn from the policy in each state, of which one is taken with probability softmax(Q)"""
    learning_rate: float = 3e-4
    """of the policy; that of the Qs is 3e-4"""
    ema: float = 0.005
    """step of the policy's average towards the policy, every 5 updates from the 1000th on"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the target Qs towards the online Qs"""
    batch_size: int = 64
    """transitions per update and model"""
    epochs: int = 8
    """training epochs"""


# The authors': learning rate, eta, max_q_backup, epochs, max_norm. AntMaze v2 has no others than v0
SETTINGS = {
    "halfcheetah-medium-v2": (3e-4, 1, False, 2000, 9),
    "halfcheetah-medium-replay-v2": (3e-4, 1, False, 2000, 2),
    "halfcheetah-medium-expert-v2": (3e-4, 1, False, 2000, 7),
    "hopper-medium-v2": (3e-4, 1, False, 2000, 9),
    "hopper-medium-replay-v2": (3e-4, 1, False, 2000, 4),
    "hopper-medium-expert-v2": (3e-4, 1, False, 2000, 5),
    "walker2d-medium-v2": (3e-4, 1, False, 2000, 1),
    "walker2d-medium-replay-v2": (3e-4, 1, False, 2000, 4),
    "walker2d-medium-expert-v2": (3e-4, 1, False, 2000, 5),
    "antmaze-umaze-v0": (3e-4, 0.5, False, 1000, 2),
    "antmaze-umaze-diverse-v0": (3e-4, 2, True, 1000, 3),
    "antmaze-medium-play-v0": (1e-3, 2, True, 1000, 2),
    "antmaze-medium-diverse-v0": (3e-4, 3, True, 1000, 1),
    "antmaze-large-play-v0": (3e-4, 4.5, True, 1000, 10),
    "antmaze-large-diverse-v0": (3e-4, 3.5, True, 1000, 7),
    "pen-human-v1": (3e-5, 0.15, False, 1000, 7),
    "pen-cloned-v1": (3e-5, 0.1, False, 1000, 8),
    "kitchen-complete-v0": (3e-4, 0.005, False, 250, 9),
    "kitchen-partial-v0": (3e-4, 0.005, False, 1000, 10),
    "kitchen-mixed-v0": (3e-4, 0.005, False, 1000, 10),
}


def task_defaults(env_id: str) -> dict[str, Any]:
    """The arguments in which a task's defaults differ from those of `Args`, which are the demo's."""
    if env_id in data.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 8, "dtql/pointmaze-large-v0": 14}.get(env_id)  # as many updates as DTQL's
        return {} if epochs is None else dict(epochs=epochs, eval_every=epochs // 4)
    domain, name = data.domain(env_id), data.d4rl_id(env_id) or ""
    if name.startswith("antmaze"):
        name = name.replace("-v2", "-v0")
    learning_rate, eta, max_q_backup, epochs, max_norm = SETTINGS.get(name, (3e-4, 1, False, 2000, 5))
    return dict(
        learning_rate=learning_rate,
        eta=float(eta),
        max_q_backup=max_q_backup,
        epochs=epochs,
        max_norm=float(max_norm),
        batch_size=256,
        gamma=data.discount(env_id),
        eval_episodes=100 if domain in ("antmaze", "pen", "kitchen") else 10,
    ) | data.ogbench_defaults(env_id)


def check_args(args: Args) -> None:
    """Raise UserError for settings that cannot work."""
    common.check_args(args)
    common.check_range(
        args,
        eta="[0, inf)",
        max_norm="(0, inf)",
        num_candidates="[1, 1e6]",
        learning_rate="(0, inf)",
        ema="(0, 1]",
        gamma="[0, 1]",
        tau="(0, 1]",
    )


def transform_rewards(task: data.Task, env_id: str) -> np.ndarray:
    """Rewards (N,) to train on: sparse mazes 4 (r - 0.5), pen standardised, others as they are."""
    if task.sparse_goal:
        return 4 * (task.rewards - 0.5)
    if data.domain(env_id) == "pen" and len(task.rewards):
        return (task.rewards - task.rewards.mean()) / task.rewards.std(ddof=1)
    return task.rewards


# ---- the chain: x_i = sqrt(ALPHA_BAR_i) a + sqrt(1 - ALPHA_BAR_i) noise, i = 0 ... 4 ----------------------------------

STEPS = 5
BETA = [1 - math.exp(-0.1 / STEPS - 0.5 * 9.9 * (2 * i + 1) / STEPS**2) for i in range(STEPS)]
ALPHA_BAR = [math.prod(1 - beta for beta in BETA[: i + 1]) for i in range(STEPS)]
# Of x_(i-1) given x_i and the action: variance, and what the mean takes of the action and of x_i
_chain = list(zip(BETA, ALPHA_BAR, [1.0, *ALPHA_BAR]))
POSTERIOR_VARIANCE = [beta * (1 - before) / (1 - after) for beta, after, before in _chain]
POSTERIOR_ACTION = [beta * math.sqrt(before) / (1 - after) for beta, after, before in _chain]
POSTERIOR_X = [(1 - before) * math.sqrt(1 - beta) / (1 - after) for beta, after, before in _chain]


def add_noise(actions: Tensor, step: Tensor, noise: Tensor) -> Tensor:
    """x_i of actions (..., A) for steps (..., 1) and Gaussian noise (..., A)."""
    time = (step + 1) / STEPS
    alpha_bar = torch.exp(-0.1 * time - 0.5 * 9.9 * time**2)
    return alpha_bar.sqrt() * actions + (1 - alpha_bar).sqrt() * noise


def sample_chain(predict: Callable[[Tensor, int], Tensor], z: Tensor) -> Tensor:
    """Actions (..., A) from Gaussian z (..., STEPS A), with the noise that `predict(x, i)` sees in x_i.

    Steps draw from the posterior of x_(i-1) given x_i and the predicted action, which is clamped to [-1, 1].
    """
    x, *noises = z.chunk(STEPS, -1)
    for i in reversed(range(STEPS)):
        alpha_bar = ALPHA_BAR[i]
        action = ((x - math.sqrt(1 - alpha_bar) * predict(x, i)) / math.sqrt(alpha_bar)).clamp(-1, 1)
        x = POSTERIOR_ACTION[i] * action + POSTERIOR_X[i] * x
        if i:
            x = x + math.sqrt(POSTERIOR_VARIANCE[i]) * noises[i - 1]
    return x.clamp(-1, 1)


# ---- networks, each of one model -------------------------------------------------------------------------------------

HIDDEN = 256


class Critic(nn.Module):
    """Q(s, a): obs (B, S), actions (B, A) -> (B,)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim + action_dim, HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, 1),
        )  # fmt: skip

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat((obs, actions), -1)).squeeze(-1)


class Denoiser(nn.Module):
    """The noise in x_i: noisy actions (B, A), step (B, 1), obs (B, S) -> (B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), Mish(), nn.Linear(32, 16))
        self.net = nn.Sequential(
            nn.Linear(action_dim + obs_dim + 16, HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, action_dim),
        )  # fmt: skip
        self.register_buffer("frequencies", 10000 ** (-torch.arange(8) / 7), persistent=False)

    def forward(self, noisy_actions: Tensor, step: Tensor, obs: Tensor) -> Tensor:
        angles = step * self.frequencies
        embedding = self.time(torch.cat((angles.sin(), angles.cos()), -1))
        return self.net(torch.cat((noisy_actions, embedding, obs), -1))


# ---- losses of one model ---------------------------------------------------------------------------------------------


def denoising_loss(denoise: Any, actions: Tensor, obs: Tensor, step: Tensor, noise: Tensor) -> Tensor:
    """Squared error of the predicted noise, mean over batch and dimensions."""
    return (denoise(add_noise(actions, step, noise), step.to(actions), obs) - noise).square().mean()


def q_target(rewards: Tensor, terminals: Tensor, next_q: Tensor, gamma: float) -> Tensor:
    """r + gamma Q'(s', a'), without Q' where the episode ended."""
    return rewards + gamma * (1 - terminals) * next_q


# ---- the agent ---------------------------------------------------------------------------------------------------------


class DQL:
    """Diffusion Q-Learning, for K models at once. A loss is that of one model, whose parameters by network are `p`."""

    def __init__(self, args: Args, task: data.Task, device: torch.device):
        """The models on `device`, with the data beside them."""
        self.args, self.device = args, device
        rewards = transform_rewards(task, args.env_id)
        self.data = stacked.Transitions(task.obs, task.actions, rewards, task.terminals, task.next_obs, device)
        self.action_dim = task.actions.shape[1]
        dims = task.obs.shape[1], self.action_dim
        self.critic = Net(lambda: Critic(*dims), device, copies=2)
        self.denoiser = Net(lambda: Denoiser(*dims), device)

        nets = {"critic": self.critic, "denoiser": self.denoiser}
        metrics = ["critic", "denoiser", "actor_q", "q"]
        self.models = stacked.Learner(nets, args.model_seeds, metrics, device, args.compile, args.model_settings)
        self.models.add_target("target_critic", "critic")
        self.models.add_target("ema_denoiser", "denoiser")
        self.models.optimize(self.critic_loss, "critic", lr=3e-4, max_norm=args.max_norm)
        self.models.optimize(self.denoiser_loss, "denoiser", lr=args.learning_rate, max_norm=args.max_norm)
        self.train_step = self.models.buffers["train_step"] = torch.zeros((), device=device)
        self.best_of = stacked.BestOf(
            self.sample,
            self.target_q if args.num_candidates > 1 else None,
            ("denoiser", "target_critic"),
            args.num_candidates,
            task.action_low,
            task.action_high,
            device,
            args.compile,
            draws=STEPS,
        )

    def chain(self, params: Params, obs: Tensor, z: Tensor) -> Tensor:
        """Actions (..., A) of the diffusion policy with `params` in obs (..., S), from z (..., 5 A); all of it has a gradient."""
        return sample_chain(lambda x, i: self.denoiser(params, x, torch.full_like(x[..., :1], i), obs), z)

    def critic_loss(self, p: dict[str, Params], batch: Batch, z: Tensor) -> tuple[Tensor, Params]:
        """Both Qs on r + gamma min Q'(s', a'), a' of the policy's average; the largest of several a', z (candidates, B, 5 A)."""
        with torch.no_grad():
            next_obs = batch.next_obs.expand(*z.shape[:-1], -1)
            next_actions = self.chain(p["ema_denoiser"], next_obs, z)
            next_q = self.critic(p["target_critic"], next_obs, next_actions).amax(1).amin(0)
        q = self.critic(p["critic"], batch.obs, batch.actions)
        target = q_target(batch.rewards, batch.terminals, next_q, self.args.gamma)
        loss = (q - target).square().mean(1).sum()
        return loss, {"critic": loss, "q": q.mean()}

    def denoiser_loss(
        self, p: dict[str, Params], batch: Batch, step: Tensor, noise: Tensor, z: Tensor, coin: Tensor
    ) -> tuple[Tensor, Params]:
        """Cloning, minus eta times one of the Qs, which `coin` chooses, over the mean size of the other. The Qs are fixed."""
        clone = denoising_loss(functools.partial(self.denoiser, p["denoiser"]), batch.actions, batch.obs, step, noise)
        q = self.critic(p["critic"], batch.obs, self.chain(p["denoiser"], batch.obs, z))  # (2, B)
        mean, size = q.mean(1), q.detach().abs().mean(1) + 1e-6
        actor_q = torch.where(coin < 0.5, mean[0] / size[1], mean[1] / size[0])
        return clone - p["settings"]["eta"] * actor_q, {"denoiser": clone, "actor_q": mean.mean()}

    def update(self) -> None:
        """One update: Qs, policy, its average, targets, on one minibatch. Tensors only, of static shapes."""
        args, models, shape = self.args, self.models, (self.models.num_models, self.args.batch_size)
        batch, num_models, width = self.data.sample(*shape), models.num_models, STEPS * self.action_dim
        step = torch.randint(STEPS, (*shape, 1), device=self.device)
        noise = torch.randn(*shape, self.action_dim, device=self.device)
        z = torch.randn(*shape, width, device=self.device)
        next_z = torch.randn(num_models, 10 if args.max_q_backup else 1, args.batch_size, width, device=self.device)
        coin = torch.rand(num_models, device=self.device)

        models.step(self.critic_loss, batch, next_z)
        models.step(self.denoiser_loss, batch, step, noise, z, coin)
        models.average("ema_denoiser", "denoiser", args.ema * (self.train_step >= 1000) * (self.train_step % 5 == 0))
        models.average("target_critic", "critic", args.tau)
        self.train_step += 1

    # The choice of an action

    def sample(self, p: dict[str, Params], obs: Tensor, z: Tensor) -> Tensor:
        """Actions (..., A) of the diffusion policy in observations (..., S), from noise z (..., 5 A)."""
        return self.chain(p["denoiser"], obs.expand(*z.shape[:-1], -1), z)

    def target_q(self, p: dict[str, Params], obs: Tensor, actions: Tensor, copy: int) -> Tensor:
        """One of the target Qs (...,) of actions (..., A) in states (..., S)."""
        return self.critic(p["target_critic"], obs, actions, copy=copy)


def load_policy(checkpoint: str, index: int = 0, device: str = "cpu", seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a callable from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's own
    units. Raises UserError if the checkpoint cannot be read or has no such model.
    """
    args, spaces, learner = common.open_policy(checkpoint, __file__, Args, index, device)
    agent = DQL(args, data.Task.without_data(**spaces), torch.device(device))
    agent.models.load_state_dict(learner)
    return agent.best_of.of_one(agent.models.params, index, spaces["obs_dim"], seed, args.about(index))


def evaluate(agent: DQL, task: data.Task, envs: common.LockstepEnvs, epoch: int) -> common.Evaluation:
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
    agent = DQL(args, task, device)
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
