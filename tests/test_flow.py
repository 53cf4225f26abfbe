"""Flow matching: the objective and its draws against ACE-Step's own numbers."""

import pytest
import torch
from safetensors.torch import load_file

from sidestep.errors import UserError
from sidestep.training.flow import (
    TURBO_TIMESTEPS,
    LargerOfTwo,
    LogitNormal,
    Turbo,
    Uniform,
    VelocityLoss,
    draw_noising,
    noisy_latents_and_velocity,
)
from sidestep.training.forward import predict_velocity
from tests.golden import GOLDEN, golden_transformer

QUANTILES = {0.01: 0.1569, 0.1: 0.2935, 0.25: 0.4013, 0.5: 0.5362, 0.75: 0.6699, 0.9: 0.7742, 0.99: 0.8980}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("timesteps", "mean", "above_half"),
    [
        (LogitNormal(mean=-0.4, std=1.0), 0.418, 0.345),
        (LargerOfTwo(mean=-0.4, std=1.0), 0.5345, 0.5697),
        (Uniform(), 0.5, 0.5),
        (Turbo(), sum(TURBO_TIMESTEPS) / 8, 6 / 8),
    ],
)
def test_timesteps_have_the_documented_distribution(timesteps, mean, above_half):
    t = timesteps.sample(400_000, seeded())
    assert t.mean().item() == pytest.approx(mean, abs=2e-3)
    assert (t > 0.5).float().mean().item() == pytest.approx(above_half, abs=3e-3)


def test_acestep_times_have_the_quantiles_of_the_original_sampler():
    t = LargerOfTwo(mean=-0.4, std=1.0).sample(1_000_000, seeded())
    for quantile, expected in QUANTILES.items():
        assert t.kthvalue(int(quantile * len(t))).values.item() == pytest.approx(expected, abs=2e-3)


def test_turbo_times_are_the_shift_3_schedule():
    expected = [1.0, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3]
    assert list(TURBO_TIMESTEPS) == pytest.approx(expected, abs=1e-6)


def test_mean_and_std_come_from_the_checkpoint_unless_set():
    assert LogitNormal().with_defaults(-0.4, 1.0) == LogitNormal(mean=-0.4, std=1.0)
    assert LogitNormal(mean=0.0).with_defaults(-0.4, 1.0) == LogitNormal(mean=0.0, std=1.0)


def test_a_spread_that_is_not_positive_is_refused():
    with pytest.raises(UserError, match=r"timesteps\.std=0\.0 must be above 0"):
        LogitNormal(std=0.0)


def test_going_back_along_the_velocity_recovers_the_latents():
    latents, noise, t = torch.randn(3, 7, 4), torch.randn(3, 7, 4), torch.rand(3)
    noisy_latents, velocity = noisy_latents_and_velocity(latents, noise, t)
    torch.testing.assert_close(noisy_latents - t.view(-1, 1, 1) * velocity, latents)


def test_time_0_is_the_latents_and_time_1_is_the_noise():
    latents, noise = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    noisy_latents, _ = noisy_latents_and_velocity(latents, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(noisy_latents[0], latents[0])
    assert torch.equal(noisy_latents[1], noise[1])


def test_shapes_that_disagree_are_named():
    with pytest.raises(ValueError, match=r"got \(2, 5, 4\), \(2, 6, 4\) and \(2,\)"):
        noisy_latents_and_velocity(torch.zeros(2, 5, 4), torch.zeros(2, 6, 4), torch.zeros(2))


@pytest.mark.parametrize(("case", "seed", "dropout"), [("l1_no_dropout", 7, 0.0), ("l2_one_dropped", 0, 0.4)])
def test_the_loss_its_draws_and_its_gradient_equal_the_original_forward(case, seed, dropout):
    golden = load_file(GOLDEN / "training_loss.safetensors")
    null_condition = load_file(GOLDEN / "weights_tiny.safetensors")["null_condition_emb"].float()[0]
    transformer = golden_transformer()
    latents = golden["common.x0"]
    # in the golden batch the context differs between examples, so it is passed whole
    context = golden["common.context_latents"]

    noising = draw_noising(latents, LargerOfTwo(mean=-0.4, std=1.0), dropout, seeded(seed))
    assert torch.equal(noising.noise, golden[f"{case}.x1"])
    torch.testing.assert_close(noising.t, golden[f"{case}.t"], atol=1e-6, rtol=0)
    assert torch.equal(~noising.dropped, golden[f"{case}.keep"].bool())

    losses = VelocityLoss().loss(
        predict_velocity(transformer, context), latents, golden["common.encoder_hidden_states"], null_condition, noising
    )
    torch.testing.assert_close(losses, golden[f"{case}.per_sample_mse"], atol=1e-5, rtol=0)
    loss = losses.mean()
    assert loss.item() == pytest.approx(golden[f"{case}.loss"].item(), abs=1e-5)

    weight = transformer.layers[0].self_attn.to_q.weight
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(
        gradient, golden[f"{case}.grad.decoder.layers.0.self_attn.q_proj.weight"], atol=1e-5, rtol=0
    )


def test_padded_frames_add_nothing_to_the_loss():
    latents, noise = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    noising = draw_noising(latents, Uniform(), 0.0, seeded())._replace(noise=noise)
    frame_mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])

    def predict(noisy_latents, t, condition):
        return torch.zeros_like(noisy_latents)

    condition = torch.zeros(2, 3, 4)
    masked = VelocityLoss().loss(predict, latents, condition, torch.zeros(1, 4), noising, frame_mask)
    alone = (noise - latents).square()
    torch.testing.assert_close(masked, torch.stack([alone[0].mean(), alone[1, :4].mean()]))
