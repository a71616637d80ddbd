#!/usr/bin/env bash
# Run what needs a CUDA device, in parts of less than six minutes each. 1: kernels, tiny runs, products, windows of 65B shape, and the CPU
# beside them. 2: a run of a window of 65B shape, a run that is killed, limits of device memory, and the tests of the part `tests`, which are
# those with the marker gpu.
# Usage: tools/gpu_check.sh [OUT] [1|2|both|tests]      (OUT: folder for results, default benchmarks/results; parts 1 and 2 by default)
# PYTHON is an interpreter with torch for CUDA and transformers. If it lacks packages and there is no network, WHEELS is a folder that
# tools/gpu_wheels.sh filled; what PYTHON has is not replaced. Results are in OUT/gpu-1.json and OUT/gpu-2.json, see tools/gpu_probe.py.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-benchmarks/results}
part=${2:-both}
first=env,ceilings,kernels,tiny,products,window,host
second=env,ceilings,run,kill,cap,tests
failed=0

probe() { # PART STAGES; the probe ends by itself 20 seconds after its deadline
    "$python" -W default tools/gpu_probe.py --deadline 325 --out "$out/gpu-$1.json" --stages "$2" ${WHEELS:+--wheels "$WHEELS"} || failed=$?
    [ $failed -ne 69 ] || exit 69
}

case $part in 1 | both) probe 1 $first ;; esac
case $part in 2 | both) probe 2 $second ;; esac
case $part in tests) probe tests tests ;; esac
exit $failed
