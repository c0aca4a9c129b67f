#!/bin/sh
# Makes the virtual environment named by $1 from pyproject.toml and constraints.txt, and compiles
# DeepSpeed's CPU communication op into it, so that no later command waits for a compiler.
# A missing system package is named in one sentence.
set -eu
venv=$1
python=${PYTHON:-python3}

fail() { echo "setup: $*" >&2; exit 9; }

command -v "$python" >/dev/null 2>&1 || fail "Python is missing: install Python 3.11 or newer (Debian: apt-get install python3 python3-venv python3-dev)."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$("$python" --version) is too old: install Python 3.11 or newer, or name one with make PYTHON=/path/to/python3.11."
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "Python's venv module is missing: install it (Debian: apt-get install python3-venv)."
command -v g++ >/dev/null 2>&1 || fail "The C++ compiler g++ is missing, and DeepSpeed needs it on a CPU: install it (Debian: apt-get install g++)."
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || fail "Python's C headers are missing, and DeepSpeed needs them on a CPU: install them (Debian: apt-get install python3-dev)."

[ -x "$venv/bin/python" ] || { echo "setup: making $venv"; "$python" -m venv "$venv"; }
echo "setup: installing packages (the first time takes a few minutes)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' 2>"$venv/pip.log" \
  || { cat "$venv/pip.log" >&2; fail "pip could not install the packages; its own message is above."; }

TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$(cd "$venv" && pwd)/torch_extensions}
export TORCH_EXTENSIONS_DIR
echo "setup: compiling DeepSpeed's CPU communication op"
"$venv/bin/python" -c 'from train_stage.deepspeed_process import load_communication_op, prepare_environment; prepare_environment(); load_communication_op()' >"$venv/op.log" 2>&1 \
  || { cat "$venv/op.log" >&2; fail "the op did not compile; the compiler's message is above."; }
echo "setup: ready"
