"""Every notebook is stored without output, opens on Colab, and runs as a whole in any directory.

It runs on what a wheel holds, so that `pip install` and the notebook are enough.
"""

import ast
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STRIP = "pip install nbconvert && jupyter nbconvert --clear-output --inplace notebooks/*.ipynb"
COLAB = re.compile(
    r"https://colab\.research\.google\.com/github/(?P<repository>[^/]+/[^/]+)/blob/main/(?P<path>.+)\)"
)
REPOSITORY = re.compile(r"github(?:\.com)?/([\w.-]+/\w+)")
GUARD = 'if importlib.util.find_spec("moe_erc") is None:'


def each(*, slow=lambda path: False):
    marks = [pytest.mark.slow if slow(path) else () for path in NOTEBOOKS]
    parameters = [
        pytest.param(path, id=path.name, marks=mark)
        for path, mark in zip(NOTEBOOKS, marks, strict=True)
    ]
    return pytest.mark.parametrize("path", parameters)


def read(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@each()
def test_a_notebook_is_valid_and_stripped(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5), (
        "older notebooks have no cell ids"
    )
    dirty = [
        cell.id for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None
    ]
    assert not dirty, f"{path.name} holds the output of {', '.join(dirty)}; strip it: {STRIP}"


@each()
def test_a_notebook_begins_with_its_question_and_a_badge(path):
    title, *rest = read(path).cells[0].source.splitlines()
    assert title.startswith("# ") and title.endswith("?"), title
    (badge,) = [line for line in rest if line.startswith("[![Open In Colab](")]
    opened = COLAB.fullmatch(badge.rpartition("](")[2])
    assert opened and (ROOT / opened["path"]).samefile(path), f"the badge opens {badge}"
    # The badge opens the repository that is installed. All notebooks and pages name the same one,
    # whoever owns it.
    assert {opened["repository"]} == repositories(), f"{opened['repository']} and {repositories()}"


def repositories():
    """OWNER/NAME of every mention of this project on GitHub, in notebooks and pages."""
    pages = [*NOTEBOOKS, ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = (REPOSITORY.findall(page.read_text(encoding="utf-8")) for page in pages)
    return {name for names in found for name in names if name.endswith("/moe_erc")}


@each()
def test_a_notebook_asks_for_a_gpu_and_for_no_more_than_python(path):
    metadata = read(path).metadata
    assert metadata.accelerator == "GPU" and metadata.colab.gpuType
    assert metadata.kernelspec.name == "python3"


@each()
def test_a_notebook_installs_where_nothing_is_installed_and_nowhere_else(path):
    first, *others = code_cells(read(path))
    before, guard, guarded = first.source.partition(GUARD)
    assert guard and '%pip install -q "moe_erc[notebook] @ git+' in guarded, (
        f"the first code cell of {path.name} does not install under {GUARD}"
    )
    assert all(not line or line.startswith("    ") for line in guarded.splitlines()[1:]), (
        "a line outside the guard"
    )
    assert "jax" not in "".join(line for line in guarded.splitlines() if "%pip" in line), (
        "Colab has a jax that works"
    )
    for source in (before, *(cell.source for cell in others)):
        assert not any(line.lstrip().startswith(("%", "!")) for line in source.splitlines()), source


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A directory with the modules and the metadata of a wheel of this checkout."""
    directory = str(tmp_path_factory.mktemp("wheel"))
    metadata = ("egg_info", "--egg-base", directory)
    modules = ("build_py", "--build-lib", directory)
    command = [sys.executable, "setup.py", "-q", *metadata, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return pathlib.Path(directory)


def test_a_wheel_trains_without_a_clone_and_installs_one_name(wheel):
    assert {path.name for path in wheel.iterdir()} == {"moe_erc", "moe_erc.egg-info"}
    scripts = wheel / "moe_erc" / "scripts"
    held = {path.relative_to(scripts): path.read_bytes() for path in scripts.rglob("*.py")}
    sources = [ROOT / "train.py", ROOT / "eval.py", *(ROOT / "configs").rglob("*.py")]
    assert held == {path.relative_to(ROOT): path.read_bytes() for path in sources}


@each()
def test_a_notebook_imports_what_the_extra_notebook_declares(path, wheel):
    (distribution,) = importlib.metadata.distributions(path=[str(wheel)])
    requirements = map(Requirement, distribution.requires)
    declared = {
        requirement.name.lower().replace("-", "_")
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": "notebook"})
    }
    # Each package is imported by the name under which it is installed, but for case.
    foreign = {name.lower() for name in imported(path)} - sys.stdlib_module_names - {"moe_erc"}
    assert foreign <= declared, f"setup.py: the extra notebook lacks {foreign - declared}"


def imported(path):
    """The first parts of the names of all modules that a notebook imports."""
    source = "\n".join(cell.source for cell in code_cells(read(path)))
    for node in ast.walk(ast.parse(re.sub("%pip.*", "pass", source))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


@pytest.fixture(scope="module")
def environment(text_directory, tmp_path_factory, wheel):
    """The environment of a kernel that trains for seconds at most.

    Models are small, texts are short, and programs are compiled once, quickly.
    """
    flags = (
        f"--config.data.sources=('{text_directory}',)",
        "--config.data.validation_fraction=0.1",
        "--config.train.steps=6",
        "--config.eval.every=3",
        "--config.eval.report_windows=4",
        "--config.eval.prompt=",
        "--config.log.tensorboard=False",
    )
    return dict(os.environ) | {
        "MOE_ERC_NOTEBOOK_SIZE": "debug",
        "MOE_ERC_NOTEBOOK_FLAGS": " ".join(flags),
        "MOE_ERC_NOTEBOOK_CHECKPOINT": str(ROOT / "tests" / "hf" / "families" / "olmoe"),
        "MOE_ERC_CACHE": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        # Without this, a script restarts itself and imports everything twice: test_huge_pages.py.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "PYTHONPATH": str(wheel),
        # This excludes the user's start-up files and history.
        "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython")),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }


def execute(notebook, directory, environment):
    """Runs a notebook in a kernel of this interpreter, whatever kernels are installed.

    It fails where a cell fails.
    """
    manager = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(notebook, km=manager, timeout=300, allow_errors=False)
    client.owns_km = True  # the kernel must not outlive the test
    return client.execute(cwd=str(directory), env=environment)


@each(slow=lambda path: "train.py" in path.read_text(encoding="utf-8"))
def test_a_notebook_runs(path, tmp_path, environment):
    notebook = read(path)
    assert not any("raises-exception" in cell.metadata.get("tags", ()) for cell in notebook.cells)
    execute(notebook, tmp_path, environment)
    assert all(cell.execution_count for cell in code_cells(notebook) if cell.source)


def test_the_kernel_is_this_interpreter_on_the_wheel_and_an_error_is_one(
    tmp_path, environment, wheel
):
    what = """
import os, sys, moe_erc
from moe_erc.launch.config_file import PROJECT
print(sys.executable, moe_erc.__file__, PROJECT, os.getcwd(), sep="\\n")
"""
    cells = [
        nbformat.v4.new_code_cell(source) for source in (what, "assert 0, 'a cell that fails'", "1")
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(CellExecutionError, match="a cell that fails"):
        execute(notebook, tmp_path, environment)
    printed = "".join(output.text for output in notebook.cells[0].outputs).split("\n")
    package = wheel / "moe_erc"
    paths = [package / "__init__.py", package / "scripts", tmp_path]
    assert printed[:4] == [sys.executable, *map(str, paths)]
    assert not notebook.cells[2].execution_count
