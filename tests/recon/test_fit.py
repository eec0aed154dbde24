"""Hull, densifier and trainer on a small analytic scene: what is promised of each, and bit-equal resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scenes import FRAMES, SIZE, gaussians_4d, moving_ball

from d2.config import load
from d2.errors import ConflictError, InputError, NumericalError, Stopped
from d2.recon import checkpoint, dataset, densify, hull, pipeline, rig, train
from d2.recon.config import ReconstructConfig
from d2.run import Run

TINY = {"iterations": 60, "start_gaussians": 150, "max_gaussians": 250, "grow_every": 10, "validate_every": 20}


@pytest.fixture(scope="module")
def ball(run_folder):
    return dataset.load(run_folder)


def test_scene_box_is_where_the_cameras_look(ball):
    centre, half = hull.scene_box(ball)
    assert np.abs(centre).max() < 1e-3
    assert half == pytest.approx(3.0 * np.tan(np.radians(33.8) / 2), rel=0.02)


def test_cameras_within_reach_of_the_near_plane_are_refused(ball):
    from dataclasses import replace

    tiny = ball.viewmats.clone()
    tiny[:, :3, 3] *= 0.01
    with pytest.raises(InputError, match="nothing nearer than"):
        hull.scene_box(replace(ball, viewmats=tiny))


def test_hull_points_lie_in_every_mask_of_their_moment_and_have_its_colours(ball):
    g = hull.initialise(ball, 400, duration=0.1, sh_degree=0, seed=0)
    truth = moving_ball()
    for time in ball.times.unique():
        mine = g.times == time
        assert mine.sum() > 50
        distance = (g.means[mine][:, None] - truth.at(time).means).norm(dim=-1).min(1).values
        assert (distance < 0.62).float().mean() > 0.9  # three deviations and a voxel; six views leave some ghosts
    assert g.means.abs().max() < 1.0
    rgb = (g.sh[:, 0] * 0.28209479177387814 + 0.5).clamp(0, 1)
    assert (rgb[:, 0] - rgb[:, 2]).abs().mean() > 0.2  # red or blue, not grey


def test_single_view_moments_are_merged_until_a_hull_means_something(ball):
    moments = hull._moments(ball.subset(torch.arange(0, len(ball), FRAMES + 1)))
    assert all(len(m) >= hull.MIN_VIEWS for m in moments)


def test_no_alpha_starts_at_random_inside_the_box(ball):
    from dataclasses import replace

    g = hull.initialise(replace(ball, has_alpha=False, plain_background=False), 200, duration=0.3, sh_degree=1, seed=0)
    assert g.sh.shape == (200, 4, 3) and g.means.std() > 0.2 and g.means.abs().max() < 1


def test_a_plain_background_gives_a_hull_without_alpha(ball):
    from dataclasses import replace

    solid = ball.images[..., 3:] > 128  # the ball's soft rim would count as object down to its last grey level
    white = torch.where(solid, ball.images, 255)
    plain = replace(ball, images=white, has_alpha=False, plain_background=True)

    def spread(data):
        g = hull.initialise(data, 300, 0.1, 0, seed=0)
        return float((g.means[:, None] - moving_ball().at(0.5).means).norm(dim=-1).min(1).values.mean())

    assert spread(plain) < 0.7 * spread(replace(plain, plain_background=False))


def test_growing_reaches_the_count_and_each_half_inherits_its_parent():
    g = gaussians_4d(50)
    chosen = torch.tensor([3, 7, 11])
    grown, source = densify.grow(g, chosen, half_side=1.0, generator=torch.Generator().manual_seed(0))
    assert len(grown) == 53 and source[-3:].tolist() == [3, 7, 11]
    untouched = torch.tensor([i for i in range(50) if i not in (3, 7, 11)])
    assert torch.equal(grown.means[untouched], g.means[untouched])
    both = 1 - (1 - grown.opacity_logits[[3, 50]].sigmoid()).prod()
    assert both == pytest.approx(float(g.opacity_logits[3].sigmoid()), abs=1e-4)
    assert torch.allclose(grown.log_scales[50], g.log_scales[3] - np.log(1.6))
    assert grown.times.min() >= 0 and grown.times.max() <= 1


def test_small_gaussians_are_cloned_in_place():
    g = gaussians_4d(5).map(torch.clone)
    g.log_scales[:] = -7
    grown, _ = densify.grow(g, torch.tensor([2]), half_side=1.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(grown.means[5], g.means[2]) and torch.equal(grown.times[5], g.times[2])


def test_split_parts_move_along_the_trajectory_of_their_parent():
    g = gaussians_4d(4).map(torch.clone)
    g.log_scales[:] = -4.0  # large enough to split, small against the path
    g.velocities[:] = torch.tensor([5.0, 0, 0])
    grown, source = densify.grow(g, torch.arange(4), half_side=1.0, generator=torch.Generator().manual_seed(0))
    parents = g.means[source] + g.velocities[source] * (grown.times - g.times[source])[:, None]
    assert (grown.times - g.times[source]).abs().max() > 0.05
    assert (grown.means - parents).abs().max() < 0.1


def test_faint_overgrown_and_unseen_gaussians_are_pruned():
    g = gaussians_4d(4).map(torch.clone)
    g.times[:] = 0.5
    g.log_scales[:], g.opacity_logits[:] = -3, 2
    g.opacity_logits[0], g.log_scales[1, 2] = -9, 1
    stats = densify.GradientStats(4)
    stats.seen[:] = torch.tensor([1, 1, 0, 1])
    assert densify.keep_mask(g, stats, 0.01, half_side=1.0).tolist() == [False, False, False, True]


def test_a_gaussian_that_only_shines_outside_the_clip_is_pruned():
    g = gaussians_4d(2).map(torch.clone)
    g.log_scales[:], g.opacity_logits[:], g.log_durations[:] = -3, 2, np.log(0.05)
    g.times[:] = torch.tensor([0.5, 1.4])
    stats = densify.GradientStats(2)
    stats.seen[:] = 1
    assert densify.keep_mask(g, stats, 0.01, half_side=1.0).tolist() == [True, False]


def test_every_epoch_visits_every_cell_once_and_depends_on_the_seed_alone():
    first = [int(train.cells_of_step(7, 1, seed=5, iteration=i)) for i in range(14)]
    assert sorted(first[:7]) == list(range(7)) == sorted(first[7:]) and first[:7] != first[7:]
    assert first == [int(train.cells_of_step(7, 1, seed=5, iteration=i)) for i in range(14)]
    assert first != [int(train.cells_of_step(7, 1, seed=6, iteration=i)) for i in range(14)]
    pairs = torch.cat([train.cells_of_step(7, 2, seed=5, iteration=i) for i in range(7)])
    assert pairs.tolist() == first


def test_held_out_cells_are_never_trained_on(ball):
    config = load(ReconstructConfig, {"holdout": 5})
    kept, held = train.holdout_split(ball, config)
    assert len(held) == 2 and len(kept) == len(ball) - 2  # at most a tenth
    assert not set(kept.names) & set(held.names)


def test_fitting_improves_on_the_hull(ball):
    config = load(ReconstructConfig, TINY | {"iterations": 300})
    state = train.start(ball, config, "cpu")
    _, held = train.holdout_split(ball, config)
    before = train.evaluate_psnr(state.gaussians, held, config)
    best = train.fit(state, ball, config)
    after = train.evaluate_psnr(best, held, config)
    assert after > before + 5 and after > 27, (before, after)


def test_large_images_begin_at_half_resolution(ball, monkeypatch):
    monkeypatch.setattr(train, "COARSE_FROM", SIZE)
    config = load(ReconstructConfig, TINY | {"iterations": 10, "coarse_until": 0.4})
    widths = []
    real = train.step
    monkeypatch.setattr(train, "step", lambda state, data, *rest: widths.append(data.width) or real(state, data, *rest))
    train.fit(train.start(ball, config, "cpu"), ball, config)
    assert widths == [SIZE // 2] * 4 + [SIZE] * 6


@pytest.mark.row(53)
def test_pruning_everything_is_a_numerical_error(ball):
    config = load(ReconstructConfig, TINY | {"prune_opacity": 0.99, "grow_from": 0.0})
    with pytest.raises(NumericalError, match="every Gaussian was pruned"):
        train.fit(train.start(ball, config, "cpu"), ball, config)


@pytest.mark.row(51)
def test_a_learning_rate_that_diverges_stops_with_its_name_and_keeps_the_log_valid(run_folder, tmp_path):
    with pytest.raises(NumericalError, match="not finite"):
        fit(run_folder, tmp_path / "out", sets=("lr_scales=1e30",))
    for line in (
        (tmp_path / "out/recon/main/metrics.jsonl").read_text().splitlines()
        if (tmp_path / "out/recon/main/metrics.jsonl").exists()
        else []
    ):
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def fit(source, out, sets=(), **arguments):
    tiny = tuple(f"{k}={v}" for k, v in TINY.items())
    return pipeline.reconstruct(source, out, preset="fast", sets=tiny + tuple(sets), device="cpu", **arguments)


@pytest.mark.parametrize("step", [33, 47])  # before and after the average of the model begins
def test_resumed_runs_end_with_the_same_bits(run_folder, tmp_path, step, monkeypatch):
    monkeypatch.setattr(rig, "PROBE_STEPS", 5)
    monkeypatch.setattr(rig, "REFINE_STEPS", 10)
    corrected = (
        "correct_colors=true",
        "correct_poses=true",
        "correct_times=true",
        "correct_blurs=true",
        "refine_rig=true",
    )
    whole = fit(run_folder, tmp_path / "whole", corrected)
    calls = iter(range(10_000))
    with pytest.raises(Stopped, match="go on with: d2 reconstruct") as stopped:
        fit(run_folder, tmp_path / "cut", corrected, should_stop=lambda: 15 if next(calls) == step else 0)
    assert stopped.value.exit_code == 143
    resumed = fit(run_folder, tmp_path / "cut", corrected)
    assert resumed.model.read_bytes() == whole.model.read_bytes()
    logs = [(tmp_path / f"{n}/recon/main/metrics.jsonl").read_text() for n in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run_folder, tmp_path):
    whole = fit(run_folder, tmp_path / "whole")
    calls = iter(range(10_000))
    with pytest.raises(Stopped):
        fit(run_folder, tmp_path / "cut", should_stop=lambda: 2 if next(calls) == 50 else 0)
    newest = checkpoint.checkpoints(tmp_path / "cut/recon/main/ckpt")[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    assert fit(run_folder, tmp_path / "cut").model.read_bytes() == whole.model.read_bytes()


@pytest.mark.row(47)
def test_two_checkpoints_are_kept_and_the_newest_is_by_step(run_folder, tmp_path):
    fit(run_folder, tmp_path / "out")
    names = [p.name for p in checkpoint.checkpoints(tmp_path / "out/recon/main/ckpt")]
    assert names == ["step_00000040.safetensors", "step_00000060.safetensors"]


def test_without_held_out_cells_there_is_no_quality_to_report_and_the_last_model_is_kept(run_folder, tmp_path):
    result = fit(run_folder, tmp_path / "out", sets=("holdout=0",))
    assert result.psnr is None
    assert "psnr_heldout" not in (tmp_path / "out/recon/main/metrics.jsonl").read_text()


def test_a_run_folder_takes_its_reconstruction_and_records_it(run_folder):
    result = fit(run_folder, None, name="inside")
    run = Run.open(run_folder)
    assert result.folder == run_folder / "recon/inside"
    assert run.stage("reconstruct:inside")["gaussians"] == result.gaussians
    with pytest.raises(ConflictError, match="is finished"):
        fit(run_folder, None, name="inside")


def test_another_configuration_does_not_touch_an_unfinished_run(run_folder, tmp_path):
    with pytest.raises(Stopped):
        fit(run_folder, tmp_path / "out", should_stop=lambda: 15)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(ConflictError, match="seed: 0 -> 1"):
        fit(run_folder, tmp_path / "out", sets=("seed=1",))
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}


def test_overwrite_replaces_only_after_success(run_folder, tmp_path):
    first = fit(run_folder, tmp_path / "out").model.read_bytes()
    with pytest.raises(Stopped):
        fit(run_folder, tmp_path / "out", sets=("seed=1",), overwrite=True, should_stop=lambda: 2)
    assert (tmp_path / "out/recon/main/gaussians.safetensors").read_bytes() == first
    second = fit(run_folder, tmp_path / "out", sets=("seed=1",), overwrite=True)
    assert second.model.read_bytes() != first
    assert [p.name for p in (tmp_path / "out/recon").iterdir()] == ["main"]


def test_a_users_dataset_is_never_written_to(run_folder, tmp_path, monkeypatch):
    import shutil

    source = tmp_path / "mine"
    shutil.copytree(run_folder / "images", source / "images")
    shutil.copy(run_folder / "transforms.json", source)
    before = sorted(source.rglob("*"))
    monkeypatch.chdir(tmp_path)
    result = fit(source, None)
    assert sorted(source.rglob("*")) == before and result.folder.parts[:2] == ("runs", "mine")


def test_no_needle_is_thinner_than_the_floor(run_folder):
    data = dataset.load(run_folder)
    config = load(ReconstructConfig, TINY | {"min_scale": 0.5})
    state = train.start(data, config, "cpu")
    floor = 0.5 * 2 * state.half_side / SIZE
    train.fit(state, data, config)
    assert float(state.gaussians.log_scales.detach().exp().min()) >= floor * (1 - 1e-5)


def test_what_a_model_made_has_its_own_defaults(finished, run_folder):
    names = list(pipeline.DISAGREEING)
    made, true = (
        pipeline.settled(ReconstructConfig(), pipeline.is_generated(folder)) for folder in (finished, run_folder)
    )
    assert (made.disagreement, true.disagreement) == (True, False) and made.min_scale
    assert [getattr(made, name) for name in names] == [pipeline.DISAGREEING[name] for name in names]
    assert not any(getattr(true, name) for name in names)
    assert pipeline.settled(load(ReconstructConfig, {"min_scale": 0.1}), True).min_scale == 0.1


def test_the_average_looks_back_over_the_last_steps_and_is_what_is_kept(run_folder):
    data = dataset.load(run_folder)
    config = load(ReconstructConfig, TINY | {"average_over": 40, "holdout": 0})
    state = train.start(data, config, "cpu")
    seen, begun = [], []

    def record(state, progress):
        begun.append(state.average is not None)
        if progress.fraction >= config.average_from and state.iteration % train.AVERAGE_EVERY == 0:
            seen.append(state.gaussians.means.detach().clone())

    best = train.fit(state, data, config, record)
    assert not any(begun[:33]) and begun[-1] and len(seen) == 3
    expected = seen[0]
    for means in seen[1:]:
        expected = expected + 0.25 * (means - expected)
    assert torch.allclose(best.means, expected, atol=1e-6)
    assert not torch.equal(best.means, state.gaussians.means.detach())
