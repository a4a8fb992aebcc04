"""Guards of the layout: what a wheel holds, what imports what, and that our folders shadow nobody's packages."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import clipmill
from clipmill.tools import cli

ROOT = Path(clipmill.__file__).resolve().parent
ROOMS = ("datasets", "pipeline", "models", "tools")
SOFT_LIMIT, HARD_LIMIT = 400, 500  # lines of a file
HEAVY = ("torch", "torchvision", "torchaudio")
DECODE_SIDE = (
    "draws",
    "order",
    "record",
    "shard",
    "storage",
    "shard_cache",
    "remote",
    "spec",
    "sound_spec",
    "views",
    "sound_views",
    "frame_views",
    "slot",
    "fill",
    "workers",
)

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree")


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def run(code: str, cwd: Path = ROOT, path: Path | None = None) -> str:
    """Run code in a new interpreter as someone who stands in ``cwd``; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": "" if path is None else str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- the wheel ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tree, so that the tree itself stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    files = [path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")]
    for name in (*ROOMS, "tests", *files):
        source, target = ROOT / name, folder / "tree" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder / "out")]
    try:
        local = int(metadata.version("setuptools").split(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        local = False
    if local:  # otherwise pip fetches the build requirements
        command.append("--no-build-isolation")
    done = subprocess.run([*command, str(folder / "tree")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "out").glob("clipmill-*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_clipmill_and_nothing_else(wheel: zipfile.ZipFile):
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"clipmill", f"clipmill-{clipmill.__version__}.dist-info"}
    inside = [Path(name) for name in names if name.startswith("clipmill/")]
    assert {path.parts[1] for path in inside if len(path.parts) > 2} == set(ROOMS)
    at_top = {path.name for path in inside if len(path.parts) == 2}
    assert at_top == {"__init__.py", "py.typed"}
    assert not [
        path for path in inside if {"tests", "build", ".typing"} & set(path.parts) or path.name == "conftest.py"
    ]


def test_the_wheel_holds_every_module(wheel: zipfile.ZipFile):
    packed = {name for name in wheel.namelist() if name.endswith(".py")}
    ours = {f"clipmill/{path.relative_to(ROOT).as_posix()}" for room in ROOMS for path in sources(room)}
    assert packed - {"clipmill/__init__.py"} == ours


def test_the_wheel_runs_by_itself(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.meta_path = [f for f in sys.meta_path if 'editable' not in "
        "str(f).lower()]\nimport clipmill, clipmill.datasets.source\nfrom clipmill.tools import cli\n"
        "print(clipmill.__file__); sys.exit(cli.main(['--version']))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "site/clipmill/__init__.py"), f"clipmill {clipmill.__version__}"]


def test_the_wheel_says_its_command_and_licence(wheel: zipfile.ZipFile):
    about = f"clipmill-{clipmill.__version__}.dist-info"
    assert "clipmill = clipmill.tools.cli:main" in wheel.read(f"{about}/entry_points.txt").decode()
    facts = wheel.read(f"{about}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in facts
    assert f"{about}/licenses/LICENSE" in wheel.namelist()


# --- folders and names --------------------------------------------------------------------------------------


def test_folders_that_share_a_name_with_packages_are_no_packages():
    assert not (ROOT / "datasets" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    with_code = {path.parent for room in ("pipeline", "models", "tools") for path in sources(room)}
    for folder in with_code:
        body = ast.parse((folder / "__init__.py").read_text("utf-8")).body
        assert len(body) == 1, f"{folder}/__init__.py must be a docstring and nothing else"
        assert ast.get_docstring(ast.Module(body=body, type_ignores=[]))


@pytest.mark.parametrize("cwd", [ROOT, ROOT / "tests"], ids=["root", "tests"])
def test_standing_here_another_datasets_package_wins(tmp_path: Path, cwd: Path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("who = 'somebody else'\n")
    code = "import datasets, clipmill.datasets.source as s; print(datasets.who, s.__name__)"
    assert run(code, cwd, tmp_path) == "somebody else clipmill.datasets.source"


def test_import_clipmill_is_cheap_and_its_names_load_on_use():
    assert run(f"import sys, clipmill; print([n for n in {(*HEAVY, 'numpy')} if n in sys.modules])") == "[]"
    assert (
        run("import clipmill; print(all(getattr(clipmill, name) is not None for name in clipmill.__all__))") == "True"
    )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        clipmill.nothing  # noqa: B018


def test_help_imports_no_torch():
    code = (
        "import sys, time; start_s = time.perf_counter()\nfrom clipmill.tools import cli\ncli.main(['--help'])\n"
        f"print(time.perf_counter() - start_s, [n for n in {HEAVY} if n in sys.modules])"
    )
    seconds, found = run(code).splitlines()[-1].split(" ", 1)
    print(f"clipmill --help: {float(seconds):.3f} s after the interpreter's start")
    assert found == "[]"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_its_module(name: str):
    module = f"clipmill.tools.{cli.COMMANDS[name][0]}"
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"`clipmill {name}` is in the table, but {module} does not exist"
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text("utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert {"Args", "main"} <= names


def test_files_are_small():
    lengths = {path: len(path.read_text("utf-8").splitlines()) for room in ROOMS for path in sources(room)}
    for path, lines in lengths.items():
        if lines > SOFT_LIMIT:
            print(f"{path.relative_to(ROOT)} has {lines} lines, more than {SOFT_LIMIT}")
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > HARD_LIMIT} == {}


# --- who imports whom ---------------------------------------------------------------------------------------


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Full names of what a file imports: ``a.b`` for ``import a.b``, ``a.b.c`` for ``from a.b import c``."""
    tree = ast.parse(path.read_text("utf-8"), str(path))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; always import clipmill.x.y"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def breaches(paths: list[Path], forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> set[tuple[str, str]]:
    """(file, import) pairs below ``forbidden`` that are not below ``allowed``."""

    def below(name: str, prefixes: tuple[str, ...]) -> bool:
        return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)

    return {
        (str(path.relative_to(ROOT)), name)
        for path in paths
        for name in imports(path)
        if below(name, forbidden) and not below(name, allowed)
    }


def test_the_checker_sees_every_form_of_import(tmp_path: Path):
    (tmp_path / "x.py").write_text(
        "import a.b\nfrom c import d as e\nif True:\n    import f\ndef g():\n    from h.i import j\n"
    )
    assert set(imports(tmp_path / "x.py")) == {"a.b", "c.d", "f", "h.i.j"}
    assert set(imports(tmp_path / "x.py", top_level_only=True)) == {"a.b", "c.d"}


def test_datasets_know_nothing_of_the_rest():
    forbidden = ("clipmill.pipeline", "clipmill.models", "clipmill.tools", "torch")
    assert breaches(sources("datasets"), forbidden) == set()


def test_the_pipeline_knows_no_tools_and_only_training_knows_what_a_method_is():
    assert breaches(sources("pipeline"), ("clipmill.tools",)) == set()
    trained = {name for _, name in breaches(sources("pipeline"), ("clipmill.models",), ("clipmill.models.method",))}
    assert trained == set()
    importers = {file for file, _ in breaches(sources("pipeline"), ("clipmill.models",))}
    assert importers <= {"pipeline/train.py", "pipeline/optim.py"}


def test_models_know_of_the_pipeline_only_what_they_declare():
    allowed = tuple(
        f"clipmill.pipeline.{name}"
        for name in (
            "views",
            "views_tuples",
            "sound_views",
            "frame_views",
            "spec",
            "sound_spec",
            "batch",
            "draws",
            "dist",
        )
    )
    forbidden = ("clipmill.pipeline", "clipmill.datasets", "clipmill.tools")
    assert breaches(sources("models"), forbidden, allowed) == set()


def test_everything_is_imported_by_its_full_name():
    files = [path for room in (*ROOMS, "tests") for path in sources(room)]
    assert breaches(files, ROOMS) == set()


def test_the_decode_side_imports_no_torch():
    names = [f"clipmill.pipeline.{name}" for name in DECODE_SIDE]
    names += ["clipmill.pipeline.decode.decoder", "clipmill.pipeline.decode.pyav"]
    code = f"import importlib, sys\nfor name in {names}:\n    importlib.import_module(name)\n"
    assert run(code + f"print([n for n in {HEAVY} if n in sys.modules])") == "[]"
    at_top = {(path.name, name) for path in sources("pipeline/decode") for name in imports(path, top_level_only=True)}
    assert {(file, name) for file, name in at_top if name.split(".")[0] in HEAVY} == set()
