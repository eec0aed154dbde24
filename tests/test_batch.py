"""`d2 batch`: what it is asked to do, workers and their records, resuming, and a real Ray cluster (make test-ray)."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import typer
from faults.assertions import expect_fault
from surroundings import ROOT
from test_cli import d2  # noqa: F401
from tiny_pair import draw_ball

from d2.cli import app, fleet, jobs
from d2.run import Run

# Stands for d2 in a worker: takes its words, and ends as the name of the input asks for.
STANDIN = """
import json, os, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
out = Path(words[words.index("--out") + 1] if "--out" in words else words[1])
source = out.name
out.parent.mkdir(exist_ok=True)
(out.parent / "calls.txt").open("a").write(" ".join(words) + "\\n")
tries = (out.parent / "calls.txt").read_text().count(f"/{source} ")
if source == "broken":
    print("error: the file is damaged", file=sys.stderr)
    sys.exit(3)
if source == "killed" and tries == 1 or source == "doomed":
    os.kill(os.getpid(), signal.SIGKILL)
if source == "slow":
    signal.signal(signal.SIGTERM, lambda *_: (print("error: stopped, all saved"), sys.exit(143)))
    (out.parent / "begun").touch()
    time.sleep(60)
out.mkdir(exist_ok=True)
stages = {"reconstruct:main": {"psnr": 30.5, "gaussians": 7}}
(out / "run.json").write_text(json.dumps({"version": 1, "d2": "0", "fps": 24, "stages": stages}))
"""


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "in"
    for name in ("one", "two", "broken", "killed"):
        draw_ball(folder / f"{name}.png", 30, 60)
    return folder


@pytest.fixture
def batch(d2, monkeypatch, tmp_path):  # noqa: F811
    """`batch(*words)`: the command with a stand-in for the processes it starts, writing into out/."""
    (tmp_path / "standin.py").write_text(STANDIN)
    monkeypatch.setattr(fleet, "D2", (sys.executable, str(tmp_path / "standin.py")))
    monkeypatch.setattr(fleet, "POLL", 0.02)
    return lambda *words: d2("batch", *words, "--out", tmp_path / "out", "--device", "cpu", "--quiet")


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "out" / "calls.txt").read_text().splitlines()


# -- what is asked for -------------------------------------------------------------------------------------


def test_patterns_files_folders_and_manifests_become_one_job_each(tmp_path, pictures, tiny_dataset, clip):
    (tmp_path / "fox.glb").write_bytes(b"glTF")
    found = jobs.read_jobs([f"{pictures}/*.png", str(tiny_dataset), str(clip), str(tmp_path / "fox.glb")])
    kinds = {job.name: job.kind for job in found}
    assert kinds == dict.fromkeys(["broken", "killed", "one", "two", "clip"], "picture") | {
        "balls": "dataset",
        "fox": "solid",
    }
    assert all(job.source.is_absolute() for job in found)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_manifest_names_inputs_beside_it_with_options_of_their_own(tmp_path, pictures, suffix):
    lines = {
        ".csv": "input,name,seed,motion\none.png,first,3,\ntwo.png,,,40.5\n",
        ".jsonl": '{"input": "one.png", "name": "first", "seed": 3}\n\n{"input": "two.png", "motion": 40.5}\n',
    }
    (pictures / f"list{suffix}").write_text(lines[suffix])
    first, second = jobs.read_jobs([str(pictures / f"list{suffix}")])
    assert (first.name, first.source, first.options) == ("first", (pictures / "one.png").resolve(), (("seed", "3"),))
    assert (second.name, second.options) == ("two", (("motion", "40.5"),))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("l.csv", "input,colour\none.png,red\n", "unknown column 'colour'"),
        ("l.csv", "input\none.png,2\n", "more values than columns"),
        ("l.csv", "name\nx\n", "line 2: no input"),
        ("l.csv", "input\nnone.png\n", "none.png does not exist"),
        ("l.csv", "input\n", "names no asset"),
        ("l.csv", "input,name\none.png,../up\n", "'../up'"),
        ("l.csv", "input\none.png\none.png\n", "both called 'one'"),
        ("l.csv", b"input\n\xff.png\n", "not a CSV file in UTF-8"),
        ("l.jsonl", '{"input": NaN}', "line 1 is not valid JSON"),
        ("l.jsonl", "[1]", "line 1: expected an object"),
        ("l.jsonl", '{"input": ["one.png"]}', "input must be text or a number"),
        ("l.jsonl", '{"input": "set", "seed": 1}', "seed is of stage 1"),
    ],
)
def test_a_manifest_that_cannot_be_is_one_line_before_anything_begins(batch, tmp_path, pictures, name, text, said):
    (pictures / "set").mkdir()
    (pictures / "set" / "transforms.json").write_text("{}")
    (pictures / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    expect_fault(lambda: batch(pictures / name), 3, said, folder=pictures)
    assert not (tmp_path / "out").exists()


def test_a_pattern_without_a_match_and_two_inputs_of_one_name_are_refused(batch, tmp_path, pictures):
    expect_fault(lambda: batch(f"{pictures}/*.webp"), 3, "matches nothing")
    draw_ball(tmp_path / "else" / "one.png", 30, 60)
    expect_fault(lambda: batch(pictures / "one.png", tmp_path / "else" / "one.png"), 3, "both called 'one'", "manifest")


def test_workers_of_a_cluster_are_not_ours_to_count(batch, pictures):
    expect_fault(lambda: batch(pictures / "one.png", "--ray", "auto", "--workers", "2"), 2, "--workers")


def test_every_word_that_workers_are_given_is_one_that_d2_takes(tmp_path, pictures, tiny_dataset):
    (tmp_path / "fox.glb").write_bytes(b"glTF")
    rows = [
        {"input": "in/one.png", "views": "v", "mask": "m.png"} | dict.fromkeys(
            ("seed", "elevation_deg", "image_frame_ratio", "motion", "fps"), 1) | {"preset": "tiny"},
        {"input": "fox.glb"},
        {"input": "balls", "fps": 12, "reconstruct_preset": "fast"},
    ]  # fmt: skip
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = fleet.Settings(tmp_path, "full", "quality", ("steps=2",), ("size=8",), "w", False, True, 0, 1)
    command = typer.main.get_command(app.app)
    given = []
    for job in jobs.read_jobs([str(tmp_path / "l.jsonl")]):
        for words in fleet.commands(job, settings, "cuda:1"):
            context = command.commands[words[0]].make_context(words[0], words[1:])  # type: ignore[attr-defined]
            given.append((words[0], context.params))
    assert [name for name, _ in given] == ["run", "run", "reconstruct", "export"]
    run, solid, reconstruct, _ = (params for _, params in given)
    assert (run["preset"], run["seed"], run["fps"], run["weights"], run["resume"]) == ("tiny", 1, 1, Path("w"), False)
    assert run["set"] == ["steps=2"] and run["reconstruct_set"] == ["size=8"] and run["remove_bg"] is False
    assert solid["asset"] == (tmp_path / "fox.glb").resolve() and solid["device"] == "cuda:1"
    assert (reconstruct["preset"], reconstruct["fps"], reconstruct["device"]) == ("fast", 12, "cuda:1")


# -- workers -----------------------------------------------------------------------------------------------


def test_one_broken_asset_stops_no_other_and_the_same_command_tries_only_that_again(batch, tmp_path, pictures):
    message = expect_fault(lambda: batch(f"{pictures}/*.png", "--workers", "2"), 7, "1 of 4 assets failed: broken")
    assert str(tmp_path / "out" / "logs") in message
    record = json.loads((tmp_path / "out" / "logs" / "broken.json").read_text())
    assert (record["code"], record["error"], record["attempts"]) == (3, "the file is damaged", 1)
    assert "the file is damaged" in (tmp_path / "out" / "logs" / "broken.log").read_text()
    assert json.loads((tmp_path / "out" / "logs" / "killed.json").read_text())["attempts"] == 2
    before = len(calls(tmp_path))
    outcome = batch(f"{pictures}/*.png", "--workers", "2")
    lines = {line.split()[0]: line for line in outcome.stdout.splitlines()}
    assert outcome.code == 7 and list(lines) == ["broken", "killed", "one", "two"]
    assert "failed (3)" in lines["broken"] and "kept" in lines["one"] and "30.50 dB" in lines["one"]
    assert len(calls(tmp_path)) == before + 1


def test_another_input_or_other_settings_are_no_reason_to_skip(batch, tmp_path, pictures):
    one = pictures / "one.png"
    assert batch(one).code == 0 and batch(one).code == 0
    assert len(calls(tmp_path)) == 1
    draw_ball(one, 20, 50, radius=15)
    assert batch(one).code == 0 and batch(one, "--reconstruct-preset", "fast").code == 0
    assert batch(one, "--reconstruct-preset", "fast", "--overwrite").code == 0
    shutil.rmtree(tmp_path / "out" / "one")
    assert batch(one, "--reconstruct-preset", "fast", "--json").code == 0
    assert len(calls(tmp_path)) == 5 and calls(tmp_path)[3].count("--overwrite") == 1


def test_a_process_that_is_always_killed_is_given_up_with_its_signal(batch, pictures):
    shutil.copy(pictures / "one.png", pictures / "doomed.png")
    outcome = batch(pictures / "doomed.png", "--retries", "2", "--json")
    (record,) = json.loads(outcome.stdout)
    assert outcome.code == 7 and (record["code"], record["attempts"]) == (128 + signal.SIGKILL, 3)
    assert record["error"].startswith("killed by SIGKILL")


def test_a_signal_lets_what_runs_save_and_starts_nothing_more(batch, monkeypatch, tmp_path, pictures):
    shutil.copy(pictures / "one.png", pictures / "slow.png")
    started = tmp_path / "out" / "begun"
    monkeypatch.setattr("d2.cli.stop.StopFlag.__call__", lambda self: signal.SIGTERM if started.exists() else 0)
    begin = time.monotonic()
    outcome = batch(pictures / "slow.png", pictures / "one.png", pictures / "two.png")
    assert time.monotonic() - begin < 20 and outcome.code == 143
    assert "stopped with 0 of 3 assets done; repeat the same command" in outcome.stderr
    assert len(calls(tmp_path)) == 1
    assert json.loads((tmp_path / "out" / "logs" / "slow.json").read_text())["error"] == "stopped, all saved"


def test_devices_are_dealt_out_so_that_each_gpu_has_its_share(batch, monkeypatch, tmp_path, pictures):
    monkeypatch.setattr("d2.cli.batch._devices", lambda text: ["cuda:0", "cuda:1"])
    for name in "abcdefgh":
        shutil.copy(pictures / "one.png", pictures / f"x{name}.png")
    used: list[set[str]] = []
    whole = fleet.work

    def watched(job, settings, device, stopping):
        used.append({device})
        time.sleep(0.05)
        return whole(job, settings, device, stopping)

    monkeypatch.setattr(fleet, "work", watched)
    assert batch(f"{pictures}/x*.png", "--per-gpu", "2").code == 0
    assert sorted(map(str, used[:4])) == ["{'cuda:0'}", "{'cuda:0'}", "{'cuda:1'}", "{'cuda:1'}"]


def test_a_record_that_is_none_and_a_gpu_that_is_not_there_are_one_line(batch, d2, tmp_path, pictures):  # noqa: F811
    assert batch(pictures / "one.png").code == 0
    (tmp_path / "out" / "logs" / "one.json").write_text('{"code": 0}')
    expect_fault(lambda: batch(pictures / "one.png"), 3, "one.json", "not a record")
    expect_fault(lambda: d2("batch", pictures / "two.png", "--device", "cpu,cuda:99"), 4, "cuda:99")


def test_without_ray_the_line_says_what_to_install(batch, monkeypatch, pictures):
    monkeypatch.setitem(sys.modules, "ray", None)
    expect_fault(lambda: batch(pictures / "one.png", "--ray", "local"), 4, "d2-4d[ray]")


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_a_local_ray_cluster_makes_four_assets_one_of_them_broken_and_resumes(run_cli, tmp_path, tiny_dataset):
    for name in ("a", "b", "broken", "c"):
        shutil.copytree(tiny_dataset, tmp_path / "in" / name)
    (tmp_path / "in" / "broken" / "transforms_train.json").write_text("{}")
    sets = [f"--reconstruct-set={x}" for x in ("iterations=6", "start_gaussians=60", "max_gaussians=80", "holdout=2")]
    words = [
        "batch",
        f"{tmp_path}/in/*",
        "--out",
        tmp_path / "out",
        "--ray",
        "local",
        "--workers",
        "2",
        *sets,
        "--json",
    ]
    env = {"PYTHONPATH": str(ROOT / "tests"), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}

    def records(outcome):
        return {record["name"]: record for record in json.loads(outcome.stdout)}

    first = run_cli(*words, env=env, timeout=900)
    found = records(first)
    assert first.code == 7 and "1 of 4 assets failed: broken" in first.stderr, first
    assert [found[name]["code"] for name in ("a", "b", "broken", "c")] == [0, 0, 3, 0]
    assert all(Run.open(tmp_path / "out" / name).stage("reconstruct:main") for name in "abc")
    assert all((tmp_path / "out" / name / "recon" / "main" / "export" / "ply").is_dir() for name in "abc")
    shutil.rmtree(tmp_path / "out" / "b")
    shutil.rmtree(tmp_path / "in" / "broken")
    shutil.copytree(tiny_dataset, tmp_path / "in" / "broken")
    second = records(run_cli(*words, env=env, timeout=900))
    assert all(record["code"] == 0 for record in second.values())
    assert {name: record["kept"] for name, record in second.items()} == {
        "a": True,
        "b": False,
        "broken": False,
        "c": True,
    }
