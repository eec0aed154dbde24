"""The command as users meet it: help without heavy imports, exit codes, signals, odd terminals."""

from __future__ import annotations

import errno
import inspect
import json
import os
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import typer
from faults.assertions import Outcome, expect_fault
from surroundings import cli_environment

from d2 import __version__
from d2.cli import app, stop
from d2.recon import pipeline
from d2.run import Run

STEPS = 400
SETTINGS = {"iterations": STEPS, "start_gaussians": 80, "max_gaussians": 80, "validate_every": 20, "holdout": 2}
SETS = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]


def command_paths(command=None, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and group there is, as words after `d2`."""
    command = command or typer.main.get_command(app.app)
    below = getattr(command, "commands", {})
    return [words, *(path for name, child in below.items() for path in command_paths(child, (*words, name)))]


@pytest.fixture
def d2(monkeypatch, capsys):
    """`d2("info", path)`: the command within this process, through its error border."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["d2", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            app.main()
        out, err = capsys.readouterr()
        return Outcome(int(caught.value.code or 0), out, err)

    return run


def run_script(text: str, cwd: Path, env: dict[str, str] | None = None) -> Outcome:
    """A Python program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=cwd, env=cli_environment() | (env or {}), capture_output=True, timeout=60
    )
    return Outcome(done.returncode, done.stdout.decode("ascii", "replace"), done.stderr.decode("ascii", "replace"))


# -- help and usage ----------------------------------------------------------------------------------------

HELP = """
import sys
from d2.cli.app import main
for words in {paths!r}:
    sys.argv = ["d2", *words, "--help"]
    try:
        main()
    except SystemExit as done:
        assert not done.code, words
sys.argv = ["d2", "--version"]
main()
"""


@pytest.mark.row(23)
def test_help_of_every_command_needs_neither_torch_nor_numba_nor_numpy(tmp_path):
    for name in ("torch", "numba", "numpy", "PIL", "gsplat", "safetensors", "imageio_ffmpeg", "plyfile"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not to be imported')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    outcome = run_script(HELP.format(paths=command_paths()), tmp_path, {"PYTHONPATH": path})
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.count("Usage: ") == len(command_paths()) and outcome.stdout.endswith(f"d2 {__version__}\n")


def test_every_command_and_option_says_what_it_does():
    for words in command_paths():
        command = typer.main.get_command(app.app)
        for word in words:
            command = command.commands[word]  # type: ignore[attr-defined]
        assert command.help and len(command.help) > 10, words
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{' '.join(words)}: {parameter.name} has no help text"


@pytest.mark.row(20)
@pytest.mark.parametrize("words", [["--nosuch"], ["nosuch"], ["reconstruct"], ["reconstruct", "x", "--fps", "fast"]])
def test_row_20_wrong_usage_exits_2_and_shows_the_usage(d2, words):
    outcome = d2(*words)
    assert outcome.code == 2 and "Usage: " in outcome.stderr and "Traceback" not in outcome.stderr


def test_no_words_at_all_show_the_help(d2):
    assert "Usage: " in "".join(d2()[1:])


@pytest.mark.row(20)
def test_row_20_a_set_without_an_equals_sign_exits_2(d2, tiny_dataset):
    expect_fault(lambda: d2("reconstruct", tiny_dataset, "--set", "iterations"), 2, "expected field=value")


# -- exit codes --------------------------------------------------------------------------------------------


def test_input_that_is_not_there_exits_3(d2, tmp_path):
    expect_fault(lambda: d2("reconstruct", tmp_path / "absent"), 3, "absent", "does not exist")
    expect_fault(lambda: d2("bench", "reconstruct", tmp_path / "absent"), 3, "absent", "does not exist")


@pytest.mark.parametrize("text", ["iterationz=3", "iterations=0", "iterations=[", "seed=-1"])
def test_a_setting_that_cannot_be_exits_3(d2, tiny_dataset, text):
    expect_fault(lambda: d2("reconstruct", tiny_dataset, "--set", text), 3, text.partition("=")[0])


@pytest.mark.row(60)
def test_a_gpu_that_is_not_there_exits_4(d2, tiny_dataset):
    expect_fault(lambda: d2("reconstruct", tiny_dataset, "--device", "cuda:99"), 4, "--device cpu")


@pytest.mark.row(59)
def test_memory_that_runs_out_exits_5(d2, monkeypatch, tiny_dataset):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):

        def fail(*words, error=error, **options):
            raise error

        monkeypatch.setattr(pipeline, "reconstruct", fail)
        expect_fault(lambda: d2("reconstruct", tiny_dataset), 5, "out of memory")


@pytest.mark.row(36)
def test_an_unfinished_run_exits_8(d2, tmp_path):
    Run.create(tmp_path / "run")
    expect_fault(lambda: d2("reconstruct", tmp_path / "run"), 8, "no finished matrix")


@pytest.mark.row(13)
@pytest.mark.parametrize(
    "words",
    [
        ("reconstruct", "{long}"), ("reconstruct", "{data}", "--out", "{long}"), ("export", "{long}"),
        ("info", "{long}.ply"), ("convert", "{data}/a.ply", "{long}.ply"), ("view", "{long}"), ("render", "{long}"),
        ("import", "{long}"), ("batch", "{long}"),
        ("generate", "{long}.png"), ("generate", "{data}/test/v00_f000.png", "--out", "{long}"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_row_13_a_name_too_long_for_any_disk_is_one_line(d2, tiny_dataset, words):
    expect_fault(lambda: d2(*(word.format(long="a" * 300, data=tiny_dataset) for word in words)), 3, "a" * 100)


@pytest.mark.row(14)
def test_row_14_whether_a_path_may_be_read_is_left_to_who_opens_it():
    seen = 0
    typers = [app.app]
    for one in typers:
        typers += [group.typer_instance for group in one.registered_groups if group.typer_instance]
        for command in one.registered_commands:
            hints = typing.get_type_hints(command.callback, include_extras=True)
            for name, parameter in inspect.signature(command.callback or print).parameters.items():
                told = [parameter.default, *getattr(hints[name], "__metadata__", ())]
                infos = [info for info in told if isinstance(info, typer.models.ParameterInfo)]
                if "Path" in str(hints[name]):
                    seen += 1
                    assert [info.readable for info in infos] == [False], f"{command.callback}: {name}"
    assert seen > 30


@pytest.mark.parametrize(("code", "exit_code"), [(errno.ENOSPC, 5), (errno.EMFILE, 5), (errno.EACCES, 3)])
def test_what_the_system_refuses_by_name_is_one_line(d2, monkeypatch, tiny_dataset, code, exit_code):
    def refuse(*words, **options):
        raise OSError(code, os.strerror(code), "some/file")

    monkeypatch.setattr(pipeline, "reconstruct", refuse)
    reason = os.strerror(code).lower()
    expect_fault(lambda: d2("reconstruct", tiny_dataset), exit_code, f"cannot use some/file: {reason}")


def test_our_own_bug_is_one_line_with_a_log_and_exits_1(d2, monkeypatch, tiny_dataset, tmp_path):
    def fail(*words, **options):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(pipeline, "reconstruct", fail)
    monkeypatch.setattr(app.tempfile, "gettempdir", lambda: str(tmp_path))
    outcome = d2("reconstruct", tiny_dataset)
    last = outcome.stderr.splitlines()[-1]
    assert outcome.code == 1 and last.startswith("internal error: ZeroDivisionError: two lines (details in ")
    log = Path(last.partition("details in ")[2].rstrip(")"))
    assert "Traceback" in log.read_text() and "Traceback" not in outcome.stderr


def test_our_own_bug_on_a_full_disk_is_still_one_line(d2, monkeypatch, tiny_dataset):
    def fail(*words, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "reconstruct", fail)
    monkeypatch.setattr(app.tempfile, "gettempdir", lambda: "/proc/nowhere")
    outcome = d2("reconstruct", tiny_dataset)
    assert outcome.code == 1 and len(outcome.stderr.splitlines()) == 1 and "repeat with --debug" in outcome.stderr


def test_debug_shows_the_traceback_before_the_line(d2, tmp_path):
    outcome = d2("--debug", "reconstruct", tmp_path / "absent")
    assert "Traceback" in outcome.stderr and outcome.stderr.splitlines()[-1].startswith("error: ")


def test_a_machine_without_its_libraries_fails_the_doctor_with_4(d2, monkeypatch):
    from d2 import machine

    monkeypatch.setattr(machine, "checks", lambda: [machine.Check("torch", False, False, "not installed")])
    outcome = d2("doctor")
    assert outcome.code == 4 and "NO  torch" in outcome.stdout


# -- terminals ---------------------------------------------------------------------------------------------


@pytest.mark.row(49)
@pytest.mark.parametrize("word", ["--help", "--version"])
def test_row_49_a_reader_that_left_is_no_reason_to_complain(tmp_path, word):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "d2.cli.app", word]
    done = subprocess.run(
        command, cwd=tmp_path, env=cli_environment(), stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert done.stderr == b""


ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
DOCTOR = """
import sys
from d2 import machine
from d2.cli.app import main
machine.checks = lambda: [machine.Check("gr\\u00f6\\u00dfe", True, True, "4 \\u2192 5 \\udcff")]
sys.argv = ["d2", "doctor"]
main()
"""


@pytest.mark.row(49)
@pytest.mark.parametrize("encoding", ["ascii:strict", "latin-1:strict", "utf-8:strict"])
def test_row_49_a_terminal_that_lacks_characters_gets_escapes_instead_of_failures(tmp_path, encoding):
    outcome = run_script(DOCTOR, tmp_path, ASCII | {"PYTHONIOENCODING": encoding})
    assert outcome.code == 0 and outcome.stderr == "", outcome
    assert "latin" not in encoding or "4 \\u2192 5 \\udcff" in outcome.stdout


MISSING = """
import os, sys
from d2.cli.app import main
{before}
sys.argv = ["d2", "reconstruct", {path!a}]
main()
"""


@pytest.mark.row(49)
def test_row_49_no_home_and_a_dumb_ascii_terminal_give_the_same_line(run_cli):
    env = ASCII | {"TERM": "dumb", "HOME": "", "XDG_CACHE_HOME": ""}
    message = expect_fault(lambda: run_cli("reconstruct", "/nowhere/ü", env=env), 3, "nowhere", "does not exist")
    assert message.isascii()


@pytest.mark.row(49)
def test_row_49_a_deleted_working_folder_is_one_line(tmp_path, tiny_dataset):
    script = MISSING.format(before="os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')", path=str(tiny_dataset))
    expect_fault(lambda: run_script(script, tmp_path), 3, "working folder", folder=tiny_dataset)


# -- signals -----------------------------------------------------------------------------------------------


def test_one_signal_sets_the_flag_and_without_one_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop.StopFlag():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    with stop.StopFlag() as flag:
        assert flag() == 0
        signal.raise_signal(signal.SIGTERM)
        assert flag() == signal.SIGTERM
    flag.restore()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.row(42)
def test_a_second_signal_on_the_way_out_is_no_traceback(tmp_path):
    raised = "signal.raise_signal(signal.SIGINT)"
    script = f"import signal\nfrom d2.cli.stop import StopFlag\nwith StopFlag():\n {raised}\n{raised}\nprint('late')"
    outcome = run_script(script, tmp_path)
    assert (outcome.code, outcome.stdout) == (130, "")
    assert "Traceback" not in outcome.stderr


@pytest.mark.row(42)
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_ends_the_process_at_once(tmp_path, name, code):
    raised = f"signal.raise_signal(signal.{name})"
    script = f"import signal\nfrom d2.cli.stop import StopFlag\nwith StopFlag():\n {raised}\n {raised}\n print('late')"
    outcome = run_script(script, tmp_path)
    assert (outcome.code, outcome.stdout) == (code, "")


@pytest.mark.row(61)
def test_ctrl_c_while_a_command_imports_exits_130_without_a_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    outcome = run_script(MISSING.format(before="pass", path="x"), tmp_path, {"PYTHONPATH": path})
    assert outcome.code == 130 and outcome.stderr == ""


def interrupted(dataset: Path, out: Path, signum: int) -> Outcome:
    """`d2 reconstruct`, sent a signal when its first checkpoint is there."""
    command = [sys.executable, "-m", "d2.cli.app", "reconstruct", str(dataset), "--out", str(out), *SETS]
    process = subprocess.Popen(
        command, cwd=dataset.parent, env=cli_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list((out / "recon" / "main" / "ckpt").glob("step_*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=60)
    return Outcome(process.returncode, stdout, stderr)


def assert_goes_on(dataset: Path, out: Path) -> None:
    """Finishes an interrupted run, which must equal one that never stopped, bit for bit."""
    told, messages = pipeline.Observer(), []
    told.message = messages.append  # type: ignore[method-assign]
    resumed = pipeline.reconstruct(dataset, out, sets=tuple(SETS[1::2]), observer=told)
    whole = pipeline.reconstruct(dataset, out.with_name("whole"), sets=tuple(SETS[1::2]))
    assert any("Resuming at iteration" in text for text in messages)
    assert resumed.iterations == STEPS
    assert resumed.model.read_bytes() == whole.model.read_bytes()
    logs = [
        [json.loads(line) for line in (r.folder / "metrics.jsonl").read_text().splitlines()] for r in (resumed, whole)
    ]
    for mine, other in zip(*logs, strict=True):  # the loss that is told is a sum whose order is each compilation's own
        assert mine.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-6) and mine == other


@pytest.mark.row(41)
def test_row_41_sigterm_saves_and_the_same_command_goes_on_bit_for_bit(tiny_dataset, tmp_path):
    out = tmp_path / "out"
    outcome = interrupted(tiny_dataset, out, signal.SIGTERM)
    message = expect_fault(lambda: outcome, 143, f"d2 reconstruct {tiny_dataset} --out {out}")
    assert "--set iterations=" in message
    assert not (out / ".lock").exists() and not (out / "recon" / "main" / pipeline.MODEL).exists()
    assert_goes_on(tiny_dataset, out)


@pytest.mark.row(42)
def test_row_42_sigint_saves_and_exits_130(tiny_dataset, tmp_path):
    outcome = interrupted(tiny_dataset, tmp_path / "out", signal.SIGINT)
    expect_fault(lambda: outcome, 130, "all saved; go on with: d2 reconstruct")
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_run_that_was_killed_goes_on_bit_for_bit(tiny_dataset, tmp_path):
    assert interrupted(tiny_dataset, tmp_path / "out", signal.SIGKILL).code == -signal.SIGKILL
    assert (tmp_path / "out" / ".lock").exists()
    assert_goes_on(tiny_dataset, tmp_path / "out")


def test_the_whole_command_works_in_a_process_of_its_own(run_cli, tiny_dataset, tmp_path):
    outcome = run_cli("reconstruct", "balls", "--quiet", "--json", *SETS, "--set", "iterations=3", cwd=tmp_path)
    assert outcome.code == 0 and outcome.stderr == "", outcome
    assert '"iterations": 3' in outcome.stdout and (tmp_path / "runs" / "balls" / "run.json").is_file()
