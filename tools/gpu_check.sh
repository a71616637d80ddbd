#!/usr/bin/env bash
# What only a GPU can show, in one command of about ten minutes: the tests marked gpu, the Triton kernels against the plain passes, and
# windows of 65B and 405B shape under caps of memory, with their share of the limit of matrix products.
# Usage: tools/gpu_check.sh [OUT]      (OUT: folder for results; default benchmarks/results)
# PYTHON is an interpreter with torch for CUDA. Where it lacks packages and the machine has no network, WHEELS is a folder that was filled with
#   pip download --dest WHEELS --no-deps zarr numcodecs google-crc32c donfig typing-extensions compressed-tensors safetensors accelerate \
#       transformers tokenizers huggingface-hub psutil filelock typer rich hypothesis pytest
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-benchmarks/results}
mkdir -p "$out"
results=$out/window-gpu.json
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$site
fi
export PYTHONPATH=$PWD:${PYTHONPATH:-}
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.__version__, torch.cuda.get_device_name())' || exit 69

failed=0
timeout 240 "$python" -m pytest -q -m gpu tests || failed=1
timeout 60 "$python" -m pytest -q tests/unit/test_triton.py || failed=1

window() { timeout 90 "$python" benchmarks/bench_window.py "$@" --device cuda --results "$results" || echo "failed or did not fit: $*"; }
window 65b --batch 1 --seq-len 2048 --kernels plain --steps 3 --repeats 1
window 65b --batch 1 --seq-len 2048
window 65b --batch 4 --seq-len 2048
for cap in 24 12 8; do
    window 65b --batch 1 --seq-len 2048 --cap "$cap" --recompute
done
window 405b --batch 1 --seq-len 2048 --steps 2 --repeats 1
window 405b --batch 1 --seq-len 2048 --steps 2 --repeats 1 --cap 24 --recompute
window 405b --batch 1 --seq-len 2048 --steps 1 --repeats 1 --cap 16 --recompute --offload "$(mktemp -u)"
exit $failed
