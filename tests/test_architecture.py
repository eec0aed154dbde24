"""The rules of the house, read from the syntax trees: who imports whom, how long things are, who writes files."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"d2": "d2", "recon": "d2.recon", "cli": "d2.cli", "configs": "d2.configs"}
SOURCES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
CODE = sorted([*SOURCES, *(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))])
MAX_FILE, MAX_FUNCTION = 400, 80  # lines

# Modules of d2, lowest first. A module imports from lower layers, or from its own where the layer is a package.
LAYERS = [
    ["errors"],
    ["fileio"],
    ["config", "destination", "images", "camera", "machine", "noise", "schedule", "models", "toyrender", "video"],
    ["matrix", "preprocess", "previews", "inputs", "shard", "denoiser", "toys", "asset", "stage"],
    ["run", "compose", "pair"],
    ["sampler"],
    ["toybox"],
    ["cells", "settings", "snapshot", "ranks", "adapters"],
    ["phases", "sequences", "launch", "origin"],
    ["publish", "budget"],
    ["generation", "train"],
    ["sweep"],
]
LAYER_OF = {name: depth for depth, names in enumerate(LAYERS) for name in names}

# Calls that put something on disk, by the last part of their name; fileio.py holds all of them.
WRITERS = {
    "write_text", "write_bytes", "unlink", "rename", "rmdir", "rmtree", "touch", "mkdir", "makedirs", "replace_file",
    "copyfile", "copytree", "symlink_to", "hardlink_to", "savez", "savez_compressed", "savetxt", "tofile", "save_file",
    "imwrite", "mimwrite", "mimsave", "mkstemp", "NamedTemporaryFile", "truncate",
}  # fmt: skip
# Names that also mean harmless things elsewhere (str.replace, BytesIO saves): forbidden on these modules only.
MODULE_WRITERS = {
    ("os", "replace"), ("os", "rename"), ("os", "remove"), ("os", "unlink"), ("os", "open"), ("os", "link"),
    ("os", "symlink"), ("os", "mkdir"), ("shutil", "copy"), ("shutil", "copy2"), ("shutil", "move"),
    ("np", "save"), ("numpy", "save"), ("torch", "save"),
}  # fmt: skip
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml"}


def name_of(path: Path) -> str:
    """The import name of a source file."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *rest]).removesuffix(".__init__")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(path: Path) -> set[str]:
    """Every module a file imports anywhere in it; `from d2 import fileio` counts as d2.fileio."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package.split(".")[: -node.level or None][: None if node.level else 0], node.module or ""]
            )
            base = base.strip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def calls_of(tree: ast.AST) -> list[tuple[str, str, ast.Call]]:
    """(what it is called on, its name, the call) of every call."""
    calls = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute):
                calls.append((ast.unparse(function.value), function.attr, node))
            elif isinstance(function, ast.Name):
                calls.append(("", function.id, node))
    return calls


def layer_faults(module: str, imported: set[str]) -> list[str]:
    """Imports of a d2 module that do not go down the table."""
    own = module.split(".")[1]
    faults = []
    for target in sorted(imported):
        if target.split(".")[0] != "d2" or target == "d2.__version__":
            continue
        name = target.split(".")[1]
        if name in ("recon", "cli"):
            faults.append(f"{module} imports {target}")
        elif name != "configs" and name != own and LAYER_OF[name] >= LAYER_OF[own]:
            faults.append(f"{module} imports {target}, which is not below it")
    return faults


def writes_of(tree: ast.AST) -> list[str]:
    """Calls in a tree that write files other than through d2.fileio."""
    found = []
    for owner, name, call in calls_of(tree):
        if owner.split(".")[-1] == "fileio":
            continue
        opened = name == "open" and (owner in ("", "io", "gzip", "zipfile") or owner.startswith("Path"))
        modes = [a.value for a in [*call.args, *(k.value for k in call.keywords)] if isinstance(a, ast.Constant)]
        writing = opened and any(
            isinstance(m, str) and re.fullmatch(r"[rwaxbt+]+", m) and set(m) & set("wax+") for m in modes
        )
        to_memory = any("buffer" in ast.unparse(argument) for argument in call.args)
        by_path = name == "save" and ("image" in owner.lower() or (owner, name) in MODULE_WRITERS) and not to_memory
        if writing or by_path or name in WRITERS or (name != "save" and (owner, name) in MODULE_WRITERS):
            found.append(f"line {call.lineno}: {ast.unparse(call)[:80]}")
    return found


def test_every_module_of_d2_has_its_place_in_the_table():
    modules = {name_of(path).split(".")[1] for path in (ROOT / "d2").rglob("*.py") if name_of(path) != "d2"}
    assert modules <= LAYER_OF.keys(), "add it to LAYERS"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "d2")], ids=name_of)
def test_d2_imports_only_from_lower_layers(path):
    if name_of(path) == "d2":
        assert not {i for i in imports_of(path) if i.startswith(("d2.recon", "d2.cli"))}
    else:
        assert layer_faults(name_of(path), imports_of(path)) == []


def test_table_refuses_edges_up_sideways_and_into_other_packages():
    assert layer_faults("d2.fileio", {"d2.errors.InputError", "os"}) == []
    assert layer_faults("d2.fileio", {"d2.run"}) and layer_faults("d2.images", {"d2.camera"})
    assert layer_faults("d2.generate", {"d2.recon.train"}) and layer_faults("d2.run", {"d2.cli"})


def test_only_the_command_line_imports_d2_cli():
    guilty = [name_of(p) for p in SOURCES if not p.is_relative_to(ROOT / "cli") for i in imports_of(p) if "d2.cli" in i]
    assert guilty == []


def test_recon_modules_do_not_import_each_other_in_a_circle():
    """Read from top-level imports; those inside functions are the documented way to start lazily."""
    modules = {name_of(p): p for p in SOURCES if p.is_relative_to(ROOT / "recon")}
    imported = {n: {i for node in tree_of(p).body for i in _top_imports(node)} for n, p in modules.items()}
    edges = {name: (imported[name] & modules.keys()) - {name} for name in modules}
    done: set[str] = set()
    while ready := {name for name in edges.keys() - done if edges[name] <= done}:
        done |= ready
    assert edges.keys() - done == set()


def _top_imports(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def test_folders_of_packages_are_never_imported_by_their_bare_name():
    """`import recon` works by accident from the repository's root and creates a second copy of the module."""
    banned = {"recon", "cli", "configs"}
    guilty = []
    for path in CODE:
        for node in ast.walk(tree_of(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            guilty += [f"{path}: {name}" for name in names if name.split(".")[0] in banned]
    assert guilty == []


def test_files_and_functions_are_short():
    for path in CODE:
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= MAX_FILE, f"{path}: {lines} lines, at most {MAX_FILE}"
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= MAX_FUNCTION, f"{path}: {node.name} has {length} lines, at most {MAX_FUNCTION}"


def test_no_module_is_called_after_nothing():
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    assert [path for path in CODE if path.stem in vague or path.parent.name in vague] == []


def test_every_public_module_says_in_one_sentence_what_it_is():
    for path in SOURCES:
        if path.stem.startswith("_") and path.name != "__init__.py":
            continue
        first = (ast.get_docstring(tree_of(path)) or "").split("\n")[0]
        assert re.search(r"\w.*\.( .*\.)?$", first), f"{path}: first docstring line {first!r} is not a sentence"


def test_nothing_runs_or_unpickles_what_a_file_says():
    for path in CODE:
        tree, is_test = tree_of(path), path.is_relative_to(ROOT / "tests")
        for owner, name, call in calls_of(tree):
            where = f"{path}:{call.lineno}"
            assert owner or name not in BANNED_CALLS or is_test, where
            assert (owner, name) not in {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load")}, where
            allowed = [k for k in call.keywords if k.arg == "allow_pickle"]
            assert all(isinstance(k.value, ast.Constant) and k.value.value is False for k in allowed), where
        imported = {name.split(".")[0] for name in imports_of(path)} if path in SOURCES else set()
        assert not imported & BANNED_MODULES, path


def test_no_program_is_started_through_a_shell():
    started = 0
    for path in CODE:
        for owner, name, call in calls_of(tree_of(path)):
            where = f"{path}:{call.lineno}"
            assert (owner, name) not in {("os", "system"), ("os", "popen"), ("subprocess", "getoutput")}, where
            assert not name.startswith("create_subprocess_shell"), where
            if owner == "subprocess":
                started += 1
                assert not any(keyword.arg == "shell" for keyword in call.keywords), where
                assert not (call.args and isinstance(call.args[0], ast.Constant | ast.JoinedStr)), f"{where}: one text"
    assert started > 10


@pytest.mark.parametrize("path", [p for p in SOURCES if p != ROOT / "d2" / "fileio.py"], ids=name_of)
def test_only_fileio_writes_files(path):
    assert writes_of(tree_of(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "open(path, 'w')", "open(path, mode='ab')", "Path(p).open('x')", "path.write_text(t)", "p.write_bytes(b)",
        "np.save(path, a)", "image.save('x.png')", "Image.fromarray(a).save(path)", "shutil.copy(a, b)",
        "shutil.move(a, b)", "os.replace(a, b)", "path.unlink()", "torch.save(x, p)", "path.mkdir()",
    ],
)  # fmt: skip
def test_search_for_writers_finds(line):
    assert writes_of(ast.parse(line))


@pytest.mark.parametrize(
    "line",
    [
        "open(path)",
        "open(path, 'rb')",
        "text.replace('a', 'w')",
        "image.save(buffer, 'PNG')",
        "fileio.remove(p)",
        "torch.save(x, buffer)",
    ],
)
def test_search_for_writers_passes(line):
    assert not writes_of(ast.parse(line))


def test_tracked_files_name_no_place_of_this_machine_and_no_registry():
    """Absolute paths work on one machine only; package hosts are the business of each user's own tools."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files are the project's")
    hosts = [
        "pypi" + ".org",
        "files.python" + "hosted",
        "registry.npm" + "js",
        "pypi.python" + ".org",
        "conda.ana" + "conda",
    ]
    banned = re.compile("|".join([r"(?<![\w.~}])/(?:work|root|home/\w+)/", *map(re.escape, hosts)]))
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in {".png", ".jpg", ".glb", ".mp4"} or not path.is_file():
            continue
        match = banned.search(path.read_text(encoding="utf-8", errors="replace"))
        assert match is None, f"{name}: {match and match.group()!r}"
