"""Large tensors of a search go back to the system when they are freed."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_translation_model import write_tiny_model

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc 2.33 or newer"
)

# Freeing 30 MB would raise glibc's limit to as much, and 20 MB would come from the heap then.
PROGRAM = """
import ctypes, sys
import torch
from nmt.system.allocator import give_back_tensors

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

def bytes_with_pages_of_their_own():
    function = ctypes.CDLL(None).mallinfo2
    function.restype = Info
    return function().hblkhd

if sys.argv[1] == "set":
    for limit in sys.argv[2:]:
        print(give_back_tensors(above=int(limit) * 2**20))
elif sys.argv[1] == "load":
    from nmt import Translator
    Translator.load(sys.argv[2])
before = torch.zeros(30 * 2**20, dtype=torch.uint8)
del before
start = bytes_with_pages_of_their_own()
large = torch.zeros(20 * 2**20, dtype=torch.uint8)
print((bytes_with_pages_of_their_own() - start) // 2**20)
start = bytes_with_pages_of_their_own()
small = torch.zeros(2**20, dtype=torch.uint8)
print((bytes_with_pages_of_their_own() - start) // 2**20)
"""


def run(*arguments: str, **environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    inherited.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_without_the_setting_a_large_tensor_lies_in_the_heap() -> None:
    """Else the tests below could not fail."""
    assert run("leave") == ["0", "0"]


def test_a_large_tensor_has_pages_of_its_own_and_a_small_one_has_not() -> None:
    said, large, small = run("set", "4")
    assert said == "True"
    assert 20 <= int(large) <= 23  # PyTorch asks for up to 2 MB more to begin at a huge page
    assert small == "0"


def test_of_several_limits_the_highest_holds() -> None:
    *_, large, _ = run("set", "26", "4")
    assert large == "0"


def test_a_translator_sets_it(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    *_, large, _ = run("load", str(tmp_path / "model"))
    assert 20 <= int(large) <= 23


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_has_set_stands(name: str) -> None:
    value = {"MALLOC_TRIM_THRESHOLD_": "1000000", "GLIBC_TUNABLES": "glibc.malloc.perturb=0"}[name]
    assert run("set", "4", **{name: value})[0] == "False"
