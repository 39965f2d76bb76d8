#!/usr/bin/env bash
# Runs the tests in .venv, which is made where it is missing.
#
#   scripts/test.sh [--fast] [arguments of pytest]      --fast leaves out the tests marked slow
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment test

chosen="not gpu"
if "$BIN/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    chosen="gpu or not gpu"
fi
if [ "${1:-}" = --fast ]; then
    shift
    chosen="not slow and not gpu"
fi
# Two processes with a thread each: threads of one test would only wait for those of another. Files go out in the order of
# tests/conftest.py, in which the longest come first; xdist would begin with those that have the most tests.
export OMP_NUM_THREADS=1
say "tests: $chosen"
exec "$BIN/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 -m "$chosen" "$@"
