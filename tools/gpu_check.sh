#!/usr/bin/env bash
# Run the checks that need a CUDA device, in two parts of less than ten minutes each. `tests`: the tests marked gpu, and the Triton kernels
# compared with PlainKernels. `windows`: training steps of windows of the shapes of 65B and 405B models with limits of device memory, compared
# with their matrix products alone.
# Usage: tools/gpu_check.sh [OUT] [tests|windows]      (OUT: folder for results, default benchmarks/results; both parts by default)
# PYTHON is an interpreter with torch for CUDA and transformers. If it lacks packages and there is no network, WHEELS is a folder that
# tools/gpu_wheels.sh filled; what PYTHON has is not replaced. An import error names any other package that is missing.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-benchmarks/results}
part=${2:-both}
mkdir -p "$out"
results=$out/window-gpu.json
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    for wheel in "$WHEELS"/*.whl; do "$python" -m zipfile --extract "$wheel" "$site/packages" || exit 69; done
    echo "import sys; sys.path.append('$site/packages')" > "$site/sitecustomize.py"  # behind the packages of PYTHON
    export PYTHONPATH=$site
fi
export PYTHONPATH=$PWD:${PYTHONPATH:-}
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.__version__, torch.cuda.get_device_name())' || exit 69

failed=0
if [ "$part" != windows ]; then  # named files only: other test files import packages that are not needed here
    timeout 420 "$python" -m pytest -q -m gpu tests/integration/test_gpu.py || failed=1
    timeout 120 "$python" -m pytest -q tests/unit/test_triton.py tests/unit/test_lora_triton.py || failed=1
fi
[ "$part" = tests ] && exit $failed

window() { timeout 80 "$python" benchmarks/bench_window.py "$@" --device cuda --results "$results" || failed=1; }
window 65b --batch 1 --seq-len 2048 --kernels plain --steps 3 --repeats 1
window 65b --batch 1 --seq-len 2048
window 65b --batch 4 --seq-len 2048
for cap in 24 12; do
    window 65b --batch 1 --seq-len 2048 --cap "$cap" --checkpointing
done
window 65b --batch 1 --seq-len 2048 --steps 1 --repeats 1 --cap 6 --checkpointing --offload "$(mktemp -u)"
window 405b --batch 1 --seq-len 2048 --steps 2 --repeats 1 --cap 60 --checkpointing
exit $failed
