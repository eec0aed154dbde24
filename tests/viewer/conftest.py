"""Small assets, their pages, and a browser where there is one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pages.py

FLAGS = """
    --headless=new --no-sandbox --use-angle=swiftshader --enable-unsafe-swiftshader --no-first-run
    --disable-background-networking --disable-component-update --disable-sync --disable-quic
"""


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless browser; skips where the package or the program is missing."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install -c constraints.txt playwright"
    )
    program = os.environ.get("D2_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium: apt-get install --no-install-recommends chromium, or set D2_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished reconstruction of 1,500 Gaussians in a folder of its own, with reference pictures and a log."""
    from pages import finished_reconstruction

    return finished_reconstruction(tmp_path_factory.mktemp("viewer") / "fox")
