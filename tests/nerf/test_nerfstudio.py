"""The method `d2-4dgs` in nerfstudio: from a run folder to a checkpoint, and the same pictures on both sides."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch

pytest.importorskip("nerfstudio", reason="in an environment of its own: make test-nerfstudio")
sys.path.insert(0, str(Path(__file__).parent))
import ns  # isort: skip
from conftest import draw_balls
from nerfstudio.configs.dataparser_configs import external_dataparsers
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.utils.eval_utils import eval_setup
from surroundings import ROOT
from typer.testing import CliRunner

from d2 import camera, images
from d2.cli.app import app
from d2.recon import dataset, train
from d2.recon.config import ReconstructConfig
from d2.recon.exports import export
from d2.recon.gaussians import Gaussians4D
from d2.recon.nerf.checkpoints import import_checkpoint
from d2.recon.nerf.dataparser import D2DataParserConfig
from d2.recon.pipeline import reconstruct
from d2.run import Run

VIEWS, FRAMES, SIZE, STEPS = 12, 5, 48, 200
TOLERANCE = 1e-3  # of 1, between two renders of one model
PORT = 7351


def nerfstudio(command: str, *words: object, cwd: Path) -> str:
    """Runs ns-<command>, with an ffmpeg to be found (ns-render insists); fails with what it printed."""
    tools = cwd / "tools"
    tools.mkdir(exist_ok=True)
    if not (tools / "ffmpeg").exists():
        (tools / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    env = os.environ | {"COLUMNS": "200", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, ns.__file__, command, *map(str, words)], cwd=cwd, env=env,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """Two analytic balls, one moving, as stage 1 commits a matrix."""
    folder = tmp_path_factory.mktemp("runs") / "balls"
    rig = camera.orbit(VIEWS, elevation_deg=15, radius=3.0, fov_deg=40, width=SIZE, height=SIZE)
    cell = lambda v, f: draw_balls(rig.viewmats[v], rig, f / (FRAMES - 1))  # noqa: E731
    Run.create(folder, fps=12).write_matrix(cell, FRAMES, rig, {"source": "test"})
    return folder


@pytest.fixture(scope="module")
def trained(run_folder, tmp_path_factory) -> Path:
    """The folder of a trained experiment: ns-train from the run folder, as it is, on the CPU."""
    out = tmp_path_factory.mktemp("outputs")
    nerfstudio(
        "train", "d2-4dgs", "--data", run_folder, "--output-dir", out, "--vis", "tensorboard",
        "--machine.device-type", "cpu", "--max-num-iterations", STEPS, "--steps-per-save", STEPS // 2,
        "--pipeline.model.preset", "fast", "--pipeline.model.sets", "start_gaussians=800", "max_gaussians=1200",
        cwd=out,
    )  # fmt: skip
    (folder,) = (out / "balls" / "d2-4dgs").iterdir()
    return folder


@pytest.fixture(scope="module")
def loaded(trained):
    """The trained pipeline, as ns-render and ns-viewer load it."""
    return eval_setup(trained / "config.yml")[1]


def model_of(folder: Path) -> Path:
    (file,) = (folder / "nerfstudio_models").glob("step-*.safetensors")
    return file


def test_entry_points_bring_method_and_dataparser():
    assert all_methods["d2-4dgs"].pipeline.model.preset == "quality"
    assert isinstance(external_dataparsers["d2-data"], D2DataParserConfig)


def test_dataparser_keeps_times_and_cameras_as_the_file_says_them(run_folder):
    parser = D2DataParserConfig(data=run_folder).setup()
    cells = dataset.load(run_folder)
    kept, held_out = train.holdout_indices(len(cells), ReconstructConfig())
    for split, index in (("train", kept), ("test", held_out)):
        outputs = parser.get_dataparser_outputs(split)
        assert torch.equal(outputs.cameras.times[:, 0], cells.times[index])
        c2w = np.eye(4)[None].repeat(len(index), 0)
        c2w[:, :3] = outputs.cameras.camera_to_worlds.numpy()
        np.testing.assert_allclose(camera.viewmats(c2w), cells.viewmats[index], atol=1e-5)
        torch.testing.assert_close(outputs.cameras.get_intrinsics_matrices(), cells.Ks[index])
        assert [path.name for path in outputs.image_filenames] == [Path(cells.names[k]).name for k in index.tolist()]
        assert outputs.dataparser_scale == 1 and torch.equal(outputs.dataparser_transform, torch.eye(4)[:3])


def test_a_test_file_is_what_evaluation_uses():
    panda = ROOT / "tests/data/panda"
    parser = D2DataParserConfig(data=panda).setup()
    assert len(parser.get_dataparser_outputs("train").image_filenames) == 21 * 13
    assert len(parser.get_dataparser_outputs("test").image_filenames) == 24


def test_training_leaves_a_checkpoint_and_one_model_that_d2_reads(trained):
    names = sorted(path.name for path in (trained / "nerfstudio_models").iterdir())
    assert names == [f"step-{STEPS - 1:09d}.ckpt", f"step-{STEPS - 1:09d}.safetensors"]
    _, metadata = Gaussians4D.load_with_metadata(model_of(trained))
    assert metadata["frames"] == str(FRAMES) and metadata["fps"] == "12"


def test_its_render_equals_ours(loaded, trained, run_folder):
    """Every held-out picture: nerfstudio's cameras and checkpoint against d2's dataset and safetensors."""
    gaussians, cells = Gaussians4D.load(model_of(trained)), dataset.load(run_folder)
    _, held_out = train.holdout_indices(len(cells), ReconstructConfig())
    cells = cells.subset(held_out)
    cameras = loaded.datamanager.eval_dataset.cameras
    assert len(cameras) == len(cells) > 3
    for k in range(len(cells)):
        theirs = loaded.model.get_outputs_for_camera(cameras[k : k + 1])["rgb"]
        ours = train.draw_cell(gaussians, cells, k).clamp(0, 1)
        assert float((theirs - ours).abs().max()) < TOLERANCE


def test_it_learns_what_d2_reconstruct_learns(tiny_dataset, tmp_path):
    """Bit for bit: the same trainer on the same cells; the dataset has a test file, so nothing is held out."""
    sets = ("start_gaussians=300", "max_gaussians=500", "grow_every=10")
    config = copy.deepcopy(all_methods["d2-4dgs"])
    config.pipeline.datamanager.data = tiny_dataset
    config.pipeline.model.preset, config.pipeline.model.sets = "fast", sets
    model = config.pipeline.setup(device="cpu", test_mode="val").model
    for _ in range(60):
        model.fit_step(60)
    result = reconstruct(
        tiny_dataset, tmp_path / "ours", preset="fast", sets=(*sets, "iterations=60", "holdout=0"), device="cpu"
    )
    ours = Gaussians4D.load(result.model)
    assert len(ours) == len(model.gaussians) > 300
    for name, tensor in ours.tensors().items():
        assert torch.equal(getattr(model.gaussians, name), tensor), name


def test_time_of_a_camera_moves_the_picture(loaded):
    at = loaded.datamanager.eval_dataset.cameras[:1]
    pictures = []
    for moment in (0.0, 0.5, 1.0):
        at.times = torch.tensor([[moment]])
        pictures.append(loaded.model.get_outputs_for_camera(at)["rgb"])
    assert float((pictures[0] - pictures[1]).abs().max()) > 0.1 < float((pictures[1] - pictures[2]).abs().max())


def test_transparent_render_composites_to_the_opaque_one(loaded):
    outputs = loaded.model.get_outputs_for_camera(loaded.datamanager.eval_dataset.cameras[:1])
    rgba = loaded.model.get_rgba_image(outputs)
    over = rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:]) * loaded.model.background
    assert float((over - outputs["rgb"]).abs().max()) < 0.01


def test_ns_eval_and_a_resumed_training(trained, run_folder, tmp_path):
    nerfstudio("eval", "--load-config", trained / "config.yml", "--output-path", "eval.json", cwd=tmp_path)
    quality = json.loads((tmp_path / "eval.json").read_text())["results"]["psnr"]
    assert quality > 20
    nerfstudio(
        "train", "d2-4dgs", "--data", run_folder, "--output-dir", tmp_path, "--vis", "tensorboard",
        "--machine.device-type", "cpu", "--max-num-iterations", 20, "--load-dir", trained / "nerfstudio_models",
        "--pipeline.model.preset", "fast", "--pipeline.model.sets", "start_gaussians=800", "max_gaussians=1200",
        cwd=tmp_path,
    )  # fmt: skip
    (again,) = (tmp_path / "balls" / "d2-4dgs").iterdir()
    assert model_of(again).name == f"step-{STEPS + 19:09d}.safetensors"


def test_a_camera_path_of_the_viewer_is_rendered_like_ours(trained, tmp_path):
    path = ROOT / "tests/data/camera_path.json"
    nerfstudio(
        "render", "camera-path", "--load-config", trained / "config.yml", "--camera-path-filename", path,
        "--output-format", "images", "--image-format", "png", "--output-path", "path.mp4", cwd=tmp_path,
    )  # fmt: skip
    theirs = sorted((tmp_path / "path").glob("*.png"))
    words = ["--camera-path", str(path), "--format", "png", "--background", "white", "--out", str(tmp_path / "ours")]
    done = CliRunner().invoke(app, ["render", str(model_of(trained)), *words, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    ours = sorted((tmp_path / "ours").rglob("*.png"))
    assert len(theirs) == len(ours) == 8
    for a, b in zip(theirs, ours, strict=True):
        a, b = (images.read_rgba(file)[0][..., :3].astype(int) for file in (a, b))
        assert a.shape == b.shape == (64, 96, 3) and np.abs(a - b).max() <= 1


def test_the_viewer_serves_our_model(trained, tmp_path):
    command = [sys.executable, ns.__file__, "viewer", "--load-config", str(trained / "config.yml")]
    viewer = subprocess.Popen(
        [*command, "--viewer.websocket-port", str(PORT), "--viewer.websocket-host", "127.0.0.1"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        page = b""
        for _ in range(120):
            time.sleep(1)
            assert viewer.poll() is None
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=5).read()
                break
            except OSError:
                continue
        assert b"<html" in page
    finally:
        viewer.terminate()
        viewer.wait()


def test_an_imported_checkpoint_is_the_model_again(trained, tmp_path):
    folder = import_checkpoint(trained, tmp_path / "imported")
    found, metadata = Gaussians4D.load_with_metadata(folder / "gaussians.safetensors")
    for name, tensor in Gaussians4D.load(model_of(trained)).tensors().items():
        assert torch.equal(getattr(found, name), tensor)
    assert metadata["frames"] == str(FRAMES) and Run.open(tmp_path / "imported").fps == 12


@pytest.mark.parametrize("has_pictures", [True, False])
def test_an_exported_model_opens_in_nerfstudio(trained, run_folder, tmp_path, has_pictures):
    """With the run's own pictures around it, or with views that the model draws."""
    home = Path(shutil.copytree(run_folder, tmp_path / "balls")) if has_pictures else tmp_path / "balls"
    folder = import_checkpoint(trained, home)
    target = export(folder, ["nerfstudio"])["nerfstudio"]
    _, pipeline, _, _ = eval_setup(target / "d2-4dgs" / "d2" / "config.yml")
    gaussians = Gaussians4D.load(folder / "gaussians.safetensors")
    for name, tensor in gaussians.tensors().items():
        assert torch.equal(getattr(pipeline.model.gaussians, name), tensor)
    at = pipeline.datamanager.eval_dataset.cameras[:1]
    cells = dataset.load(home if has_pictures else target / "views")
    k = int((cells.times - at.times[0]).abs().argmin()) if not has_pictures else None
    theirs = pipeline.model.get_outputs_for_camera(at)["rgb"]
    if k is None:
        _, held_out = train.holdout_indices(len(cells), ReconstructConfig())
        k = int(held_out[0])
    assert float((theirs - train.draw_cell(gaussians, cells, k).clamp(0, 1)).abs().max()) < TOLERANCE


def test_one_moment_is_a_dataset_for_static_methods(trained, run_folder, tmp_path):
    home = Path(shutil.copytree(run_folder, tmp_path / "balls"))
    folder = import_checkpoint(trained, home)
    target = export(folder, ["nerfstudio"], span=(2, 3))["nerfstudio"]
    parser = NerfstudioDataParserConfig(
        data=target, center_method="none", auto_scale_poses=False, eval_mode="all", load_3D_points=False
    )
    outputs = parser.setup().get_dataparser_outputs("train")
    assert len(outputs.image_filenames) == VIEWS and outputs.cameras.times is None
    rig = camera.orbit(VIEWS, elevation_deg=15, radius=3.0, fov_deg=40, width=SIZE, height=SIZE)
    np.testing.assert_allclose(outputs.cameras.camera_to_worlds, rig.c2w[:, :3], atol=1e-5)
    for v, path in enumerate(outputs.image_filenames):
        assert path.read_bytes() == (home / f"images/v{v:02d}/f002.png").read_bytes()
