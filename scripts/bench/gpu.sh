#!/usr/bin/env bash
# Tests and measures everything that needs a GPU, on a machine with one, in some five minutes.
#
#   scripts/bench/gpu.sh [tests] [train] [decode]      all three if none is named
#
# PYTHON is the interpreter whose torch sees the GPU (python3). Nothing is installed: what nmt needs must be there, and
# transformers for the comparison; the package itself is found in this checkout.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
export PYTHONPATH="$PWD:$SCRATCH${PYTHONPATH:+:$PYTHONPATH}"
started=$(date +%s)
say() { echo "== $(($(date +%s) - started)) s: $*"; }

# The version and the tasks are looked up as those of an installed package.
"$PYTHON" - "$SCRATCH" <<'PY'
import sys, tomllib
from importlib import metadata
from pathlib import Path

try:
    metadata.version("nmt-toolkit")
except metadata.PackageNotFoundError:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    folder = Path(sys.argv[1]) / f"nmt_toolkit-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nmt-toolkit\nVersion: {project['version']}\n")
    points = "".join(f"{name} = {value}\n" for name, value in project["entry-points"]["nmt.tasks"].items())
    (folder / "entry_points.txt").write_text(f"[nmt.tasks]\n{points}")
PY

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$PYTHON" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)'
wanted=" ${*:-tests train decode} "
if [[ $wanted == *" tests "* ]]; then
    say "tests"
    "$PYTHON" -m pytest -q --tb=short -m gpu -p no:cacheprovider tests 2>&1 | grep -E "^(FAILED|ERROR|E  )|passed|failed" | cut -c1-300
    "$PYTHON" -m pytest -q --tb=short -m "not gpu" -p no:cacheprovider tests/test_{packed,norm,linear}_kernels.py \
        tests/test_loss_kernel.py tests/test_packed_layers.py 2>&1 |
        grep -E "^(FAILED|ERROR|E  )|passed|failed" | cut -c1-300
fi
if [[ $wanted == *" train "* ]]; then
    say "training"
    "$PYTHON" scripts/bench/gpu_train.py --sizes base --precision bf16 fp16 fp32 --without-layer-kernels --peer huggingface
    "$PYTHON" scripts/bench/gpu_train.py --sizes tiny --precision bf16 fp32 --updates 300
    "$PYTHON" scripts/bench/gpu_train.py --sizes big --precision bf16 --updates 30
    "$PYTHON" scripts/bench/gpu_train.py --sizes base big --precision bf16 --updates 40 --compile
fi
if [[ $wanted == *" decode "* ]]; then
    say "decoding"
    "$PYTHON" scripts/bench/gpu_decode.py --peer huggingface
fi
say "done"
