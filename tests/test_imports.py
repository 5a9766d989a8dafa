"""What is imported when: nothing heavy before it is needed, nothing optional before it is asked for, rooms in order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nestling
import stock

ROOT = Path(__file__).parent.parent
TINY = stock.TINY
HEAVY = {"torch", "transformers"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("imports") / "model"
    stock.save(TINY, directory)
    return directory


def python(code: str, *arguments: object) -> str:
    """The standard output of a fresh interpreter."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def packages_after(code: str, *arguments: object) -> set[str]:
    """The top-level packages that a fresh interpreter has imported after running this code."""
    listed = f"{code}\nimport sys\nprint()\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(python(listed, *arguments).splitlines()[-1].split())


COMMAND = """
import sys
from nestling import cli
sys.argv[0] = "nestling"
try:
    cli.main()
except SystemExit as ended:
    assert ended.code == 0, ended.code
"""


def test_the_package_itself_imports_nothing_to_speak_of() -> None:
    after = packages_after("import nestling; nestling.NestlingError, nestling.__version__")
    assert "nestling" in after
    assert not after & (HEAVY | {"numpy", "pydantic", "typer", "rich", "tokenizers", "safetensors"})


def test_values_and_slicing_need_no_torch() -> None:
    code = "import nestling; nestling.Submodel(hidden_size=8), nestling.Architecture('M'), nestling.slice"
    assert not packages_after(code) & HEAVY


def test_the_command_line_its_help_and_a_plan_need_no_torch() -> None:
    assert not packages_after("import nestling.cli") & HEAVY
    for arguments in (
        ["--help"],
        ["run", "--help"],
        ["plan", "nemotron-nano-12b-v2"],
        ["plan", "nemotron-h-8b", "--json"],
        ["plan", "--paper"],
    ):
        after = packages_after(COMMAND, *arguments)
        assert "typer" in after
        assert not after & HEAVY, arguments


def test_planning_slicing_and_verifying_a_checkpoint_need_no_torch(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "size.json").write_text('{"hidden_size": 8}')
    out = tmp_path / "out"
    slicing = ["slice", checkpoint, "--submodel", tmp_path / "size.json", "--out", out]
    for arguments in (["plan", checkpoint], slicing, ["verify", out, "--inside", checkpoint]):
        assert not packages_after(COMMAND, *arguments) & HEAVY, arguments
    assert "rich" not in packages_after(COMMAND, *slicing[:-1], tmp_path / "quickly")  # 40 ms, for what nobody reads
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 8


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_short_commands_import_numpy_without_threads_and_leave_no_trace_of_it() -> None:
    code = """
import os
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.pop(name, None)
{}
from nestling.cli.quick import start_sooner
start_sooner()
import sys
print(len(os.listdir("/proc/self/task")), os.environ.get("OPENBLAS_NUM_THREADS"), "numpy" in sys.modules)
"""
    assert python(code.format("")) == "1 None True\n"
    assert python(code.format("os.environ['OPENBLAS_NUM_THREADS'] = '1'")) == "1 1 True\n"


def test_generation_imports_torch_and_not_transformers(checkpoint: Path) -> None:
    """The other way round: this way of looking sees torch where there is some."""
    after = packages_after("import sys, nestling; nestling.load(sys.argv[1])", checkpoint)
    assert "torch" in after
    assert "transformers" not in after


def test_every_module_imports_without_the_extras() -> None:
    """With the dependencies alone: no transformers, no reasoning-gym, no jinja2, no development tools."""
    code = """
import importlib, pkgutil, sys
extras = ("transformers", "reasoning_gym", "jinja2", "lm_eval", "math_verify", "datasets", "tensorboard")
for extra in (*extras, "hypothesis", "pytest"):
    sys.modules[extra] = None
import nestling
for module in pkgutil.walk_packages(nestling.__path__, "nestling."):
    if module.name != "nestling.__main__":
        importlib.import_module(module.name)
        print(module.name)
"""
    imported = python(code).split()
    assert {"nestling.cli", "nestling.pipeline", "nestling.evaluate.story", "nestling.train.loop"} <= set(imported)
    assert len(imported) > 35


def test_a_missing_extra_is_named() -> None:
    code = """
import sys
for extra in ("transformers", "reasoning_gym", "jinja2"):
    sys.modules[extra] = None
import nestling
from nestling.evaluate import accuracy, report
from nestling.tasks import Task, problems
for call in (
    lambda: accuracy.stock("x", 1), lambda: next(problems(Task("chain_sum"), 0, held_out=True)), report.templates
):
    try:
        call()
    except nestling.NestlingError as error:
        print(error)
"""
    said = python(code).splitlines()
    assert [line.split("pip install ")[1] for line in said] == [
        "'nestling[hf]'",
        "'nestling[demo]'",
        "'nestling[demo]'",
    ]


def test_the_public_names_are_there_and_no_others() -> None:
    assert all(getattr(nestling, name) is not None for name in nestling.__all__)
    assert {"load", "slice", "Submodel", "Architecture", "Family", "NestlingError"} == set(nestling.__all__)
    with pytest.raises(AttributeError, match="module 'nestling' has no attribute 'slices'"):
        nestling.slices  # noqa: B018


def test_each_room_imports_only_the_rooms_below_it() -> None:
    pytest.importorskip("importlinter")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    report = python(code)
    assert "Contracts: 2 kept, 0 broken." in report
