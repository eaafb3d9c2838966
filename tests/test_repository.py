"""Properties of the sources as a whole: layers, imports, safety of loading, and what the files may say."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tgdp_fast"
# A source distribution has no links, and the kernels inside the package alone.
KERNELS = ROOT / "kernels" if (ROOT / "kernels").is_dir() else PACKAGE / "kernels"

# Modules and subpackages, from the lowest layer to the highest. Each may import what stands before it or,
# where that is narrower, the set named with it; never what stands after it.
LAYERS: dict[str, set[str] | None] = {
    "_version": set(),
    "runtime": {"_version"},
    "kernels": set(),
    "ops": {"runtime", "kernels"},
    "models": {"runtime", "ops"},
    "diffusion": {"runtime", "ops", "models"},
    "data": {"runtime", "ops", "models", "diffusion"},
    "metrics": {"runtime", "ops", "diffusion"},
    "sampling": {"runtime", "ops", "models", "diffusion"},
    "fit": None,
    "ecg": None,
    "integrations": None,
    "lab": None,
    "cli": None,
    "__main__": None,
    "_api": None,
    "__init__": None,
}

REQUIRED = {"torch", "numpy", "safetensors", "tqdm", "filelock"}
# Modules whose classes extend those of an optional package, so that they can only be imported with it.
EXTENSIONS = {"integrations.diffusers": "diffusers"}
OPTIONAL = {
    "matplotlib",
    "sklearn",
    "pytest_benchmark",
    "scipy",
    "wfdb",
    "pandas",
    "neurokit2",
    "diffusers",
    "huggingface_hub",
    "triton",
}


def python_files(*folders: str) -> list[Path]:
    """The kernels only where they are asked for, and once: through the link they would be seen again."""
    wanted: set[Path] = set()
    for folder in folders:
        if folder == "kernels":
            wanted.update(KERNELS.rglob("*.py"))
        else:
            wanted.update(p for p in (ROOT / folder).rglob("*.py") if not p.is_relative_to(PACKAGE / "kernels"))
    return sorted(wanted)


def module_name(path: Path) -> str:
    """Name inside the package: "ops.guided_step", "ops.__init__", "kernels.philox"."""
    base = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts)


def component(module: str) -> str:
    """First part of a module's name: the unit that has a layer."""
    return module.split(".")[0]


def imports(tree: ast.AST, module: str, *, only_at_import: bool = False) -> Iterator[str]:
    """Yield the dotted name of everything imported; names of the package itself start with "tgdp_fast".

    With ``only_at_import``, leave out imports inside functions, which run later or never.
    """
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if only_at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [node.module] if node.module else []
            if node.level:
                parts = ["tgdp_fast", *module.split(".")][: -node.level] + parts
            yield from (".".join([*parts, alias.name]) for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def layer_violations(source: str, module: str) -> list[str]:
    own = component(module)
    if own not in LAYERS:
        return [f"{module} belongs to no layer: give {own!r} its place in LAYERS"]
    order = list(LAYERS)
    allowed = LAYERS[own]
    if allowed is None:
        allowed = set(order[: order.index(own)])
    allowed = allowed | {own}
    wrong = []
    for name in imports(ast.parse(source), module):
        if name.split(".")[0] != "tgdp_fast":
            continue
        # A name that is no module comes from the package's __init__, the highest layer.
        target = (name.split(".") + ["__init__"])[1]
        target = target if target in LAYERS else "__init__"
        if target not in allowed:
            wrong.append(f"{module} imports {name}")
    return wrong


def unsafe_loading(source: str) -> list[str]:
    """Describe every way in which the source could execute a pickle."""
    names: dict[str, str] = {}  # name in this file -> what it stands for
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    unpicklers = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    found += [f"imports {name}" for name in names.values() if name.split(".")[0] in unpicklers]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = ast.unparse(node.func).partition(".")
        called = ".".join(filter(None, [names.get(first, first), rest]))
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in {"torch.load", "torch.serialization.load"} and options.get("weights_only") != "True":
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if options.get("allow_pickle", "False") != "False":
            found.append(f"line {node.lineno}: allow_pickle={options['allow_pickle']}")
        if called.split(".")[-1] in {"read_pickle", "hub_load"} or called.startswith("torch.hub."):
            found.append(f"line {node.lineno}: {called}")
    return found


def run_python(code: str) -> str:
    """Run the code in a new interpreter that finds the checkout first; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tests_are_collected_where_there_are_no_real_records(tmp_path: Path):
    """Users do not have them: what needs them skips itself when it runs."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "real_data(" in path.read_text()]
    assert files
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *map(str, files)]
    environment = {**os.environ, "TGDP_FAST_ECG": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# layers -----------------------------------------------------------------------------------------------------


def test_imports_point_to_earlier_layers_only():
    files = python_files("tgdp_fast", "kernels")
    assert PACKAGE / "runtime" / "checks.py" in files
    assert KERNELS / "launching.py" in files
    wrong = [problem for path in files for problem in layer_violations(path.read_text(), module_name(path))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "module", "problems"),
    [
        ("from tgdp_fast import sampling", "ops.guided_step", ["ops.guided_step imports tgdp_fast.sampling"]),
        ("import tgdp_fast.fit.model", "sampling.loop", ["sampling.loop imports tgdp_fast.fit.model"]),
        ("from ..diffusion import solvers", "ops.x", ["ops.x imports tgdp_fast.diffusion.solvers"]),
        ("from tgdp_fast import sample", "fit.model", ["fit.model imports tgdp_fast.sample"]),
        ("from .. import sample", "fit.model", ["fit.model imports tgdp_fast.sample"]),
        ("import tgdp_fast", "cli.main", ["cli.main imports tgdp_fast"]),
        ("def f():\n    from ..fit.model import x", "data.x", ["data.x imports tgdp_fast.fit.model.x"]),
        ("from tgdp_fast.diffusion.denoiser import x", "models.y", ["models.y imports tgdp_fast.diffusion.denoiser.x"]),
        ("from tgdp_fast.data import x", "metrics.y", ["metrics.y imports tgdp_fast.data.x"]),
        ("from tgdp_fast.runtime.arrays import x", "fit.training", []),
        ("from .guided_step import guided_step", "ops.__init__", []),
        ("from tgdp_fast.ops import guided_step", "ops.trajectory", []),
        ("from ..ops import guided_step\nimport torch", "sampling.loop", []),
        ("from .sampling.sampler import sample", "__init__", []),
        ("", "helpers", ["helpers belongs to no layer: give 'helpers' its place in LAYERS"]),
    ],
)
def test_the_layer_check_sees(source: str, module: str, problems: list[str]):
    assert layer_violations(source, module) == problems


# imports ----------------------------------------------------------------------------------------------------


def test_modules_need_only_required_packages_when_imported():
    known = REQUIRED | set(sys.stdlib_module_names) | {"tgdp_fast"}
    wrong = [
        f"{module_name(path)} imports {name}: do so inside the function that needs it"
        for path in python_files("tgdp_fast")
        for name in imports(ast.parse(path.read_text()), module_name(path), only_at_import=True)
        if name.split(".")[0] not in known | {p for m, p in EXTENSIONS.items() if module_name(path).startswith(m)}
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_can_be_imported_without_the_optional_packages():
    # Some are installed here, so they are hidden: to every finder they look absent.
    code = f"""
import importlib.util, pkgutil, sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {OPTIONAL!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in {OPTIONAL!r}:
    assert importlib.util.find_spec(name) is None, name
import tgdp_fast
for module in pkgutil.walk_packages(tgdp_fast.__path__, "tgdp_fast."):
    package = {EXTENSIONS!r}.get(module.name.removeprefix("tgdp_fast."))
    if package is not None:
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            assert f"pip install {{package}}" in str(error), error
        else:
            raise AssertionError(module.name)
    # Running __main__ starts the command line.
    elif not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
"""
    names = run_python(code).split()
    assert "tgdp_fast.runtime.checks" in names
    assert "tgdp_fast.ops.guided_step" in names


def test_importing_the_package_is_quick_and_brings_no_optional_package():
    code = """
import sys, time
import torch
before = set(sys.modules)
start = time.process_time()  # Not the time of day: others may use the processor.
import tgdp_fast
tgdp_fast.sample
print(time.process_time() - start)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    for _ in range(3):  # The first may compile to bytecode.
        seconds, names = run_python(code).splitlines()
        assert "tgdp_fast" in names.split()
        assert sorted(OPTIONAL & set(names.split())) == []
        if float(seconds) < 1.0:
            break
    assert float(seconds) < 1.0


def test_modules_and_names_load_when_they_are_used():
    code = """
import sys
import tgdp_fast
assert "torch" not in sys.modules
assert tgdp_fast.ops.guided_step  # A module that imports others from the package, before any name of it.
assert tgdp_fast.sample is tgdp_fast.sampling.sampler.sample
assert not hasattr(tgdp_fast, "sampel")
from tgdp_fast import *
assert set(tgdp_fast.__all__) <= set(globals()) & set(dir(tgdp_fast))
"""
    run_python(code)


def test_kernels_folder_is_importable_inside_the_package():
    link = PACKAGE / "kernels"
    assert link.is_symlink() == (link != KERNELS)
    assert not link.is_symlink() or os.readlink(link) == "../kernels"
    (location,) = importlib.import_module("tgdp_fast.kernels").__path__
    assert Path(location).resolve() == KERNELS
    assert not (KERNELS / "__init__.py").exists()


def test_the_folder_of_kernels_hides_no_package_of_that_name(tmp_path: Path):
    # As Hugging Face's, wherever it comes on the path.
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("name = 'theirs'\n")
    code = "import kernels, tgdp_fast.kernels; print(kernels.name, *tgdp_fast.kernels.__path__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,  # "python -c" looks here first
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
    )
    assert done.returncode == 0, done.stderr
    name, location = done.stdout.split()
    assert name == "theirs"
    assert Path(location).resolve() == KERNELS


def copied_package(folder: Path) -> None:
    """The package in ``folder``, with a text file for the link, as git makes where there are no symbolic links."""
    shutil.copytree(PACKAGE, folder / "tgdp_fast", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    (folder / "tgdp_fast" / "kernels").write_text("../kernels")


def test_without_symbolic_links_everything_but_triton_runs(tmp_path: Path):
    copied_package(tmp_path)
    code = f"""
import tgdp_fast
from tgdp_fast.ops import SolverStep, backend_report, guided_step
import torch
assert tgdp_fast.__file__.startswith({str(tmp_path)!r})
assert torch.isfinite(guided_step(torch.ones(2, 3), torch.ones(2, 3), step=SolverStep([[1.0, 0.5]])).x_next).all()
print({{states["triton"] for name, states in backend_report().items() if name == "guided_step"}})
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "git config core.symlinks true" in done.stdout


@pytest.mark.slow(ci=True)
@pytest.mark.parametrize("form", ["build_sdist", "build_wheel", "build_editable"])
def test_every_distribution_brings_the_kernels(form: str, tmp_path: Path):
    if not (ROOT / "setup.py").exists():
        pytest.skip("no source distribution")
    names = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"]
    source = tmp_path / "source"
    source.mkdir()
    for name in [*names, "mkdocs.yml"]:
        shutil.copy(ROOT / name, source)
    for name in ("tgdp_fast", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    environment = {**os.environ, "TGDP_BUILD_CPU": "0", "TGDP_BUILD_CUDA": "0", "TGDP_REQUIRE_CPU": "0"}
    built = tmp_path / "built"
    built.mkdir()
    code = f"import setuptools.build_meta as build; build.{form}({str(built)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = built.iterdir()
    shutil.unpack_archive(archive, built / "content", "gztar" if form == "build_sdist" else "zip")
    packages = built / "content"
    if form == "build_sdist":
        (packages,) = packages.iterdir()
        assert not (packages / "kernels").exists()
    place = source if form == "build_editable" else packages
    # Without the packages of this environment, one of which may be this one.
    code = f"import site; site.addsitedir({str(packages)!r}); import tgdp_fast.kernels as k; print(*k.__path__)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=built)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == place / "tgdp_fast" / "kernels"
    found = (place / "tgdp_fast" / "kernels").glob("*.py")
    assert {path.name for path in found} == {path.name for path in KERNELS.glob("*.py")}


def test_version_is_the_one_in_the_version_file():
    version = importlib.import_module("tgdp_fast").__version__
    assert f'__version__ = "{version}"' in (PACKAGE / "_version.py").read_text()


def test_command_line_entry_point_exists():
    text = (ROOT / "pyproject.toml").read_text()
    match = re.search(r'^tgdp-fast = "([\w.]+):(\w+)"$', text, re.MULTILINE)
    assert match
    assert callable(getattr(importlib.import_module(match[1]), match[2]))


def test_the_tests_that_ci_names_exist():
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("a source distribution does not have it")
    named = re.findall(r"\btests/[\w/]+\.py", script.read_text())
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]


# project files ----------------------------------------------------------------------------------------------


def project_file(name: str) -> str:
    if not (ROOT / name).exists():
        pytest.skip("a source distribution does not have it")
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_names_this_version():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; it comes with mkdocs")
    citation = yaml.safe_load(project_file("CITATION.cff"))
    assert citation["version"] == importlib.import_module("tgdp_fast").__version__
    assert citation["cff-version"] == "1.2.0"
    (paper,) = citation["references"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    readme = project_file("README.md")
    for part in (f"author = {{{authors}}}", f"title = {{{paper['title']}}}", f"year = {{{paper['year']}}}"):
        assert part in readme


def test_commits_are_checked_with_the_ruff_of_the_tests():
    wanted = re.search(r"^ruff==(\S+)$", project_file(".ci/constraints.txt"), re.MULTILINE)
    assert wanted
    assert set(re.findall(r"ruff==([\d.]+)", project_file(".pre-commit-config.yaml"))) == {wanted[1]}


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_images_are_made_of_what_there_is(name: str):
    text = re.sub(r"\\\n\s*", "", project_file(name))
    copied = [path for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for path in line.split()]
    assert {"pyproject.toml", "setup.py", "tgdp_fast", "kernels", "csrc"} <= set(copied)
    assert not [path for path in copied if not (ROOT / path).exists()]
    # What the build reads of pyproject.toml is there.
    project = project_file("pyproject.toml")
    named = re.findall(r'^(?:readme = |license-files = \[)"(.*?)"', project, re.MULTILINE)
    assert len(named) == 2
    assert set(named) <= set(copied)
    (extras,) = re.findall(r"'\.\[(.*?)\]'", text)
    assert not [extra for extra in extras.split(",") if f"\n{extra} = [" not in project]
    (command,) = re.findall(r'^ENTRYPOINT \["(.*)"\]$', text, re.MULTILINE)
    assert f"\n{command} = " in project
    setup = project_file("setup.py")
    for kind in re.findall(r"TGDP_REQUIRE_(\w+)=1", text):
        assert f"TGDP_REQUIRE_{kind}" in setup
    (torch_needed,) = re.findall(r'ARG TORCH_SPEC="(.*)"', text)
    assert f'"{torch_needed}"' in project


# loading ----------------------------------------------------------------------------------------------------


def test_no_pickle_is_ever_executed():
    wrong = [
        f"{path.relative_to(ROOT)}: {problem}"
        for path in python_files("tgdp_fast", "kernels", "bench", "examples", "docs")
        for problem in unsafe_loading(path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import joblib as j",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=trusted)",
        "from torch import load as read\nread(path)",
        "from torch import serialization\nserialization.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "from numpy import load\nload(path, allow_pickle=trusted)",
        "import pandas as pd\npd.read_pickle(path)",
        "import torch\ntorch.hub.load(where, what)",
    ],
)
def test_the_pickle_check_sees(source: str):
    assert unsafe_loading(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, allow_pickle=False)\nnp.load(path)",
        "import json\njson.load(file)",
        "from safetensors.torch import load_file\nload_file(path)",
    ],
)
def test_the_pickle_check_lets_pass(source: str):
    assert not unsafe_loading(source)


# texts ------------------------------------------------------------------------------------------------------

UNFINISHED = re.compile(r"\b(?:TO(?:DO)|FIX(?:ME)|XX(?:X))\b")
ABSOLUTE_PATH = re.compile(r"(?<![\w.~}])/(?:work|tmp|home|root|opt|mnt|Users|private)/")
ADDRESS = re.compile(r"https?:/(?:/)([\w.-]+)")
# Where publications, data sets and source code are found. Packages are named without saying where they come
# from.
# The package is on no index: whoever took its name there would be installed.
INSTALLED_BY_NAME = re.compile(r"install\b[^\n`;]*[ '\"]tgdp[_-]fast(?:\[|[ '\"`]|$)", re.MULTILINE)
HOSTS = {"arxiv.org", "doi.org", "github.com", "openreview.net", "physionet.org", "proceedings.neurips.cc"}


def text_files() -> list[Path]:
    """Files of the checkout that git knows or would add."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    suffixes = {".py", ".md", ".toml", ".txt", ".in", ".cpp", ".h", ".cu", ".cuh", ".yml", ".yaml", ""}
    paths = [ROOT / name for name in names if name and Path(name).suffix in suffixes]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def text_problems(text: str) -> list[str]:
    found = [match[0] for match in UNFINISHED.finditer(text)]
    found += [match[0] for match in ABSOLUTE_PATH.finditer(text)]
    found += [match[0] for match in ADDRESS.finditer(text) if match[1] not in HOSTS]
    return found + [match[0] for match in INSTALLED_BY_NAME.finditer(text)]


def test_texts_have_no_unfinished_parts_local_paths_or_unknown_addresses():
    files = text_files()
    assert Path(__file__).resolve() in files
    wrong = [f"{path.relative_to(ROOT)}: {problem}" for path in files for problem in text_problems(path.read_text())]
    assert not wrong, "\n".join(wrong)


def test_the_text_check_sees():
    slash = "/"
    assert text_problems("# TO" + "DO: later, FIX" + "ME") == ["TO" + "DO", "FIX" + "ME"]
    assert text_problems(f"open('{slash}tmp/x') {slash}home/me") == ["/tmp" + slash, "/home" + slash]
    assert text_problems(f"https:{slash}/index.example.org/x") == [f"https:{slash}/index.example.org"]
    by_name = "pip install --upgrade 'tgdp_" + "fast[ecg]'"
    assert text_problems(f"run {by_name}")
    assert text_problems("run `pip install tgdp-" + "fast`")
    assert not text_problems("pip install ./tgdp_fast-0.1-cp310-abi3-linux_x86_64.whl; pip install wfdb")
    assert not text_problems("#!/usr/bin/env bash, /proc/cpuinfo, build/tmp/x, $HOME/work/x, https://arxiv.org/abs/x")
