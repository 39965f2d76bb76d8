"""Two machines: network namespaces that are joined by a cable, where this process may make them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.crash_injection import install_plugin

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "scripts" / "verify_machines.py"


def verify(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run the script on the points task."""
    install_plugin(folder)
    (folder / "points.yaml").write_text("task: points\nbatch-size: 50\n")
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments), str(folder / "points.yaml")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder),
            "PYTHONPATH": f"{folder / 'plugin'}:{TESTS}:{TESTS.parent}",
        },
    )


def may_make_machines() -> bool:
    name = f"nmt-probe-{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
    if made:
        entered = subprocess.run(
            ["ip", "netns", "exec", name, "unshare", "--uts", "true"], capture_output=True
        )
        subprocess.run(["ip", "netns", "del", name], check=True)
        made = entered.returncode == 0
    return made


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_machines_name_what_they_lose_and_end_like_one(tmp_path: Path) -> None:
    """Where the cable is cut; and where ranks are killed, torchrun goes on, and one machine ends alike."""
    if not may_make_machines():
        pytest.skip("network namespaces cannot be made here")
    result = verify(tmp_path, "--only", "cut,restarts", "--updates", 20)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["right"] * 3


def test_where_machines_cannot_be_made_a_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "ip").write_text(
        "#!/bin/sh\necho 'mount --make-shared /run/netns failed: Operation not permitted' >&2\nexit 1\n"
    )
    (tmp_path / "ip").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        result = verify(tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        "verify_machines: error: `ip` must be permitted to make machines, but says: mount --make-shared "
        "/run/netns failed: Operation not permitted. Run this as root, on Linux.\n"
    )
