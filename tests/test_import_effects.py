"""To import the package is to change nothing of the process but what `docs/architecture.md` lists."""

import json
import subprocess
import sys
from pathlib import Path

# They must be set before torch reads them; what the user has set stays.
LISTED = {
    "environment THP_MEM_ALLOC_ENABLE",
    "environment TORCH_CPP_LOG_LEVEL",
    *(
        f"environment {prefix}{name}"
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
        for prefix in ("", "NMT_")
    ),
}

CODE = """
import importlib, inspect, json, os, pkgutil, sys, types, warnings
import torch, torch.nn.parallel, torch.utils.data

def attributes(cls):
    "Yield those of a class, and those of its functions: torch keeps notes there."
    for name, value in vars(cls).items():
        value = getattr(value, "__func__", value)
        yield name, value
        while isinstance(value, types.FunctionType):
            yield from ((f"{name}.{key}", inner) for key, inner in vars(value).items())
            value = vars(value).get("__wrapped__")

classes = {
    cls
    for name, module in list(sys.modules.items())
    if name.split(".")[0] == "torch"
    for cls in vars(module).values()
    if inspect.isclass(cls) and cls.__module__.split(".")[0] == "torch"
}

def snapshot():
    state = {f"environment {name}": value for name, value in os.environ.items()}
    state |= {f"warnings {filter}": True for filter in warnings.filters}
    state["threads"] = torch.get_num_threads(), torch.get_num_interop_threads(), sys.getswitchinterval()
    state["defaults"] = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    for cls in classes:
        for name, value in attributes(cls):
            if not name.startswith("_abc_"):
                state[f"{cls.__module__}.{cls.__qualname__}.{name}"] = id(value)
    return state

before = snapshot()
exec(sys.argv[1])
after = snapshot()
names = before.keys() | after.keys()
print(json.dumps(sorted(name for name in names if before.get(name) != after.get(name))))
"""

IMPORT_ALL = """
import nmt
for found in pkgutil.walk_packages(nmt.__path__, "nmt."):
    importlib.import_module(found.name)
assert "nmt.cli.train" in sys.modules and "nmt.vision.task" in sys.modules
"""


def changes(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", CODE, code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_to_import_any_module_changes_nothing_but_what_is_listed() -> None:
    assert changes(IMPORT_ALL) <= LISTED


def test_what_changes_would_be_seen() -> None:
    code = (
        "os.environ['A'] = 'b'; warnings.simplefilter('ignore'); sys.setswitchinterval(1.0)\n"
        "torch.optim.Optimizer.zero_grad.note = 1; torch.nn.Linear.extra = 2"
    )
    found = changes(code)
    assert {name.split(" ")[0] for name in found} == {
        "environment",
        "warnings",
        "threads",
        "torch.optim.optimizer.Optimizer.zero_grad.note",
        "torch.nn.modules.linear.Linear.extra",
    }


def test_an_optimizer_is_built_without_the_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from support.toy_task import PointTask\n"
        "from nmt.distributed import single\n"
        "from nmt.options import OptimizationOptions\n"
        "from nmt.trainer import Trainer\n"
        "task = PointTask()\n"
        "trainer = Trainer(task, task.build_model(), OptimizationOptions(), world=single(torch.device('cpu')),\n"
        "                  seed=1, updates_per_epoch=1)\n"
        "trainer.optimizer.zero_grad(); trainer.optimizer.state_dict()\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    tests = Path(__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=tests, check=False).returncode == 0
