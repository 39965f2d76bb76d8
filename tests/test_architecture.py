"""The shape of the package: imports run downward and in no cycle, and torch comes only where it must."""

import ast
import dataclasses
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
import typing
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import nmt
from nmt.config.fields import list_options
from nmt.options import TrainConfig
from nmt.task import ENTRY_POINT_GROUP, load_task

PACKAGE = Path(nmt.__file__).parent
TESTS = Path(__file__).parent
PYPROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))

# A room may be imported by the lines below its own. A module that is in no room fails the test: whoever adds one
# decides where it stands. `options` modules are ground: all may import them.
ROOMS = [
    ["nmt.errors"],
    ["nmt.system", "nmt.config", "nmt.models.architectures"],  # the last: presets of nmt.models.options
    ["nmt.distributed"],
    ["nmt.task"],
    ["nmt.task_extras", "nmt.options"],
    ["nmt.data", "nmt.models"],
    ["nmt.generation"],
    ["nmt.checkpoints"],
    ["nmt.update"],
    ["nmt.trainer"],
    ["nmt.run"],
    ["nmt.train_loop"],
    ["nmt.translation"],
    ["nmt.interop"],
    ["nmt.vision"],
    ["nmt.cli"],
    ["nmt.python_api"],
    ["nmt"],
]
LAYERS = {room: layer for layer, line in enumerate(ROOMS) for room in line}

# The options of a task or a model make it when `build` is called. The import for the type that `build` returns
# goes with it; it is never run. All other imports count, those in functions and under TYPE_CHECKING too.
BUILDS = (
    {("nmt.models.options", "nmt.models.transformer")}
    | {
        ("nmt.translation.options", target)
        for target in (
            "nmt.translation.task",
            "nmt.translation.loss",
            "nmt.translation.assets",
            "nmt.data.data_directory",
        )
    }
    | {("nmt.vision.options", target) for target in ("nmt.vision.task", "nmt.vision.libraries")}
)

# The modules of nmt.data that handle tensors; the others must serve preprocessing without torch.
DATA_WITH_TENSORS = {
    "nmt.data.packing",
    "nmt.data.parallel_dataset",
    "nmt.data.batch_iterator",
    "nmt.data.batch_loader",
    "nmt.data.ordered_batches",
}


class Import(NamedTuple):
    """That one module of the package imports another, and where."""

    source: str
    target: str
    function: str  # "" at the level of the module
    line: int

    def __str__(self) -> str:
        return f"{self.source} (line {self.line}) imports {self.target}"


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _room(module: str) -> str:
    """Return the room that a module belongs to: the longest prefix of its name that is one."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next(prefix for prefix in prefixes if prefix in LAYERS and (prefix != "nmt" or module == "nmt"))


def _is_upward(imported: "Import") -> bool:
    """Whether a module imports what stands above it, or beside it in another room."""
    source, target = imported.source, imported.target
    if target.endswith(".options"):
        return False
    room = "nmt.data" if source.endswith(".options") else _room(source)  # they know what a task is
    return _room(target) != room and LAYERS[_room(target)] >= LAYERS[room]


def _imports_of(module: str, source: str) -> list[Import]:
    """List what a module imports of the package, in functions and under conditions too."""
    found: list[Import] = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} (line {node.lineno}): imports must be absolute"
            base = node.module or ""
            within = [f"{base}.{alias.name}" for alias in node.names]
            # The version is a constant of the package, which every import of a module runs anyway.
            targets = sorted(
                {name if name in MODULES else base for name in within if name != "nmt.__version__"}
            )
        else:
            targets = []
        for target in targets:
            if target.split(".")[0] == "nmt":
                found.append(Import(module, target, function, node.lineno))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def _is_exempt(imported: Import) -> bool:
    if imported.source == "nmt":
        return imported.function != ""  # the lazy public API
    return (imported.source, imported.target) in BUILDS and imported.function in ("build", "")


def _all_imports() -> list[Import]:
    imports = [
        imported
        for module, path in MODULES.items()
        for imported in _imports_of(module, path.read_text(encoding="utf-8"))
    ]
    return [imported for imported in imports if not _is_exempt(imported)]


def _is_under(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_every_module_has_a_layer() -> None:
    unknown = []
    for module in MODULES:
        try:
            _room(module)
        except StopIteration:
            unknown.append(module)
    assert not unknown, f"add these to ROOMS: {unknown}"


def test_imports_run_downward() -> None:
    upward = [str(item) for item in _all_imports() if _is_upward(item)]
    assert not upward, "\n".join(upward)


def test_no_room_but_its_own_and_the_exporters_name_the_transformer() -> None:
    naming = {item.source for item in _all_imports() if item.target == "nmt.models.transformer"}
    assert {name for name in naming if not _is_under(name, "nmt.models")} == {"nmt.interop.ctranslate2"}


def test_operators_without_a_public_name_are_called_in_one_place() -> None:
    calling = re.compile(r"torch\.ops\.(mkldnn|onednn)|torch\.backends\.mkldnn")
    assert [name for name, path in MODULES.items() if calling.search(path.read_text("utf-8"))] == [
        "nmt.system.onednn"
    ]


def test_there_is_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for item in _all_imports():
        graph[item.source].add(item.target)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_imports_in_functions_and_under_conditions_count() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from nmt import errors\n"
        "class A:\n    def build(self):\n        import nmt.config.mapping\n"
    )
    assert _imports_of("nmt.x", source) == [
        Import("nmt.x", "nmt.errors", "", 3),
        Import("nmt.x", "nmt.config.mapping", "build", 6),
    ]


def test_packages_hold_a_docstring_only() -> None:
    for module, path in MODULES.items():
        if path.name == "__init__.py" and module != "nmt":
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{path} must hold a docstring only"


def _torch_after(code: str) -> str:
    """Run Python code in a fresh process and return which of its lines imported torch ("" for none)."""
    probe = f"import sys\n{code}\nsys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr


def test_options_and_preprocessing_import_no_torch() -> None:
    light = [
        module
        for module in MODULES
        if module in ("nmt", "nmt.config.mapping", "nmt.task", "nmt.cli.preprocess")
        or module.endswith(".options")
        or (_is_under(module, "nmt.data") and module not in DATA_WITH_TENSORS)
    ]
    code = "\n".join(
        f"import {module}\nif 'torch' in sys.modules: sys.exit('{module} imports torch')" for module in light
    )
    assert _torch_after(code) == ""


def test_to_translate_loads_nothing_that_scores() -> None:
    code = "import sys, nmt.translation.translator\nsys.exit('sacrebleu' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", sorted(PYPROJECT["project"]["scripts"]))
def test_help_imports_no_torch(command: str) -> None:
    module, function = PYPROJECT["project"]["scripts"][command].split(":")
    code = (
        f"import {module}\n"
        f"try:\n    {module}.{function}(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "else:\n    raise AssertionError('--help must end the command')"
    )
    assert _torch_after(code) == ""


def _option_types() -> list[Any]:
    """List every nest of options: those of training for each task, and each dataclass of options."""
    tasks = sorted(entry_points(group=ENTRY_POINT_GROUP).names)
    types: list[Any] = [TrainConfig[load_task(name)] for name in tasks]  # type: ignore[misc]
    for module in MODULES:
        if module.endswith(".options") or _is_under(module, "nmt.cli"):
            classes = inspect.getmembers(importlib.import_module(module), inspect.isclass)
            own = [cls for _, cls in classes if cls.__module__ == module and dataclasses.is_dataclass(cls)]
            types += [cls for cls in own if not getattr(cls, "__parameters__", ())]
    return types


@pytest.mark.parametrize("type_", _option_types(), ids=lambda type_: str(getattr(type_, "__name__", type_)))
def test_field_names_are_unique_and_every_option_has_a_help_text(type_: Any) -> None:
    options = list_options(type_)  # asserts that the names are unique
    cls = typing.get_origin(type_) or type_
    (tree,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    documented = {
        field.target.id
        for field, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    own = {option.name for option in options if not option.owner}
    assert own <= documented, f"{cls.__name__}: no help text under {sorted(own - documented)}"


def test_files_that_the_documents_name_are_there() -> None:
    root = PACKAGE.parent
    documents = [root / "README.md", *root.glob("docs/*.md"), *root.glob("examples/*/*.md")]
    path = re.compile(r"\b(?:nmt|scripts|tests|docs|examples)/[\w/.-]+\.(?:py|md|sh|yaml|toml)\b")
    named = {(file.name, name) for file in documents for name in path.findall(file.read_text("utf-8"))}
    assert ("README.md", "docs/training.md") in named
    assert [pair for pair in named if not (root / pair[1]).exists()] == []


def test_no_test_imports_another() -> None:
    """Whoever changes a test changes that test alone; also in programs that tests write into strings."""
    importing = re.compile(r"^\s*(?:from|import)\s+(?:\w+,\s*)*(?:test_\w+|conftest)\b", re.MULTILINE)
    assert [str(path) for path in TESTS.rglob("*.py") if importing.search(path.read_text("utf-8"))] == []


def test_what_tests_share_stands_in_one_folder() -> None:
    assert [path.name for path in TESTS.glob("*.py") if not path.name.startswith("test_")] == ["conftest.py"]
