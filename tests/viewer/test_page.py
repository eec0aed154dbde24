"""Texts from a run are inert in the page; the page is the same for the same run; the script keeps its budget."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pages import FPS, FRAMES, random_asset

from d2.errors import ConflictError, InputError
from d2.recon.exports import export
from d2.recon.viewer import pack, page, reference
from d2.run import Run

HOSTILE = """</script><script>alert(1)</script><!--"'>&amp;\u2028@@asset@@ \U0001f98a"""
MODULES = Path(page.__file__).parent / "page"


class Elements(HTMLParser):
    """Names and attributes of all elements, and the text within each script."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.open: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open == "script":
            self.scripts[-1] += data


def test_hostile_texts_change_no_element():
    tame, wild = (page.page(text, {"name": text, "facts": [[text, text]]}, b"asset", text) for text in ("fox", HOSTILE))
    mild, hostile = Elements(tame), Elements(wild)
    assert [tag for tag, _ in mild.tags] == [tag for tag, _ in hostile.tags]
    assert [attrs.keys() for _, attrs in mild.tags] == [attrs.keys() for _, attrs in hostile.tags]
    assert json.loads(hostile.scripts[0]) == {"name": HOSTILE, "facts": [[HOSTILE, HOSTILE]]}
    assert base64.b64decode(hostile.scripts[1]) == b"asset" and hostile.scripts[2] == mild.scripts[2]
    assert dict(hostile.tags)["canvas"]["aria-label"] == f"{HOSTILE}, a moving 3D object"


def test_policy_allows_this_script_and_this_style_only_and_no_network():
    text = page.page("fox", {}, b"asset")
    found = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert found is not None
    policy = html.unescape(found[1])
    script = Elements(text).scripts[2]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}' blob:;" in policy and "connect-src 'none'" in policy
    assert "unsafe" not in policy and "default-src 'none'" in policy
    assert "connect-src 'self'" in page.page("fox", {}, None)
    assert not re.search(r"(src|href)=\"(?!data:|#|\")", text), "an address outside of the page"


def test_script_keeps_its_budget_and_modules_are_short():
    assert len(page.joined_script().encode()) <= 40_000
    for path in MODULES.iterdir():
        assert path.read_text(encoding="utf-8").count("\n") <= 400, path.name
    assert {path.stem for path in MODULES.glob("*.js")} == set(page.MODULES)


def test_modules_import_from_earlier_ones_only():
    for index, name in enumerate(page.MODULES):
        source = (MODULES / f"{name}.js").read_text(encoding="utf-8")
        assert set(re.findall(r"from '\./(\w+)\.js'", source)) <= set(page.MODULES[:index]), name


def test_export_writes_one_file_or_a_folder_for_a_site_twice_the_same(made, tmp_path):
    written = export(made, ["html", "web"], tmp_path / "a")
    assert written == {"html": tmp_path / "a/fox.html", "web": tmp_path / "a/web/index.html"}
    assert {p.name for p in (tmp_path / "a/web").iterdir()} == {"index.html", "asset.bin"}
    again = export(made, ["html", "web"], tmp_path / "b")
    for what in ("html", "web"):
        assert written[what].read_bytes() == again[what].read_bytes()
    assert (tmp_path / "a/web/asset.bin").read_bytes()[:4] == pack.MAGIC
    with pytest.raises(ConflictError, match="--overwrite"):
        export(made, ["html"], tmp_path / "a")


def test_page_tells_clip_quality_curve_and_where_the_pictures_were_seen_from(made, tmp_path):
    about = json.loads(Elements(export(made, ["html"], tmp_path)["html"].read_text()).scripts[0])
    assert about["clip"] == {"seconds": (FRAMES - 1) / FPS, "frames": FRAMES}
    assert ["Clip", "5 frames at 10 a second"] in about["facts"]
    assert about["curve"] == [[100, 21.0], [200, 22.0], [300, 23.0], [400, 24.0]]
    assert len(about["input"]["times"]) == FRAMES and len(about["pictures"]["poses"]) == 4
    source = about["views"]["Source camera"]
    assert source["az"] == pytest.approx(0) and source["el"] == pytest.approx(15, abs=1e-4)
    assert source["radius"] == pytest.approx(2.5, abs=1e-3) and source["fov"] == pytest.approx(33.8, abs=1e-3)


def test_a_run_is_credited_with_its_input_its_models_and_their_licences(made, tmp_path):
    run = Run.create(tmp_path / "cat", fps=8)
    models = {"a.safetensors": {"source": HOSTILE, "licence": "MIT"}, "b.safetensors": {"source": "", "licence": None}}
    run.commit_stage("generate", {"views": 2, "frames": 3, "input": {"name": "cat.png"}, "models": models})
    random_asset(20).save(run.folder / "recon/main/gaussians.safetensors")
    run.commit_stage("reconstruct:main", {"psnr": 31.26, "iterations": 40})
    about = json.loads(Elements(export(run.folder, ["html"], tmp_path)["html"].read_text()).scripts[0])
    first, *others = about["credits"].split("\n")
    assert first == "From cat.png" and others[-1] == "b.safetensors: source and licence unknown"
    assert f"a.safetensors: {HOSTILE}, MIT" in about["credits"]
    assert ["Quality", "31.3 dB (held-out PSNR)"] in about["facts"] and about["clip"]["frames"] == 3


def test_a_moment_is_a_page_without_a_clip(made, tmp_path):
    about = json.loads(Elements(export(made, ["html"], tmp_path, time=0.25)["html"].read_text()).scripts[0])
    assert about["clip"]["frames"] == 1


def test_gaussians_in_memory_have_a_page_without_a_story(tmp_path):
    about = json.loads(Elements(export(random_asset(50), ["html"], tmp_path)["html"].read_text()).scripts[0])
    assert "input" not in about and about["curve"] == [] and "Source camera" not in about["views"]


def test_damaged_reference_pictures_are_told(made, tmp_path):
    folder = tmp_path / "fox" / "recon" / "main"
    random_asset(20).save(folder / "gaussians.safetensors")
    (folder / "reference").mkdir()
    (folder / "reference" / reference.INDEX).write_text('{"input": {"columns": 1}}')
    with pytest.raises(InputError, match="damaged"):
        export(folder, ["html"], tmp_path / "out")


def test_view_writes_the_page_and_opens_it(made, tmp_path, monkeypatch):
    import webbrowser

    from d2.cli import view

    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    view.view(made, tmp_path, serve=False, port=None, open_page=True)
    view.view(tmp_path / "fox.html", None, serve=False, port=None, open_page=False)
    assert opened == [(tmp_path / "fox.html").as_uri()]


def test_modules_are_typed_as_their_comments_say():
    """Where TypeScript's compiler is at hand, as for `make test-browser`."""
    compiler = os.environ.get("D2_TSC")
    if not compiler:
        pytest.skip("D2_TSC does not name TypeScript's compiler")
    command = [compiler, "--noEmit", "--checkJs", "--allowJs", "--strict", "--target", "es2022", "--module", "es2022",
               "--lib", "es2022,dom,dom.iterable", *map(str, sorted(MODULES.glob("*.js")))]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
