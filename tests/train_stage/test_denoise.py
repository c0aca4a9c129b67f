"""The denoising objective computes what the released ROSS code computes (tests/data/ross, see its golden.json)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manifests.schema import FeaturesSpec
from train_stage import config
from train_stage.batch import NO_TOKEN, Batch
from train_stage.denoiser import add_noise, cosine_schedule, position_table, time_frequencies
from train_stage.objectives.denoise import DenoiseObjective, latents, stacked

FIXTURE = Path(__file__).parents[1] / "data" / "ross"
GOLDEN = load_file(FIXTURE / "golden.safetensors")
FACTS = json.loads((FIXTURE / "golden.json").read_text())
GRID, TARGET_GRID, REPEATS = (5, 5), (10, 10), 4
NAMES = {
    "patch_in": "x_embedder.proj",
    "time_in.0": "t_embedder.mlp.0",
    "time_in.2": "t_embedder.mlp.2",
    "hidden_in.1": "z_embedder.1",
    "last_modulation": "final_layer.adaLN_modulation.1",
    "noise_out": "final_layer.linear",
} | {
    f"blocks.{n}.{ours}": f"blocks.{n}.{theirs}"
    for n in range(2)
    for ours, theirs in (
        ("qkv", "attn.qkv"),
        ("out", "attn.proj"),
        ("up", "mlp.fc1"),
        ("down", "mlp.fc2"),
        ("modulation", "adaLN_modulation.1"),
    )
}
SPEC = FeaturesSpec(
    kind="vae",
    origin="tiny",
    weights_sha256={},
    view_size=80,
    grid=TARGET_GRID,
    width=8,
    dtype="float32",
    settings={"shift_factor": 0.1159, "scaling_factor": 0.3611},
)


def objective(*, golden: bool = True, chunk: int = 1024, **changes: object) -> DenoiseObjective:
    settings = config.DenoiseObjective.model_validate(
        {"kind": "denoise", "manifests": ["m"], "width": 64, "layers": 2, "heads": 16, **changes}
    )
    torch.manual_seed(0)
    made = DenoiseObjective(settings, 48, GRID, SPEC, chunk=chunk)
    if golden:
        weights = torch.load(FIXTURE / "mm_inv_projector.bin")
        weights = {name.removeprefix("model.mm_inv_projector.net."): t.float() for name, t in weights.items()}
        state = {
            f"{ours}.{part}": weights[f"{theirs}.{part}"].view_as(made.denoiser.get_parameter(f"{ours}.{part}"))
            for ours, theirs in NAMES.items()
            for part in ("weight", "bias")
        }
        made.denoiser.load_state_dict(state)
        made.denoiser.positions = weights["pos_embed"][0]  # the release keeps it rounded to bfloat16
    return made


def by_view(rows: torch.Tensor) -> torch.Tensor:
    """The release's rows, repeat by repeat, as (V, R, ...)."""
    return rows.unflatten(0, (REPEATS, 2)).transpose(0, 1)


def as_positions(maps: torch.Tensor) -> torch.Tensor:
    return maps.flatten(-2).transpose(-1, -2)


def golden_latents() -> torch.Tensor:
    mean = as_positions(GOLDEN["vae_latents"][:2])
    stored = torch.cat([mean, torch.zeros_like(mean)], dim=-1)
    return stacked(latents(stored, SPEC, None), GRID, TARGET_GRID)


def batch(stored: torch.Tensor | None = None) -> Batch:
    """Three rows of 40 tokens with images at 8 and 9; the last row is text only."""
    ids = torch.zeros(3, 40, dtype=torch.long)
    position = torch.stack([8 + torch.arange(25), 40 + 9 + torch.arange(25)])
    views = torch.zeros(2, 70, 70, 3, dtype=torch.uint8)
    mask = torch.ones(2, 25, dtype=torch.bool)
    targets = {} if stored is None else {"denoise": stored}
    return Batch(ids, ids, ids, views, position, mask, ["a", "b", "c"], targets, torch.tensor([5, 6]))


def test_schedule_tables_and_targets_equal_the_release() -> None:
    torch.testing.assert_close(cosine_schedule(), GOLDEN["alphas_cumprod_cosine"], rtol=1e-6, atol=0)
    torch.testing.assert_close(cosine_schedule()[:-1], GOLDEN["alphas_cumprod_cosine"][:-1], rtol=1e-9, atol=0)
    torch.testing.assert_close(position_table(GRID, 64)[None], GOLDEN["pos_embed_fp32"], rtol=0, atol=1e-6)
    torch.testing.assert_close(time_frequencies(GOLDEN["t"]), GOLDEN["t_freq"], rtol=0, atol=1e-4)
    target = golden_latents()
    torch.testing.assert_close(target, as_positions(GOLDEN["target"]), rtol=0, atol=1e-6)
    t, noise = GOLDEN["t"].long(), as_positions(GOLDEN["noise"])
    noisy = add_noise(target.repeat(REPEATS, 1, 1), noise, cosine_schedule()[t])
    torch.testing.assert_close(noisy, as_positions(GOLDEN["x_t"]), rtol=0, atol=1e-5)


def test_the_denoiser_equals_the_release() -> None:
    cond = GOLDEN["cond"].repeat(REPEATS, 1, 1)
    with torch.no_grad():
        predicted = objective().denoiser(as_positions(GOLDEN["x_t"]), GOLDEN["t"], cond)
    torch.testing.assert_close(predicted, as_positions(GOLDEN["eps_pred"]), rtol=0, atol=1e-5)
    loss = (predicted - as_positions(GOLDEN["noise"])).square().mean(dim=(1, 2))
    torch.testing.assert_close(loss, GOLDEN["per_sample_loss"], rtol=5e-6, atol=0)


@pytest.mark.parametrize("chunk", [1024, 50])
def test_loss_and_gradients_equal_the_release(chunk: int) -> None:
    made, cond = objective(chunk=chunk), GOLDEN["cond"].clone().requires_grad_()
    mask = torch.ones(2, 25, dtype=torch.bool)
    t, noise = by_view(GOLDEN["t"].long()), as_positions(by_view(GOLDEN["noise"]))
    loss = made.score(cond, golden_latents(), mask, t, noise) / mask.sum()
    assert loss.item() == pytest.approx(FACTS["loss_image_rows"], rel=2e-6)
    loss.backward()
    torch.testing.assert_close(cond.grad, GOLDEN["grad_cond"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(made.denoiser.noise_out.weight.grad, GOLDEN["grad_final_linear"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made.denoiser.blocks[0].qkv.weight.grad, GOLDEN["grad_qkv0"], rtol=1e-4, atol=1e-6)
    norms = {
        f"net.{theirs}.{part}": made.denoiser.get_parameter(f"{ours}.{part}").grad.norm().item()
        for ours, theirs in NAMES.items()
        for part in ("weight", "bias")
    }
    assert norms == pytest.approx(FACTS["grad_norms"], rel=1e-4)


def test_a_batch_scores_the_hidden_states_of_its_images() -> None:
    """Row 2, text only, enters nothing: the release's mean over all rows is another number."""
    made = objective(latents="mean")
    mean = as_positions(GOLDEN["vae_latents"][:2])
    own = batch(torch.cat([mean, torch.zeros_like(mean)], dim=-1))
    t, noise, posterior = made.draw(own)
    assert posterior is None
    sums = made(GOLDEN["hidden_states"], own)
    expected = made.score(GOLDEN["cond"], golden_latents(), own.target_mask, t, noise)
    torch.testing.assert_close(sums.loss_sum_D[0], expected)
    assert (sums.targets, sums.correct_D.numel()) == (50, 0)


def test_padding_cells_and_cut_views_are_not_scored() -> None:
    made = objective()
    own = batch(torch.zeros(2, 100, 8))
    own.target_mask[0, :5] = False
    own.view_position[1, -1] = NO_TOKEN
    assert made.count_targets(own) == 20
    hidden = torch.randn(3, 40, 48, requires_grad=True)
    sums = made(hidden, own)
    sums.loss_sum_D.sum().backward()
    assert hidden.grad[0].any()
    assert not hidden.grad[1:].any()


def test_draws_depend_on_view_and_step_alone() -> None:
    made, own = objective(), batch()
    t, noise, posterior = made.draw(own)
    turned = Batch(**{**vars(own), "view_keys": own.view_keys.flip(0)})
    for first, second in zip((t, noise, posterior), made.draw(turned), strict=True):
        assert torch.equal(first, second.flip(0))
    assert not torch.equal(made.draw(Batch(**{**vars(own), "draw_seed": 1}))[1], noise)


def test_a_posterior_is_sampled_and_an_encoder_is_standardised() -> None:
    stored = torch.cat([torch.ones(1, 100, 4), torch.full((1, 100, 4), 2 * torch.tensor(3.0).log())], dim=-1)
    found = latents(stored, SPEC, torch.ones(1, 100, 4))
    torch.testing.assert_close(found, torch.full((1, 100, 4), (1 + 3 - 0.1159) * 0.3611))
    plain = latents(torch.randn(1, 9, 64) * 7 + 3, SPEC.model_copy(update={"kind": "features"}), None)
    assert plain.mean(dim=-1).abs().max() < 1e-5
    assert plain.std(dim=-1, unbiased=False).sub(1).abs().max() < 1e-3


def test_a_fresh_denoiser_starts_at_one() -> None:
    sums = objective(golden=False)(torch.randn(3, 40, 48), batch(torch.randn(2, 100, 8)))
    assert (sums.loss_sum_D / sums.targets).item() == pytest.approx(1.0, rel=0.05)


def test_without_images_every_parameter_has_a_zero_gradient() -> None:
    made, own = objective(), batch()
    empty = Batch(
        **{**vars(own), "view_position": own.view_position * 0 + NO_TOKEN, "target_mask": own.target_mask & False}
    )
    sums = made(torch.randn(3, 40, 48), empty)
    sums.loss_sum_D.sum().backward()
    assert (sums.loss_sum_D.item(), sums.targets) == (0.0, 0)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in made.parameters())
