"""What d2 gives nerfstudio and takes from it, as far as it goes without nerfstudio."""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import FRAMES, VIEWS, moving_ball
from typer.testing import CliRunner

from d2 import camera, fileio, images
from d2.cli.app import app
from d2.errors import ConflictError, InputError
from d2.recon import dataset
from d2.recon.drawing import framing
from d2.recon.exports import export
from d2.recon.gaussians import Gaussians4D
from d2.recon.nerf.checkpoints import import_checkpoint, is_checkpoint
from d2.recon.nerf.views import RINGS_DEG
from d2.recon.nerf.views import VIEWS as DRAWN
from d2.run import Run, frame_time

CONFIG = "d2-4dgs/d2/config.yml"
CKPT = "d2-4dgs/d2/nerfstudio_models/step-000000000.ckpt"


@pytest.fixture
def model(tmp_path) -> Path:
    """A checkpoint folder as ns-train d2-4dgs leaves it, with two steps."""
    folder = tmp_path / "outputs" / "ball" / "d2-4dgs" / "today"
    for step, ball in ((1999, moving_ball().map(torch.zeros_like)), (3999, moving_ball())):
        ball.save(folder / "nerfstudio_models" / f"step-{step:09d}.safetensors", {"fps": "12", "frames": "5"})
        fileio.atomic_write(folder / "nerfstudio_models" / f"step-{step:09d}.ckpt", b"a pickle that nobody opens")
    fileio.atomic_write(folder / "config.yml", b"")
    return folder


def same(a: Gaussians4D, b: Gaussians4D) -> bool:
    return all(torch.equal(getattr(b, name), tensor) for name, tensor in a.tensors().items())


def test_entry_points_name_modules_that_exist():
    for group, name in (("method_configs", "d2-4dgs"), ("dataparser_configs", "d2-data")):
        (point,) = (p for p in importlib.metadata.entry_points(group=f"nerfstudio.{group}") if p.name == name)
        assert importlib.util.find_spec(point.module) is not None and point.attr == "specification"


def test_nothing_of_d2_touches_nerfstudio_by_itself():
    script = (
        "import sys, d2, d2.recon.exports, d2.recon.pipeline, d2.cli.app;"
        "print([m for m in sys.modules if 'nerfstudio' in m or m.endswith(('nerf.method', 'nerf.dataparser'))])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_shots_are_what_load_reads(tiny_dataset):
    for split in ("train", "test"):
        shots, cells = dataset.shots(tiny_dataset, split), dataset.load(tiny_dataset, split)
        viewmats = camera.viewmats(np.stack([shot.c2w for shot in shots]))
        assert torch.equal(torch.from_numpy(viewmats).float(), cells.viewmats)
        assert torch.equal(torch.from_numpy(np.stack([shot.K for shot in shots])).float(), cells.Ks)
        assert torch.equal(torch.tensor([shot.time for shot in shots]), cells.times)
        assert [shot.image for shot in shots] == [tiny_dataset / name for name in cells.names]
        assert {(shot.width, shot.height) for shot in shots} == {(cells.width, cells.height)}


def test_the_newest_model_of_a_checkpoint_folder_becomes_a_reconstruction(model, tmp_path):
    for path in (model, model / "nerfstudio_models", model / "nerfstudio_models" / "step-000003999.safetensors"):
        folder = import_checkpoint(path, tmp_path / "run", path.name)
        assert same(Gaussians4D.load(folder / "gaussians.safetensors"), moving_ball())
    run = Run.open(tmp_path / "run")
    assert run.fps == 12 and len(run.manifest["stages"]) == 3
    written = export(tmp_path / "run", ["ply"])["ply"]  # the newest; its frames are those of the checkpoint
    assert len(list(written.glob("*.ply"))) == 5


def test_what_is_no_checkpoint_of_the_method_gets_one_line(model, tmp_path):
    with pytest.raises(ConflictError, match="exists; choose another --name"):
        import_checkpoint(model, tmp_path / "run")
        import_checkpoint(model, tmp_path / "run")
    other = tmp_path / "splatfacto"
    fileio.atomic_write(other / "nerfstudio_models" / "step-000000009.ckpt", b"")
    assert is_checkpoint(model) and not is_checkpoint(other)
    for path in (other, other / "nerfstudio_models" / "step-000000009.ckpt", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"step-\*\.safetensors"):
            import_checkpoint(path, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    done = CliRunner().invoke(app, ["import", str(model), "--out", str(tmp_path / "cli")])
    assert done.exit_code == 0 and (tmp_path / "cli/recon/main/gaussians.safetensors").is_file()


def test_an_exported_checkpoint_holds_the_model_and_comes_back(model, tmp_path):
    import_checkpoint(model, tmp_path / "ball")
    target = export(tmp_path / "ball", ["nerfstudio"])["nerfstudio"]
    arguments = json.dumps([str(target), str(target / "views")])
    assert (target / CONFIG).read_text() == f"!!python/object/apply:d2.recon.nerf.method.of_export {arguments}\n"
    with zipfile.ZipFile(target / CKPT) as archive:  # nothing unpickles it but nerfstudio, in tests/nerf
        stored = {archive.read(name) for name in archive.namelist() if "/data/" in name}
    assert {tensor.numpy().tobytes() for tensor in moving_ball().tensors().values()} <= stored
    back = import_checkpoint((target / CONFIG).parent, tmp_path / "back")
    assert same(Gaussians4D.load(back / "gaussians.safetensors"), moving_ball())


def test_views_that_the_model_draws_are_a_dataset_of_it(tmp_path):
    gaussians = moving_ball()
    clip = dataset.load(export(gaussians, ["nerfstudio"], tmp_path / "clip")["nerfstudio"] / "views")
    assert len(clip) == DRAWN and clip.times[[0, -1]].tolist() == [0, 1] and clip.has_alpha
    center = framing(gaussians).center
    moment = dataset.load(export(gaussians, ["nerfstudio"], tmp_path / "still", time=0.5)["nerfstudio"])
    assert len(moment) == DRAWN * len(RINGS_DEG) and moment.frames == 1
    distances = np.linalg.norm(moment.camera_centres().numpy() - center, axis=1)
    heights = moment.camera_centres().numpy()[:, 2] - center[2]
    elevations = np.degrees(np.arcsin(heights / distances)).reshape(len(RINGS_DEG), DRAWN)
    np.testing.assert_allclose(elevations, np.repeat(np.array(RINGS_DEG)[:, None], DRAWN, 1), atol=1e-3)
    alpha = moment.images[..., 3].float()
    assert (alpha.amax((1, 2)) > 200).all() and (alpha[:, 0].max() < 10)  # the ball is in every picture, whole


def test_one_frame_of_a_run_is_a_static_dataset_of_its_own_pictures(run_folder, tmp_path):
    home = tmp_path / "ball"
    shutil.copytree(run_folder, home)
    moving_ball().save(home / "recon/main/gaussians.safetensors")
    done = CliRunner().invoke(app, ["export", str(home), "--format", "nerfstudio", "--frame", "2", "--frames", "1:2"])
    assert isinstance(done.exception, InputError) and "--frame 2 is one moment" in str(done.exception)
    done = CliRunner().invoke(app, ["export", str(home), "--format", "nerfstudio", "--frame", "2"])
    assert done.exit_code == 0, done.output
    target = home / "recon/main/export/nerfstudio_moment"
    meta = json.loads((target / "transforms.json").read_text())
    assert len(meta["frames"]) == VIEWS and not any("time" in frame for frame in meta["frames"])
    for v, frame in enumerate(meta["frames"]):
        assert (target / frame["file_path"]).read_bytes() == (home / f"images/v{v:02d}/f002.png").read_bytes()
    whole = dataset.load(home)
    rows = (whole.times == torch.tensor(frame_time(2, FRAMES))).nonzero()[:, 0]
    still = dataset.load(target)
    assert torch.equal(still.viewmats, whole.viewmats[rows]) and torch.equal(still.images, whole.images[rows])
    with pytest.raises(ConflictError, match="--overwrite"):
        export(home, ["nerfstudio"], time=0.0)
    export(home, ["nerfstudio"], time=0.0, overwrite=True)
    assert (target / "images/000.png").read_bytes() == (home / "images/v00/f000.png").read_bytes()
    assert images.read_size(target / "images/000.png") == (whole.width, whole.height)


def test_a_camera_path_of_nerfstudios_viewer_lies_in_the_test_data():
    plan = json.loads((Path(__file__).parent.parent / "data/camera_path.json").read_text())
    assert len(plan["camera_path"]) == plan["fps"] * plan["seconds"] and len(plan["keyframes"]) == 3
    for shot in plan["camera_path"]:
        assert np.linalg.det(np.array(shot["camera_to_world"]).reshape(4, 4)) == pytest.approx(1)
