"""`d2 run`: from a picture to exported files in one command, and again without doing anything twice."""

import json
import sys

from d2.cli import app
from d2.run import Run

FIT = ("iterations=10", "start_gaussians=50", "max_gaussians=60", "validate_every=10", "holdout=1")


def test_one_command_makes_everything_and_repeating_it_keeps_what_is_finished(
    tiny, clip, tmp_path, monkeypatch, capsys
):
    words = ["d2", "run", clip, "--out", tmp_path / "run", "--preset", tiny / "preset.yaml", "--weights", tiny]
    words += ["--quiet", "--reconstruct-preset", "fast"] + [w for text in FIT for w in ("--reconstruct-set", text)]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    manifests = []
    for _ in range(2):
        try:
            app.main()
        except SystemExit as end:
            assert not end.code
        out = capsys.readouterr().out
        assert [line.split(":")[0] for line in out.splitlines()] == ["ply", "mp4", "contact", "html"]
        manifests.append((tmp_path / "run/run.json").read_text())
    assert manifests[0] == manifests[1]
    assert set(json.loads(manifests[0])["stages"]) >= {"generate", "reconstruct:main"}
    assert Run.open(tmp_path / "run").fps == 24
