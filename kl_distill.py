"""KL-regularised one-step policies: the paper's comparison to DTQL (Section 3, Appendix C).

A diffusion policy only clones behaviour; a one-step policy is deployed. The one-step policy maximises an IQL critic
and is held near the data by the KL divergence from the diffusion policy, whose gradient is a difference of scores; a
second diffusion model, the fake score, follows the policy's own actions. Equation, section and appendix numbers are
those of Chen, Wang and Zhou, "Diffusion Policies Creating a Trust Region for Offline Reinforcement Learning" (2024).

Shapes, for one model: obs (B, S), actions (B, A) in [-1, 1], sigma (B, 1), rewards, terminals, Q and V (B,).
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    """KL-regularised one-step policy. The defaults shown are those of the given task (Table 4 of the paper)."""

    sweep = ("alpha", "expectile")

    # Algorithm specific arguments
    alpha: float | tuple[float, ...] = 1.0
    """weight of the KL regularisation (Eq. 12)"""
    expectile: float | tuple[float, ...] = 0.9
    """expectile of the value loss, the paper's tau (Eq. 6)"""
    q: bool = True
    """maximise Q; --no-q only distils the diffusion policy and trains no critic (Figure 2)"""
    learning_rate: float = 3e-4
    """of the diffusion policy and the fake score; the one-step policy has a tenth, Q and V always have 3e-4"""
    lr_decay: bool = False
    """decay all learning rates to 0 along a cosine over the training epochs"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the target Qs towards the online Qs, the paper's 1 - rho"""
    pretrain_epochs: int = 1
    """epochs that train only the critic and the diffusion policy, which is fixed in the training epochs"""
    num_candidates: int = 64
    """actions drawn from the policy in each state, of which one is taken with probability softmax(Q) (Appendix D)"""


# Table 4: alpha, expectile, NLL, training epochs, learning rate, lr decay
TABLE_4 = {
    "halfcheetah-medium-v2": (1, 0.7, False, 1000, 3e-4, False),
    "halfcheetah-medium-replay-v2": (5, 0.7, False, 1000, 3e-4, False),
    "halfcheetah-medium-expert-v2": (50, 0.7, False, 1000, 3e-4, False),
    "hopper-medium-v2": (5, 0.7, False, 1000, 1e-4, True),
    "hopper-medium-replay-v2": (5, 0.7, False, 1000, 3e-4, False),
    "hopper-medium-expert-v2": (20, 0.7, False, 1000, 3e-4, False),
    "walker2d-medium-v2": (5, 0.7, False, 1000, 3e-4, True),
    "walker2d-medium-replay-v2": (5, 0.7, False, 1000, 3e-4, True),
    "walker2d-medium-expert-v2": (5, 0.7, False, 1000, 3e-4, True),
    "antmaze-umaze-v0": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-umaze-diverse-v0": (1, 0.9, True, 500, 3e-5, True),
    "antmaze-medium-play-v0": (1, 0.9, True, 400, 3e-4, False),
    "antmaze-medium-diverse-v0": (1, 0.9, True, 400, 3e-4, False),
    "antmaze-large-play-v0": (1, 0.9, True, 350, 3e-4, False),
    "antmaze-large-diverse-v0": (0.5, 0.9, True, 300, 3e-4, False),
    "antmaze-umaze-v2": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-umaze-diverse-v2": (1, 0.9, True, 500, 3e-5, True),
    "antmaze-medium-play-v2": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-medium-diverse-v2": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-large-play-v2": (1, 0.9, True, 500, 3e-4, False),
    "antmaze-large-diverse-v2": (0.5, 0.9, True, 500, 3e-4, False),
    "pen-human-v1": (1500, 0.9, False, 300, 3e-5, True),
    "pen-cloned-v1": (1500, 0.7, False, 200, 1e-5, False),
    "kitchen-complete-v0": (200, 0.7, False, 500, 1e-4, True),
    "kitchen-partial-v0": (100, 0.7, False, 1000, 1e-4, True),
    "kitchen-mixed-v0": (200, 0.7, False, 500, 3e-4, True),
}
OTHERS = (5, 0.7, False, 1000, 3e-4, False)  # of tasks that the paper does not have
AS_ANTMAZE = (1, 0.9, True, 1000, 3e-4, False)  # OGBench: a guess


def task_defaults(env_id: str) -> dict[str, Any]:
    """The arguments in which a task's defaults differ from those of `Args`, which are the demo's."""
    if env_id in data.POINTMAZES:
        epochs = {"dtql/pointmaze-medium-v0": 6, "dtql/pointmaze-large-v0": 12}.get(env_id)
        if epochs is None:
            return {}
        # Larger mazes need more updates; smaller batches let three mazes pass in half an hour on two cores
        return dict(pretrain_epochs=2, epochs=epochs, eval_every=epochs // 3, batch_size=64, num_candidates=64, lr_decay=True)
    name = data.d4rl_id(env_id) or ""  # Minari's data of the same task takes the same row
    alpha, expectile, _, epochs, learning_rate, lr_decay = TABLE_4.get(name, AS_ANTMAZE if data.is_ogbench(env_id) else OTHERS)
    return dict(
        alpha=float(alpha),
        expectile=expectile,
        epochs=epochs,
        learning_rate=learning_rate,
        lr_decay=lr_decay,
        pretrain_epochs=50,
        num_candidates=1024,
        batch_size=2048 if name.startswith("antmaze") else 256,
        gamma=data.discount(env_id),
        eval_episodes=100 if name.startswith(("antmaze", "pen", "kitchen")) else 10,
    ) | data.ogbench_defaults(env_id)


def check_args(args: Args) -> None:
    """Raise UserError for settings that cannot work."""
    common.check_args(args)
    common.check_range(
        args,
        alpha="[0, inf)",
        expectile="(0, 1)",
        learning_rate="(0, inf)",
        gamma="[0, 1]",
        tau="(0, 1]",
        pretrain_epochs="[0, 1e9]",
        num_candidates="[1, 1e6]",
    )


# ---- EDM schedule (Appendix B; Karras et al. 2022) -------------------------------------------------------------------

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0
SIGMA_GEN = 2.5  # noise level at which the implicit policy generates an action in one step
WEIGHT_FLOOR = 0.02  # of the weight's denominator: on the data and at small noise it would vanish

c_skip = lambda sigma: SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
c_out = lambda sigma: sigma * SIGMA_DATA * torch.rsqrt(sigma**2 + SIGMA_DATA**2)
c_in = lambda sigma: torch.rsqrt(sigma**2 + SIGMA_DATA**2)
c_noise = lambda sigma: torch.log(sigma) / 4


def sample_sigma(u: Tensor) -> Tensor:
    """Noise levels from uniform u in [0, 1): log sigma ~ logistic(log sigma_data, 0.5), truncated by inverse CDF."""
    low, high = (1 / (1 + math.exp(-math.log(sigma / SIGMA_DATA) / 0.5)) for sigma in (SIGMA_MIN, SIGMA_MAX))
    return (SIGMA_DATA * torch.exp(0.5 * torch.logit(low + (high - low) * u))).clamp(SIGMA_MIN, SIGMA_MAX)


# ---- networks (Appendix D), each of one model ------------------------------------------------------------------------

HIDDEN = 256


class Denoiser(nn.Module):
    """The diffusion policy mu_phi(a_t, t | s) (Appendix B): noisy actions (B, A), sigma (B, 1), obs (B, S) -> (B, A)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), Mish(), nn.Linear(32, 16))
        self.net = nn.Sequential(
            nn.Linear(action_dim + obs_dim + 16, HIDDEN),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, action_dim),
        )  # fmt: skip
        self.register_buffer("frequencies", 10000 ** (-torch.arange(8) / 7), persistent=False)

    def forward(self, noisy_actions: Tensor, sigma: Tensor, obs: Tensor) -> Tensor:
        angles = c_noise(sigma) * self.frequencies
        embedding = self.time(torch.cat((angles.sin(), angles.cos()), -1))
        output = self.net(torch.cat((c_in(sigma) * noisy_actions, obs, embedding), -1))
        return c_skip(sigma) * noisy_actions + c_out(sigma) * output


class Critic(nn.Module):
    """Q(s, a): obs (B, S), actions (B, A) -> (B,)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim + action_dim, HIDDEN), nn.LayerNorm(HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN), Mish(),
            nn.Linear(HIDDEN, 1),
        )  # fmt: skip

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat((obs, actions), -1)).squeeze(-1)


class Value(nn.Module):
    """V(s): obs (B, S) -> (B,)."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim, HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, HIDDEN), Mish(),
            nn.Linear(HIDDEN, 1),
        )  # fmt: skip

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


class ImplicitActor(Denoiser):
    """The one-step policy a = D_theta(sigma_gen z, sigma_gen | s), built like the diffusion policy."""

    def forward(self, obs: Tensor, z: Tensor) -> Tensor:
        return super().forward(SIGMA_GEN * z, z.new_full((1,), SIGMA_GEN).expand(*z.shape[:-1], 1), obs)


# ---- losses of one model ---------------------------------------------------------------------------------------------


def expectile_loss(u: Tensor, expectile: float | Tensor) -> Tensor:
    """Eq. 6: mean of |expectile - 1(u < 0)| u^2."""
    return ((expectile - (u < 0).float()).abs() * u**2).mean()


def q_target(rewards: Tensor, terminals: Tensor, next_v: Tensor, gamma: float) -> Tensor:
    """Eq. 7's target r + gamma V(s'), without V(s') where the episode ended."""
    return rewards + gamma * (1 - terminals) * next_v


def denoising_loss(denoise: Any, actions: Tensor, obs: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Eq. 2 (actions from the data) and Eq. 4 (actions of the policy) with w = 1 / c_out^2, mean over dimensions too."""
    return ((denoise(actions + sigma * noise, sigma, obs) - actions) / c_out(sigma)).square().mean()


def kl_loss(actions: Tensor, real: Any, fake: Any, obs: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Eq. 12 through its gradient (Algorithm 2): (s_fake - s_real) with w = sigma^2 A / |mu_phi(a_t) - a|_1.

    As s = (mu(a_t) - a_t) / sigma^2, the scores differ by (mu_fake - mu_real) / sigma^2 (Appendix C).
    """
    fixed = actions.detach()
    noisy = fixed + sigma * noise
    pred_real, pred_fake = real(noisy, sigma, obs), fake(noisy, sigma, obs)
    weight = (fixed - pred_real).abs().mean(-1, keepdim=True).clamp(min=WEIGHT_FLOOR)
    return 0.5 * (actions - (fixed - (pred_fake - pred_real) / weight)).square().mean()


# ---- the agent ---------------------------------------------------------------------------------------------------------


class KLDistill:
    """Algorithm 2, for K models at once. A loss is that of one model, whose parameters by network are `p`."""

    def __init__(self, args: Args, task: data.Task, device: torch.device):
        """The models on `device`, with the data beside them."""
        self.args, self.device = args, device
        rewards = task.rewards - 1 if task.sparse_goal else task.rewards  # AntMaze: -1 on the way, 0 at the goal
        self.data = stacked.Transitions(task.obs, task.actions, rewards, task.terminals, task.next_obs, device)
        self.action_dim = task.actions.shape[1]
        dims = task.obs.shape[1], self.action_dim
        self.critic = Net(lambda: Critic(*dims), device, copies=2)
        self.value = Net(lambda: Value(dims[0]), device)
        self.denoiser = Net(lambda: Denoiser(*dims), device)
        self.actor = Net(lambda: ImplicitActor(*dims), device)
        self.fake = Net(lambda: Denoiser(*dims), device)

        nets = {"critic": self.critic, "value": self.value, "denoiser": self.denoiser, "actor": self.actor, "fake": self.fake}
        metrics = ["critic", "value", "denoiser", "actor", "kl", "q", "fake"]
        self.models = stacked.Learner(nets, args.model_seeds, metrics, device, args.compile, args.model_settings)
        self.models.add_target("target_critic", "critic")
        self.models.optimize(self.critic_loss, "critic", "value", lr=3e-4)
        self.models.optimize(self.denoiser_loss, "denoiser", lr=args.learning_rate)
        self.models.optimize(self.actor_loss, "actor", lr=args.learning_rate / 10)
        self.models.optimize(self.fake_loss, "fake", lr=args.learning_rate)
        self.train_step = self.models.buffers["train_step"] = torch.zeros((), device=device)  # updates after pretraining
        self.best_of = stacked.BestOf(
            self.sample,
            self.target_q,
            ("actor", "target_critic"),
            args.num_candidates if args.q else 1,
            task.action_low,
            task.action_high,
            device,
            args.compile,
        )

    def denoise(self, params: Params) -> Callable[..., Tensor]:
        """The diffusion policy with `params`; what it predicts is clamped to the actions there are."""
        return lambda *inputs: self.denoiser(params, *inputs).clamp(-1, 1)

    def critic_loss(self, p: dict[str, Params], batch: Batch) -> tuple[Tensor, Params]:
        """Eqs. 6 and 7: no gradient reaches Q through V's loss, nor V(s') through Q's."""
        q = self.critic(p["critic"], batch.obs, batch.actions)
        v = self.value(p["value"], batch.obs)
        next_v = self.value(stacked.detach(p["value"]), batch.next_obs)
        value_loss = expectile_loss(q.detach().amin(0) - v, p["settings"]["expectile"])
        target = q_target(batch.rewards, batch.terminals, next_v, self.args.gamma)
        critic_loss = (target - q).square().mean(1).sum()
        return critic_loss + value_loss, {"critic": critic_loss, "value": value_loss}

    def denoiser_loss(self, p: dict[str, Params], batch: Batch, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Params]:
        """Eq. 2."""
        loss = denoising_loss(self.denoise(p["denoiser"]), batch.actions, batch.obs, sigma, noise)
        return loss, {"denoiser": loss}

    def actor_loss(self, p: dict[str, Params], batch: Batch, z: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Params]:
        """Eq. 5 with the KL divergence in place of the trust region. Both diffusion models and the critic are fixed."""
        actions = self.sample(p, batch.obs, z)
        # The fake score's prediction is not clamped: an action beyond the bounds must be seen there to be pulled back
        fake = lambda *inputs: self.fake(p["fake"], *inputs)
        kl = kl_loss(actions, self.denoise(p["denoiser"]), fake, batch.obs, sigma, noise)
        # Q knows only [-1, 1]
        q = self.critic(p["critic"], batch.obs, actions.clamp(-1, 1)).amin(0).mean() if self.args.q else torch.zeros_like(kl)
        loss = p["settings"]["alpha"] * kl - q
        return loss, {"actor": loss, "kl": kl, "q": q}

    def fake_loss(self, p: dict[str, Params], batch: Batch, z: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Params]:
        """L(xi) of Appendix C with Eq. 2's weight: the fake score learns to denoise the policy's actions."""
        fake = lambda *inputs: self.fake(p["fake"], *inputs)
        loss = denoising_loss(fake, self.sample(p, batch.obs, z), batch.obs, sigma, noise)
        return loss, {"fake": loss}

    def update(self, training: bool) -> None:
        """One iteration of Algorithm 2's loops, with the critic. Tensors only, of static shapes."""
        args, models, shape = self.args, self.models, (self.models.num_models, self.args.batch_size)
        batch = self.data.sample(*shape)
        sigma = sample_sigma(torch.rand(3, *shape, 1, device=self.device))
        noise = torch.randn(5, *shape, self.action_dim, device=self.device)
        decay = None
        if training and args.lr_decay:
            decay = (1 + torch.cos(math.pi * self.train_step / (args.epochs * args.steps_per_epoch))) / 2

        if args.q:
            models.step(self.critic_loss, batch, decay=decay)
        if not training:
            models.step(self.denoiser_loss, batch, sigma[0], noise[0])
        if training:
            models.step(self.actor_loss, batch, noise[1], sigma[1], noise[2], decay=decay)
            models.step(self.fake_loss, batch, noise[3], sigma[2], noise[4], decay=decay)
            models.average("target_critic", "critic", args.tau)
            self.train_step += 1

    def start_training(self) -> None:
        """The end of pretraining: the target Qs begin as the online ones, theta and xi as phi."""
        self.models.copy("critic", "target_critic")
        self.models.copy("denoiser", "actor", "fake")

    # The choice of an action (Appendix D)

    def sample(self, p: dict[str, Params], obs: Tensor, z: Tensor) -> Tensor:
        """Actions (..., A) of the one-step policy from Gaussian noise z (..., A); obs (..., S) may broadcast."""
        return self.actor(p["actor"], obs.expand(*z.shape[:-1], obs.shape[-1]), z)

    def target_q(self, p: dict[str, Params], obs: Tensor, actions: Tensor, copy: int) -> Tensor:
        """One of the two target Qs, which choose among the candidates."""
        return self.critic(p["target_critic"], obs, actions, copy=copy)


def load_policy(
    checkpoint: str, index: int = 0, num_candidates: int | None = None, device: str = "cpu", seed: int = 0
) -> Callable[[np.ndarray], np.ndarray]:
    """The deployed policy of model `index` in a checkpoint.

    Returns a callable from one observation (S,) or a batch (B, S) to actions (A,) or (B, A) in the environment's own
    units. `num_candidates`: as trained if None; 1 takes a plain sample of the policy.
    Raises UserError if the checkpoint cannot be read or has no such model.
    """
    args, spaces, learner = common.open_policy(checkpoint, __file__, Args, index, device)
    args = replace(args, num_candidates=args.num_candidates if num_candidates is None else num_candidates)
    check_args(args)
    agent = KLDistill(args, data.Task.without_data(**spaces), torch.device(device))
    agent.models.load_state_dict(learner)
    return agent.best_of.of_one(agent.models.params, index, spaces["obs_dim"], seed, args.about(index))


def evaluate(agent: KLDistill, task: data.Task, envs: common.LockstepEnvs, epoch: int) -> common.Evaluation:
    """Episodes of all models in lock-step, with target Qs and candidates as in Appendix D."""
    act = lambda obs, generator: agent.best_of(agent.models.params, obs, generator)
    return common.evaluate(task, envs, act, agent.args, epoch, agent.device)


def main(args: Args) -> dict[str, Any]:
    """Train and evaluate. Returns the run's folder and the rows of its eval.csv; raises UserError for bad input."""
    check_args(args)
    device = common.find_device(args)
    task = data.task_of(args)
    envs = common.make_lockstep_envs(task, args)
    common.seed_everything(args.seed, args.torch_deterministic)
    agent = KLDistill(args, task, device)
    prepare = functools.cache(
        lambda training: agent.models.prepare(functools.partial(agent.update, training), args.cudagraphs and args.cuda)
    )

    with contextlib.closing(envs), common.Run(__file__, args, task, agent.models, device) as run:
        while True:
            if run.evaluation_due():
                run.add_evaluation(evaluate(agent, task, envs, run.epoch))
            if run.step == args.total_steps:
                break
            if run.step == args.pretrain_steps:
                agent.start_training()
            update = prepare(training=run.step >= args.pretrain_steps)
            for _ in range(run.until_log()):
                update()
                run.advance()
            run.log()
        run.save()
    return run.summary()


if __name__ == "__main__":
    common.run(main, lambda: common.parse_args(Args, task_defaults))
