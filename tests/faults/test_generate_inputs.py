"""What can go wrong before, while and after `d2 generate` runs: exit code, one clear line, nothing lost."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.assertions import Outcome, digests, require_fault
from PIL import Image
from tiny_pair import draw_ball, single_thread

from d2 import destination, fileio, generation, pair
from d2.cli import app
from d2.denoiser import UNetDenoiser
from d2.errors import ConflictError, Stopped
from d2.phases import STATE, Observer
from d2.run import Run, _started


def tree(folder):
    """sha256 of every file."""
    return {path: fileio.sha256(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture
def d2(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process: exit code and the last line of stderr.

    What is refused has to be refused as every fault is; of a wrong command line Typer tells in its own way.
    """

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["d2", *map(str, words)])
        capsys.readouterr()
        before, start = digests(tmp_path), time.monotonic()
        with pytest.raises(SystemExit) as caught:
            app.main()
        code, said = int(caught.value.code or 0), capsys.readouterr().err
        if code not in (0, 2):
            before = {name: digest for name, digest in before.items() if not name.endswith(STATE)}  # work that goes on
            require_fault(Outcome(code, "", said), start, before, tmp_path)
        assert "Traceback" not in said
        return code, (said.strip().splitlines() or [""])[-1]

    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def begin(d2, tiny, tmp_path):
    """`d2 generate SOURCE --out run` with the tiny pair."""

    def run(source, *more, out=tmp_path / "run"):
        return d2("generate", source, "--out", out, "--preset", tiny / "preset.yaml", "--weights", tiny, *more)

    return run


@pytest.fixture(scope="module")
def unfinished_once(tmp_path_factory, tiny, ball):
    """A run stopped in the joint loop, to be copied."""
    seen = []
    folder = tmp_path_factory.mktemp("runs") / "unfinished"

    class Watch(Observer):
        def phase(self, name, done, total):
            if name == "matrix" and done == 3:
                seen.append(name)

    options = {"preset": tiny / "preset.yaml", "weights": tiny, "observer": Watch()}
    with pytest.raises(Stopped), single_thread():
        generation.generate(ball, folder, should_stop=lambda: 2 if seen else 0, **options)
    return folder


@pytest.fixture
def unfinished(unfinished_once, tmp_path):
    """A run stopped in the joint loop."""
    return Path(shutil.copytree(unfinished_once, tmp_path / "run"))


@pytest.mark.row(1)
def test_a_missing_input_is_named_before_any_weight_is_opened(d2, tmp_path):
    code, line = d2("generate", tmp_path / "absent.png", "--weights", tmp_path / "none")
    assert (code, line.startswith("error: ")) == (3, True)
    assert "absent.png" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.row(2, 4, 7, 9, 11)
@pytest.mark.parametrize(
    "make",
    [
        lambda folder: (folder / "x.txt").write_text("no image"),
        lambda folder: (folder / "x.png").write_bytes(b""),
        lambda folder: (folder / "x.jpg").write_bytes(b"<html>"),
        lambda folder: Image.new("RGBA", (20, 20)).save(folder / "x.png"),
        lambda folder: [Image.new("RGB", (20 + i, 20)).save(folder / f"{i}.png") for i in range(3)],
        lambda folder: [draw_ball(folder / f"{i}.png", 30, 50) for i in range(2)],
    ],
)
def test_unusable_folders_end_with_3_and_leave_no_run(begin, tmp_path, make):
    folder = tmp_path / "input"
    folder.mkdir()
    make(folder)
    code, line = begin(folder)
    assert code == 3
    assert line.startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.row(10)
@pytest.mark.parametrize("size", [(300, 1000), (1000, 300)])
def test_an_object_at_the_border_of_a_long_picture_ends_in_the_middle(generate, tmp_path, size):
    x, y = (20, 950) if size[1] > size[0] else (950, 20)
    draw_ball(tmp_path / "x.png", x, y, 60, size)
    folder = generate(tmp_path / "x.png", tmp_path / "run", references_only=True).folder
    rgb = np.asarray(Image.open(folder / "generate/reference_views/v02.png"))
    rows, columns = np.nonzero((rgb < 240).any(-1))
    for place in (rows, columns):
        assert abs((place.min() + place.max()) / 2 - 31.5) <= 2


@pytest.mark.row(13)
def test_names_with_spaces_unicode_and_newlines_work_and_are_quoted(begin, tmp_path):
    folder = tmp_path / "-a b\nü"
    for i in range(3):
        draw_ball(folder / f"- {i}\n.png", 30, 40 + i)
    assert begin(folder, "--references-only", "--quiet")[0] == 0
    Image.new("RGB", (5, 5)).save(folder / "- 1\n.png")
    code, line = begin(folder, out=tmp_path / "other")
    assert code == 3
    assert r"\n" in line


@pytest.mark.row(15, 19, 20, 22, 60)
@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--set", "stepz=3"], 3, "steps"),
        (["--set", "steps=0"], 3, "steps"),
        (["--set", "steps=1000000000"], 3, "1000"),
        (["--elevation-deg", "200"], 3, "90"),
        (["--set", "views=1"], 3, "views"),
        (["--fps", "0"], 3, "fps"),
        (["--set", "sigma_max=.nan"], 3, "sigma_max"),
        (["--set", "size=65"], 3, "multiple of"),
        (["--set", "anchor_frame=7"], 3, "anchor_frame"),
        (["--set", "elevations_deg=[1, 2]"], 3, "expected 3 angles"),
        (["--seed", str(2**70)], 3, "seed"),
        (["--seed", "-1"], 3, "seed"),
        (["--set", "a.b"], 2, "field=value"),
        (["--preset", "nonsense"], 3, "full, low-vram"),
        (["--device", "cuda"], 4, "--device cpu"),
    ],
)
def test_wrong_options_say_what_is_expected(begin, ball, tmp_path, words, code, text):
    if words == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    got, line = begin(ball, *words)
    assert got == code
    assert text in line
    assert not (tmp_path / "run").exists()


@pytest.mark.row(20)
def test_unknown_flags_are_usage_errors(begin, ball):
    assert begin(ball, "--sed", "3")[0] == 2


@pytest.mark.row(23)
def test_help_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    paths = os.pathsep.join([str(tmp_path), str(Path(app.__file__).parents[2])])
    for words in (["--help"], ["generate", "--help"], ["run", "--help"]):
        call = [sys.executable, "-c", "from d2.cli.app import main; main()", *words]
        done = subprocess.run(call, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.row(24)
def test_missing_weights_say_what_from_where_under_which_licence(d2, ball, tmp_path, monkeypatch):
    monkeypatch.delenv("D2_WEIGHTS", raising=False)
    code, line = d2("generate", ball)
    assert code == 4
    for words in (
        "checkpoints/svd_xt.safetensors",
        "checkpoints/sv3d_p.safetensors",
        "stabilityai/stable-video-diffusion-img2vid-xt",
        "stabilityai/sv3d",
        "Stability AI Community License",
        "hf download",
    ):
        assert words in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.row(27)
def test_swapped_weights_are_refused(begin, ball, tiny, tmp_path):
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    shutil.copy(tiny / "tiny_view.safetensors", swapped / "tiny_frame.safetensors")
    shutil.copy(tiny / "tiny_frame.safetensors", swapped / "tiny_view.safetensors")
    code, line = begin(ball, "--weights", swapped)
    assert code == 4
    assert "tiny_view" in line


@pytest.mark.row(30)
def test_a_finished_run_is_not_touched(begin, clip, finished):
    before = tree(finished)
    assert begin(clip)[0] == 8
    assert tree(finished) == before


@pytest.mark.row(30)
def test_a_run_whose_replacement_died_between_two_renames_is_back(generate, clip, finished):
    before = tree(finished)
    finished.rename(finished.with_name(".run.old"))
    with pytest.raises(ConflictError, match="is finished"):
        generate(clip, finished)
    assert tree(finished) == before
    assert not finished.with_name(".run.old").exists()


@pytest.mark.row(31)
def test_the_output_may_not_be_a_file_and_its_parent_is_created(begin, ball, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert begin(ball, out=tmp_path / "file")[0] == 3
    assert begin(ball, out=tmp_path / "file" / "below")[0] == 3
    assert begin(ball, "--references-only", out=tmp_path / "new" / "deep" / "run")[0] == 0


@pytest.mark.row(31)
def test_a_read_only_place_is_refused_before_work(begin, ball, tmp_path, monkeypatch):
    monkeypatch.setattr(destination, "is_writable", lambda folder: False)
    code, line = begin(ball)
    assert (code, "permission denied" in line) == (3, True)


def test_a_folder_of_someone_else_is_not_touched_not_even_with_overwrite(begin, ball, tmp_path):
    draw_ball(tmp_path / "run" / "mine.png", 30, 50)
    before = tree(tmp_path / "run")
    for more in ([], ["--overwrite"]):
        assert begin(ball, *more)[0] == 8
    assert tree(tmp_path / "run") == before


@pytest.mark.row(32)
def test_a_locked_run_is_refused_and_a_dead_lock_taken_over(begin, ball, unfinished):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = {"pid": sleeper.pid, "host": socket.gethostname(), "started": _started(sleeper.pid)}
    (unfinished / ".lock").write_text(json.dumps(owner))
    code, line = begin(ball)
    assert (code, f"locked by pid {sleeper.pid}" in line) == (8, True)
    sleeper.kill()
    sleeper.wait()
    assert begin(ball)[0] == 0


@pytest.mark.row(45)
@pytest.mark.parametrize(
    ("words", "text"), [(["--seed", "5"], "seed: 23 -> 5"), (["--set", "steps=5"], "steps: 3 -> 5")]
)
def test_another_configuration_does_not_go_on_and_the_first_difference_is_named(begin, ball, unfinished, words, text):
    before = tree(unfinished)
    code, line = begin(ball, *words)
    assert (code, text in line) == (8, True)
    assert tree(unfinished) == before


@pytest.mark.row(45)
def test_another_input_or_other_weights_do_not_go_on(begin, d2, ball, tiny, unfinished, tmp_path):
    draw_ball(tmp_path / "other.png", 20, 20)
    code, line = begin(tmp_path / "other.png")
    assert (code, "input_sha256" in line) == (8, True)
    other = tmp_path / "weights"
    shutil.copytree(tiny, other)
    data = bytearray((other / "tiny_view.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "tiny_view.safetensors").write_bytes(bytes(data))
    code, line = begin(ball, "--weights", other)
    assert (code, "tiny_view.safetensors_sha256" in line) == (8, True)


@pytest.mark.row(46)
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_state_says_how_to_restart(begin, ball, unfinished, damage):
    path = unfinished / STATE
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(bytes(data) if damage == "flip" else bytes(data[:-200]))
    code, line = begin(ball)
    assert code == 3
    assert "state.safetensors" in line
    assert "--overwrite" in line
    path.unlink()
    assert begin(ball)[0] == 0


@pytest.mark.row(21)
def test_a_run_of_another_version_says_which_d2_is_needed(begin, ball, unfinished):
    manifest = json.loads((unfinished / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps(manifest | {"version": 99}))
    code, line = begin(ball)
    assert (code, "format 99" in line) == (3, True)


@pytest.mark.row(44)
def test_too_little_disk_is_noticed_before_any_work(begin, ball, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 20, 0, 1 << 17))
    code, line = begin(ball)
    assert (code, "MB" in line) == (5, True)
    assert not (tmp_path / "run").exists()


@pytest.mark.row(50)
def test_a_nan_names_step_model_and_cell_and_the_state_before_it_is_kept(begin, ball, tmp_path, monkeypatch):
    calls = []
    healthy = UNetDenoiser.__call__

    def sick(self, x, sigma, cond):
        estimate = healthy(self, x, sigma, cond)
        calls.append(float(sigma[0]))
        if len(set(calls)) == 3 and (tmp_path / "run/generate/reference_video/f002.png").exists():
            estimate = estimate.clone()
            estimate[:, 1] = float("nan")
        return estimate

    assert begin(ball, "--references-only")[0] == 0
    monkeypatch.setattr(UNetDenoiser, "__call__", sick)
    code, line = begin(ball)
    assert code == 6
    assert "the view model's estimate of view 1, frame 0 is not finite in step 2" in line
    assert fileio.read_tensors(tmp_path / "run" / STATE)[1]["step"] == "2"
    monkeypatch.undo()
    assert Run.open(tmp_path / "run").stage("generate") is None


@pytest.mark.row(59)
@pytest.mark.parametrize(
    ("error", "where"),
    [(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "sampling"), (MemoryError(), "drawing")],
)
def test_row_59_the_hosts_memory_running_out_ends_with_5_and_the_state_stays(
    begin, ball, unfinished, monkeypatch, where, error
):
    def fail(*words):
        raise error

    before = tree(unfinished)
    monkeypatch.setattr(*((UNetDenoiser, "__call__", fail) if where == "sampling" else (pair.Stage, "decode", fail)))
    code, line = begin(ball)
    assert code == 5 and line.startswith("error: out of memory")
    assert ("with 1 columns in flight" in line and "go on with: d2 generate" in line) == (where == "sampling")
    after = tree(unfinished)
    assert {path for path in before if after[path] != before[path]} <= {unfinished / STATE}
    step = int(fileio.read_tensors(unfinished / STATE)[1]["step"])
    assert step == (2 if where == "sampling" else 3)


@pytest.mark.row(42)
def test_a_second_signal_ends_at_once_with_valid_files(tiny, clip, tmp_path):
    folder = tmp_path / "run"
    words = ["generate", str(clip), "--out", str(folder), "--preset", str(tiny / "preset.yaml"), "--weights", str(tiny)]
    code = "import torch; torch.set_num_threads(1); from d2.cli.app import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--set", "steps=500"], stderr=subprocess.PIPE, text=True
    )
    while not (folder / STATE).exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(2)
    time.sleep(0.002)
    process.send_signal(2)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert Run.open(folder).stage("generate") is None
    fileio.read_tensors(folder / STATE)
