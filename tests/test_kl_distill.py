"""The KL-regularised variant: its gradient against Gaussians, distillation of a known mixture, and its kinship."""

import difflib

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, make_agent, make_args, make_task, run_script

import kl_distill
from common import UserError


def gaussian_denoiser(mean: float, std: float):
    """E[a | a_t] where a ~ N(mean, std^2), and the score of a_t's density."""
    posterior = lambda noisy, sigma, obs: (std**2 * noisy + sigma**2 * mean) / (std**2 + sigma**2)
    score = lambda noisy, sigma: -(noisy - mean) / (std**2 + sigma**2)
    return posterior, score


def test_gradient_is_the_weighted_difference_of_scores():
    torch.manual_seed(0)
    real, real_score = gaussian_denoiser(0.3, 0.2)
    fake, fake_score = gaussian_denoiser(-0.1, 0.4)
    actions = torch.randn(500, 3).double().mul(0.5).requires_grad_()
    sigma, noise = kl_distill.sample_sigma(torch.rand(500, 1)).double(), torch.randn(500, 3).double()
    kl_distill.kl_loss(actions, real, fake, torch.zeros(500, 1), sigma, noise).backward()

    noisy = actions.detach() + sigma * noise
    distance = (real(noisy, sigma, None) - actions.detach()).abs().sum(1, keepdim=True)  # the L1 norm, A = 3
    assert (distance / 3 > kl_distill.WEIGHT_FLOOR).float().mean() > 0.9
    weight = sigma**2 / (distance / 3).clamp(min=kl_distill.WEIGHT_FLOOR)  # w_t of Appendix C, alpha_t = 1
    expected = weight * (fake_score(noisy, sigma) - real_score(noisy, sigma)) / actions.numel()  # mse_loss is a mean
    torch.testing.assert_close(actions.grad, expected)


def test_weight_has_a_floor():
    """On the data, at little noise, the prediction is the action itself: the step must stay bounded."""
    actions = torch.zeros(4, 2, requires_grad=True)
    same, off = (lambda noisy, sigma, obs: torch.zeros_like(noisy)), (lambda noisy, sigma, obs: torch.ones_like(noisy))
    kl_distill.kl_loss(actions, same, off, None, torch.full((4, 1), 0.002), torch.zeros(4, 2)).backward()
    torch.testing.assert_close(actions.grad, torch.full((4, 2), 1 / kl_distill.WEIGHT_FLOOR / 8))


@pytest.fixture(scope="module")
def distilled() -> np.ndarray:
    """Samples of a policy distilled, without any Q, from data at -0.6 (30 %) and 0.5 (70 %)."""
    rng = np.random.default_rng(0)
    n = 4000
    actions = np.where(rng.random(n) < 0.3, -0.6, 0.5)[:, None] + 0.03 * rng.standard_normal((n, 1))
    zeros = np.zeros((n, 1), np.float32)
    task = make_task(zeros, actions, zeros[:, 0], zeros[:, 0], zeros)
    args = kl_distill.Args(**{**TINY, "q": False, "learning_rate": 1e-3, "batch_size": 256})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kl_distill, "HIDDEN", 128)  # enough here, and faster
        agent = kl_distill.KLDistill(args, task, torch.device("cpu"))
    for _ in range(1000):
        agent.update(training=False)
    agent.start_training()
    for _ in range(1500):
        agent.update(training=True)
    p = {"actor": {name: param[0].detach() for name, param in agent.models.params["actor"].items()}}
    with torch.no_grad():
        return agent.sample(p, torch.zeros(5000, 1), torch.randn(5000, 1)).numpy()[:, 0]


def test_distillation_recovers_both_modes_in_proportion(distilled):
    left, right = np.abs(distilled + 0.6) < 0.15, np.abs(distilled - 0.5) < 0.15
    assert (left | right).mean() > 0.75
    assert left.mean() / (left | right).mean() == pytest.approx(0.3, abs=0.1)


def test_start_of_training_copies_the_diffusion_model():
    agent = make_agent(module=kl_distill)
    agent.update(training=False)
    before = agent.models.params["denoiser"]["net.0.weight"].detach().clone()
    agent.start_training()
    for network in ("actor", "fake"):
        for name, param in agent.models.params["denoiser"].items():
            assert torch.equal(agent.models.params[network][name], param)
    agent.update(training=True)
    assert torch.equal(agent.models.params["denoiser"]["net.0.weight"], before)  # fixed from here on
    for network in ("actor", "fake", "critic", "value", "target_critic"):
        name = next(iter(agent.models.params[network]))
        assert not torch.equal(agent.models.params[network][name], agent.models.params["denoiser"].get(name, before))


def test_no_q_trains_no_critic():
    agent = make_agent(module=kl_distill, q=False)
    critic = {name: param.detach().clone() for name, param in agent.models.params["critic"].items()}
    for training in (False, True):
        agent.update(training=training)
    assert all(torch.equal(param, critic[name]) for name, param in agent.models.params["critic"].items())


def test_the_diff_shows_the_two_methods_and_nothing_else():
    files = [(ROOT / name).read_text().splitlines() for name in ("dtql_continuous.py", "kl_distill.py")]
    diff = [line for line in difflib.unified_diff(*files, n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert len(diff) < 150
    defined = [{line.split("(")[0] for line in file if line.startswith("def ")} for file in files]
    assert defined[0] - defined[1] == {"def gaussian_nll"} and defined[1] - defined[0] == {"def kl_loss"}


def test_bad_input(hopper, tmp_path):
    with pytest.raises(UserError, match="--expectile"):
        kl_distill.main(make_args(tmp_path, kl_distill, expectile=1.5))
    result = run_script("--nll", script="kl_distill.py")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
