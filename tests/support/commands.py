"""The commands as a user starts them: in processes of their own, by their entry points."""

import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(command: str, *arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / command, *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=500,
    )


def succeed(command: str, *arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    result = run(command, *arguments, text=text)
    assert result.returncode == 0, result.stderr
    return result
