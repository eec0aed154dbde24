"""`d2.generate` from end to end with a tiny pair of random weights: what is written, resumed, kept."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_pair import single_thread
from watched import Told, bits, stop_at

import d2
from d2 import fileio, images, previews
from d2.denoiser import UNetDenoiser
from d2.errors import ConflictError, InputError, ResourceError, Stopped
from d2.models.weights import check
from d2.phases import STATE
from d2.run import Run

SAMPLES = Path(os.environ.get("D2_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "samples"


def sample(name):
    path = SAMPLES / name
    if not path.exists():
        pytest.skip(f"no sample inputs in {SAMPLES} (set D2_SHARED)")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny, ball):
    """One finished run of a still, with what it told on the way."""
    told, out = Told(), tmp_path_factory.mktemp("runs") / "ball"
    with single_thread():
        return d2.generate(ball, out, preset=tiny / "preset.yaml", weights=tiny, observer=told), told


def test_a_still_becomes_a_complete_run_folder(made):
    result, _ = made
    folder = result.folder
    assert result.finished
    assert (result.views, result.frames) == (3, 3)
    matrix = Run.open(folder).matrix()
    assert matrix[2, 2].shape == (64, 64, 4)
    for name in ("preview.mp4", "contact.png", "generate/config.yaml", "generate/input/f000.png"):
        assert (folder / name).stat().st_size > 0
    assert len(list((folder / "generate/reference_views").iterdir())) == 3
    assert len(list((folder / "generate/reference_video").iterdir())) == 3
    assert not (folder / STATE).exists()
    assert not list(folder.rglob(".*"))


def test_the_manifest_says_seed_licences_checksums_and_that_alpha_is_estimated(made):
    stage = json.loads((made[0].folder / "run.json").read_text())["stages"]["generate"]
    assert stage["seed"] == 23
    assert stage["models"]["tiny_view.safetensors"]["licence"] == "none: random weights for tests"
    assert len(stage["models"]["tiny_frame.safetensors"]["sha256"]) == 64
    assert len(stage["files"]) == 9
    assert len(stage["references"]) == 6
    assert "estimated" in stage["alpha"]


def test_every_phase_reports_its_progress_to_the_end(made):
    last = {name: (done, total) for name, done, total in made[1].phases}
    assert list(last) == ["views", "video", "matrix", "decode"]
    assert all(done == total for done, total in last.values())


def test_the_last_reference_view_is_the_input(made):
    folder = made[0].folder / "generate"
    given = images.open_image(folder / "input/f000.png")
    white = Image.new("RGBA", given.size, "white")
    white.alpha_composite(given)
    last = np.asarray(Image.open(folder / "reference_views/v02.png"), int)
    assert np.abs(last - np.asarray(white.convert("RGB"), int)).max() <= 1


def test_the_same_call_gives_the_same_bits_and_another_seed_gives_others(made, generate, ball, tmp_path):
    generate(ball, tmp_path / "again")
    assert bits(tmp_path / "again") == bits(made[0].folder)
    generate(ball, tmp_path / "other", sets=("seed=24",))
    assert not set(bits(tmp_path / "other").items()) & {
        item for item in bits(made[0].folder).items() if item[0] != "transforms.json"
    }


@pytest.mark.parametrize(("phase", "done"), [("views", 2), ("matrix", 1), ("decode", 1)])
def test_a_stopped_run_goes_on_to_the_same_bits(made, generate, ball, tmp_path, phase, done):
    with pytest.raises(Stopped, match=r"go on with: d2 generate .*ball.png --out") as caught:
        generate(ball, tmp_path / "run", **stop_at(phase, done))
    assert caught.value.exit_code == 143
    assert Run.open(tmp_path / "run").stage("generate") is None
    told = Told()
    generate(ball, tmp_path / "run", observer=told)
    assert bits(tmp_path / "run") == bits(made[0].folder)
    first = next(at for name, at, _ in told.phases if name == phase)
    assert first >= done or phase == "decode"


@pytest.mark.parametrize("sets", [("method=dpmpp2m", "vrs=exact"), ("freeinit_matrix=2", "freeinit_references=2")])
def test_a_solver_with_memory_and_freeinit_resume_to_the_same_bits_too(generate, clip, tmp_path, sets):
    generate(clip, tmp_path / "whole", sets=sets)
    with pytest.raises(Stopped):
        generate(clip, tmp_path / "halves", sets=sets, **stop_at("matrix", 7 if "freeinit_matrix=2" in sets else 3))
    generate(clip, tmp_path / "halves", sets=sets)
    assert bits(tmp_path / "halves") == bits(tmp_path / "whole")


def command(tiny, source, out, *more):
    words = ["generate", str(source), "--out", str(out), "--preset", str(tiny / "preset.yaml"), "--weights", str(tiny)]
    return [sys.executable, "-c", "import torch; torch.set_num_threads(1); from d2.cli.app import main; main()",
            *words, *more]  # fmt: skip


def wait_for(path, process, seconds=30):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_killed_in_the_middle_opens_and_goes_on_to_the_same_bits(tiny, generate, clip, tmp_path):
    sets = ("steps=8",)
    folder = tmp_path / "killed"
    process = subprocess.Popen(command(tiny, clip, folder, "--set", sets[0], "--quiet"))
    wait_for(folder / "generate/preview.png", process)  # within the joint loop
    process.kill()
    process.wait()
    for name in (".preview.a1b2c3d4.mp4", "generate/.state.a1b2c3d4.safetensors", "images/v00/.f001.a1b2c3d4.png"):
        fileio.atomic_write(folder / name, b"torn")
    assert not (folder / "transforms.json").exists()
    assert Run.open(folder).stage("generate") is None
    generate(clip, tmp_path / "whole", sets=sets)
    told = Told()
    generate(clip, folder, sets=sets, observer=told)
    assert any("Resuming the matrix" in text for text in told.texts)
    assert bits(folder) == bits(tmp_path / "whole")
    assert not list(folder.rglob(".*"))


@pytest.mark.row(41)
def test_sigterm_ends_with_143_and_the_command_that_goes_on(tiny, clip, tmp_path):
    folder = tmp_path / "run"
    words = command(tiny, clip, folder, "--set", "steps=200", "--quiet")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_for(folder / STATE, process)
    begin = time.monotonic()
    process.terminate()
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 143
    assert time.monotonic() - begin < 5
    assert stderr.splitlines()[-1].startswith("error: stopped")
    assert "--set steps=200" in stderr.splitlines()[-1]
    assert not (folder / ".lock").exists()


def test_a_retouched_reference_counts(made, generate, ball, tmp_path):
    folder = tmp_path / "run"
    assert not generate(ball, folder, references_only=True).finished
    retouched = folder / "generate/reference_views/v00.png"
    assert retouched.read_bytes() == (made[0].folder / "generate/reference_views/v00.png").read_bytes()
    Image.new("RGB", (64, 64), (250, 20, 20)).save(retouched)
    generate(ball, folder)
    ours, before = bits(folder), bits(made[0].folder)
    assert ours["images/v00/f000.png"] != before["images/v00/f000.png"]


def test_a_reference_retouched_after_the_loop_began_starts_the_loop_anew(generate, ball, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        generate(ball, folder, **stop_at("matrix", 3))
    Image.new("RGB", (64, 64), (20, 20, 250)).save(folder / "generate/reference_video/f001.png")
    told = Told()
    generate(ball, folder, observer=told)
    assert any("references were changed" in text for text in told.texts)
    assert ("matrix", 0, 4) in told.phases


def test_frames_of_a_clip_are_its_reference_video_and_keep_their_motion(generate, clip, tmp_path):
    folder = generate(clip, tmp_path / "run").folder
    heights = []
    for f in range(3):
        rgb = np.asarray(Image.open(folder / f"generate/reference_video/f{f:03d}.png"))
        heights.append(np.nonzero((rgb < 200).any(-1))[0].mean())
    assert heights[1] - heights[0] > 12
    assert heights[2] - heights[1] > 12


@pytest.mark.parametrize(("anchor", "expected"), [(0, 0), (-1, 2), (1, 1)])
def test_the_views_come_from_the_anchor_frame_the_first_unless_told_otherwise(
    generate, clip, tmp_path, anchor, expected
):
    folder = generate(clip, tmp_path / "run", sets=(f"anchor_frame={anchor}",), references_only=True).folder
    view = (folder / "generate/reference_views/v02.png").read_bytes()
    assert view == (folder / f"generate/reference_video/f{expected:03d}.png").read_bytes()


def test_given_views_stand_in_for_sampled_ones(generate, ball, tmp_path):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    for v, colour in enumerate(colours):
        (tmp_path / "views").mkdir(exist_ok=True)
        Image.new("RGB", (80, 80), colour).save(tmp_path / "views" / f"{v}.jpg", quality=100)
    told = Told()
    folder = generate(ball, tmp_path / "run", views=tmp_path / "views", observer=told).folder
    assert "views" not in {name for name, _, _ in told.phases}
    for v, colour in enumerate(colours):
        kept = np.asarray(Image.open(folder / f"generate/reference_views/v{v:02d}.png"), int)
        assert np.abs(kept - colour).max() <= 3


@pytest.mark.parametrize(("sets", "unused"), [(("scale=1.0",), "frame"), (("svd_only_from=-1.0", "vrs=off"), "view")])
def test_a_model_without_weight_is_not_even_loaded_for_the_joint_loop(
    generate, clip, tmp_path, monkeypatch, sets, unused
):
    from d2.pair import Pair

    asked = []
    lines = Pair.lines
    monkeypatch.setattr(Pair, "lines", lambda self, model, *rest: asked.append(model) or lines(self, model, *rest))
    views = tmp_path / "views"
    views.mkdir()
    for v in range(3):
        Image.new("RGB", (64, 64), (90 * v, 30, 30)).save(views / f"{v}.png")
    generate(clip, tmp_path / "run", sets=sets, views=views)
    assert asked
    assert unused not in asked


def test_lines_in_flight_and_offloading_change_nothing_but_rounding(generate, clip, finished, tmp_path):
    one = finished
    sets = ("columns_in_flight=2", "rows_in_flight=3", "offload=true")
    many = generate(clip, tmp_path / "many", sets=sets).folder
    a, b = (Run.open(folder).matrix().tensor([0, 1, 2], [0, 1, 2]) for folder in (one, many))
    assert (a - b).abs().max() <= 2 / 255


@pytest.mark.parametrize("sets", [("conv_blend=0.6", "noise_from_mv=true"), ("uc_type=mean", "svd_cfg_warmup=true")])
def test_every_choice_of_the_reference_runs_to_a_complete_matrix(generate, clip, tmp_path, sets):
    assert Run.open(generate(clip, tmp_path / "run", sets=sets).folder).matrix()[2, 2].shape == (64, 64, 4)


def test_any_number_of_views_and_frames_works(generate, ball, tmp_path):
    V, F = 2, 5
    folder = generate(ball, tmp_path / "run", sets=(f"views={V}", f"frames={F}", "steps=2")).folder
    matrix = Run.open(folder).matrix()
    assert (matrix.views, matrix.frames) == (V, F)
    assert len(json.loads((folder / "transforms.json").read_text())["frames"]) == V * F


@pytest.mark.row(30)
def test_overwrite_replaces_a_finished_run_only_after_success(generate, clip, finished, tmp_path):
    folder = finished
    before = bits(folder)
    with pytest.raises(ConflictError, match="finished"):
        generate(clip, folder)
    with pytest.raises(Stopped):
        generate(clip, folder, sets=("seed=5",), overwrite=True, **stop_at("matrix", 2))
    assert bits(folder) == before
    generate(clip, folder, sets=("seed=5",), overwrite=True)
    assert bits(folder) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_finished_run_of_the_same_configuration_is_kept_where_asked(made, generate, ball):
    before = fileio.sha256(made[0].folder / "run.json")
    assert generate(ball, made[0].folder, keep_finished=True).finished
    assert fileio.sha256(made[0].folder / "run.json") == before
    with pytest.raises(ConflictError):
        generate(ball, made[0].folder, keep_finished=True, sets=("seed=5",))


@pytest.mark.parametrize("name", ["luigi_rgba.png", "flying_ironman"])
def test_the_reference_projects_samples_become_runs(generate, tmp_path, name):
    folder = generate(sample(name), tmp_path / "run").folder
    stage = Run.open(folder).stage("generate")
    assert stage is not None
    assert stage["input"]["frames"] == ([name] if name.endswith("png") else ["0.png", "12.png", "24.png"])
    first = images.open_image(folder / "generate/input/f000.png").getchannel("A")
    box = first.getbbox()
    assert box is not None
    if name.endswith("png"):
        assert max(box[2] - box[0], box[3] - box[1]) >= 0.85 * 64


@pytest.mark.row(35)
def test_the_bit_flipped_the_missing_and_the_resized_cell_are_named(finished):
    folder = finished
    cell = folder / "images/v01/f002.png"
    data = bytearray(cell.read_bytes())
    data[len(data) // 2] ^= 1
    cell.write_bytes(bytes(data))
    with pytest.raises(InputError, match="view 1 frame 2"):
        Run.open(folder).matrix()[1, 2]
    Image.new("RGBA", (32, 32)).save(cell)
    with pytest.raises(InputError, match="view 1 frame 2"):
        Run.open(folder).matrix()[1, 2]
    cell.unlink()
    with pytest.raises(InputError, match="view 1 frame 2"):
        Run.open(folder).matrix()


def test_the_tiny_pair_passes_the_strict_header_check(tiny):
    from d2.config import load
    from d2.settings import GenerateConfig

    settings = load(GenerateConfig, tiny / "preset.yaml")
    for model in ("view", "frame"):
        path = tiny / settings.spec(model).filename
        with safe_open(str(path), framework="pt") as file:
            assert set(file.keys()) == set(check(path, settings.spec(model)))


def test_the_preview_while_sampling_has_a_tile_for_every_cell():
    assert previews.latent_sheet(torch.zeros(3, 5, 4, 8, 8)).shape == (24, 40, 3)
    assert previews.latent_sheet(torch.zeros(21, 25, 4, 72, 72)).shape == (21 * 36, 25 * 36, 3)


@pytest.mark.row(58)
@pytest.mark.parametrize("fits", [1, 0])
def test_where_memory_runs_out_fewer_lines_are_tried_down_to_one(generate, clip, finished, tmp_path, monkeypatch, fits):
    healthy = UNetDenoiser.__call__

    def small(self, x, sigma, cond):
        if len(x) > 2 * fits:  # each line comes with its unconditional twin
            raise torch.OutOfMemoryError("too many")
        return healthy(self, x, sigma, cond)

    monkeypatch.setattr(UNetDenoiser, "__call__", small)
    told, sets = Told(), ("columns_in_flight=3", "rows_in_flight=2")
    if not fits:
        with pytest.raises(ResourceError, match=r"out of memory with 1 .*low-vram"):
            generate(clip, tmp_path / "small", sets=sets)
        return
    folder = generate(clip, tmp_path / "small", sets=sets, observer=told).folder
    stage = Run.open(folder).stage("generate")
    assert stage is not None
    assert stage["in_flight"] == {"columns": 1, "rows": 1}
    assert sum("memory ran out" in text for text in told.texts) == 1
    assert bits(folder) == bits(finished)
