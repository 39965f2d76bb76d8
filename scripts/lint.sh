#!/usr/bin/env bash
# Format, lint and types, in .venv, which is made where it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment dev

say "ruff format"
"$BIN/ruff" format --check .
say "ruff check"
"$BIN/ruff" check .
say "mypy"
"$BIN/mypy"
