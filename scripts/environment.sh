# Sourced by the other scripts: makes .venv where it is missing and installs the package into it.
#
#   source scripts/environment.sh
#   make_environment EXTRA...      # EXTRA: extras of pyproject.toml, such as test
#
# $BIN is the folder of the environment's commands. A second run finds everything in place and does nothing.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN="$ROOT/.venv/bin"

say() { echo "== $*"; }
fail() { echo "error: $*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer must be installed, but none was found. Install one, or name it with PYTHON=..."
}

# torch first and on its own, because of where it comes from: a plain install on Linux brings several GB of CUDA
# libraries, which only a machine with an NVIDIA driver wants.
install_torch() {
    local pin installed
    pin=$(grep '^torch==' "$ROOT/constraints.txt")
    installed=$("$BIN/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)
    if [ "torch==${installed%%+*}" = "$pin" ]; then # 2.13.0+cpu is 2.13.0
        return
    fi
    if command -v nvidia-smi >/dev/null 2>&1 || [ "$(uname)" = Darwin ]; then
        say "installing $pin"
        "$BIN/pip" install --quiet "$pin"
    elif "$BIN/pip" install --quiet --no-index --no-deps "$pin" 2>/dev/null; then
        say "installed $pin from local files"
    elif say "installing $pin for the CPU" &&
        "$BIN/pip" install --quiet --index-url https://download.pytorch.org/whl/cpu "$pin"; then
        :
    else
        say "PyTorch's CPU index is out of reach: installing $pin from the default index (several GB)"
        "$BIN/pip" install --quiet "$pin"
    fi
}

# The same for torchvision, which the extras `vision` and `test` need: the default index has the build for CUDA. That
# one works beside a torch for the CPU too (nmt/vision/libraries.py), so that it may come from there
# where PyTorch's index is out of reach.
install_torchvision() {
    local pin
    pin=$(grep '^torchvision==' "$ROOT/constraints.txt")
    if "$BIN/python" -c 'import importlib.metadata as m, sys; sys.exit("+cpu" not in m.version("torch"))' &&
        ! "$BIN/python" -c 'import importlib.metadata as m; m.version("torchvision")' 2>/dev/null; then
        say "installing $pin for the CPU"
        "$BIN/pip" install --quiet --no-deps --retries 0 --index-url https://download.pytorch.org/whl/cpu "$pin" \
            2>/dev/null || say "PyTorch's CPU index is out of reach: $pin comes from the default index"
    fi
}

make_environment() {
    local extras stamp wanted
    extras=$(IFS=,; echo "$*")
    stamp="$ROOT/.venv/.installed-${extras//,/-}"
    wanted=$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)
    if [ -x "$BIN/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$ROOT $wanted" ]; then
        return
    fi
    if ! "$BIN/python" -c 'import pip' 2>/dev/null; then
        local python
        python=$(find_python) || exit 1
        say "making .venv with $("$python" --version)"
        "$python" -m venv "$ROOT/.venv"
    fi
    install_torch
    case ",$extras," in *,vision,* | *,test,*) install_torchvision ;; esac
    say "installing the package${extras:+ with [$extras]}"
    "$BIN/pip" install --quiet -c "$ROOT/constraints.txt" -e "$ROOT${extras:+[$extras]}"
    echo "$ROOT $wanted" >"$stamp"
}
