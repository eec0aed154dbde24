"""Closed streams and full disks below them: a line at most, and never the work."""

import os
import subprocess
import sys

import pytest
from faults.assertions import Outcome, expect_fault
from surroundings import cli_environment

WORK = """
import sys
from d2.cli import app
from d2 import fileio
def work(*words, **options):
    print("halfway", file=sys.stderr, flush=True)
    fileio.atomic_write("kept", b"result")
    print("done")
app.app = work
sys.argv = ["d2"]
app.main()
"""


def started(text, cwd, setup, env):
    """A Python program of which the shell words `setup` arrange the streams."""
    call = ["sh", "-c", f'exec "$0" -c "$1" {setup}', sys.executable, text]
    done = subprocess.run(call, cwd=cwd, env=cli_environment() | env, capture_output=True, text=True, timeout=60)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.row(49)
@pytest.mark.parametrize("env", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("setup", ["2>&-", ">&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_row_49_streams_that_are_closed_or_refuse_what_is_only_told_stop_nothing(tmp_path, setup, env):
    outcome = started(WORK, tmp_path, setup, env)
    assert outcome.code == 0, outcome
    assert (tmp_path / "kept").read_bytes() == b"result"
    assert outcome.stdout == ("" if ">&-" in setup.replace("2>&-", "") else "done\n")
    assert outcome.stderr == ("" if "2>" in setup else "halfway\n")


@pytest.mark.row(49)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, which refuses like a full disk")
@pytest.mark.parametrize("env", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_row_49_a_full_disk_below_standard_output_is_one_line_and_5(tmp_path, env):
    expect_fault(lambda: started(WORK, tmp_path, ">/dev/full", env), 5, "standard output", "No space left")
    assert (tmp_path / "kept").read_bytes() == b"result"


@pytest.mark.row(49)
def test_row_49_the_number_of_a_closed_stream_is_given_to_no_file(tmp_path):
    text = "from d2.cli import streams\nstreams.prepare()\nassert open('f', 'w').fileno() > 2"
    assert started(text, tmp_path, "<&- >&- 2>&-", {}).code == 0
