"""Parts of a finished matrix sampled again, and one run for each of several seeds."""

import pytest
from watched import bits, stop_at

from d2 import images
from d2.errors import ConflictError, InputError, Stopped
from d2.run import Run


@pytest.mark.parametrize(("text", "anew"), [("views=1", [(1, f) for f in range(3)]), ("frames=0", [(0, 0), (2, 0)])])
def test_chosen_cells_are_sampled_again_and_the_rest_is_kept(generate, clip, finished, text, anew):
    folder = finished
    before = bits(folder)
    with pytest.raises(Stopped, match=f"--cells {text}"):
        generate(clip, folder, redo=text, sets=("seed=5",), **stop_at("matrix", 2))
    assert bits(folder) == before
    generate(clip, folder, redo=text, sets=("seed=5",))
    after = bits(folder)
    axis = 0 if text.startswith("views") else 1
    for v in range(3):
        for f in range(3):
            name = f"images/v{v:02d}/f{f:03d}.png"
            assert (after[name] != before[name]) == ((v, f)[axis] == anew[0][axis])
    stage = Run.open(folder).stage("generate")
    assert stage is not None
    assert (stage["seed"], stage["cells"]) == (5, text)
    assert not (folder / "generate/kept").exists()


@pytest.mark.parametrize("text", ["views=3", "views", "rows=1", "views=-1", "frames=0,7"])
def test_cells_that_are_not_there_are_refused(generate, clip, tmp_path, text):
    with pytest.raises(InputError, match="--cells"):
        generate(clip, tmp_path / "run", redo=text)
    assert not (tmp_path / "run").exists()


def test_cells_of_no_finished_run_or_one_of_another_shape_are_refused(generate, clip, finished, tmp_path):
    with pytest.raises(ConflictError, match="not a finished run"):
        generate(clip, tmp_path / "absent", redo="views=1")
    with pytest.raises(ConflictError, match=r"another shape \(views: 3 -> 4\)"):
        generate(clip, finished, redo="views=1", sets=("views=4",))


def test_sampling_again_does_not_drop_a_reconstruction_unasked(generate, clip, finished):
    Run.open(finished).commit_stage("reconstruct:main", {})
    with pytest.raises(ConflictError, match="--overwrite"):
        generate(clip, finished, redo="views=1")


def test_a_sweep_makes_a_run_for_each_seed_and_one_sheet(tiny, clip, one_thread, tmp_path):
    from d2.sweep import parse_seeds, sweep

    options = {"preset": tiny / "preset.yaml", "weights": tiny, "sets": ("steps=2",)}
    results = sweep(clip, tmp_path / "out", parse_seeds("3, 4"), **options)
    assert [result.folder.name for result in results] == ["seed-3", "seed-4"]
    assert images.open_image(tmp_path / "out/seeds.png").size == (3 * 192, 2 * 192)
    cells = [(result.folder / "images/v00/f000.png").read_bytes() for result in results]
    assert cells[0] != cells[1]
    with pytest.raises(InputError, match="--seeds"):
        sweep(clip, tmp_path / "out", (3, 3), **options)
    with pytest.raises(InputError, match="--seeds"):
        parse_seeds("1,two")
