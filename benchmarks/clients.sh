#!/usr/bin/env bash
# Run results in other programs: transformers generates text with four of them, llama.cpp runs the GGUF export of one, and auto-round unpacks
# the gptq and awq exports, which are compared with the dense export.
# Usage: benchmarks/clients.sh MODEL WORK AUTOROUND_PYTHON
# MODEL is the folder that tools/get_smollm2.py writes. AUTOROUND_PYTHON is the interpreter of an environment with auto-round. The environment
# of this project needs xllamacpp. Run the script again after an interruption: it resumes.
set -euo pipefail
cd "$(dirname "$0")"
model=$1 work=$2 autoround=$3
prompt="The three primary colors are"
mkdir -p "$work"

quantize() {
    python -m cbqstream quantize "$model" "$work/$1" --dataset data/c4-calibration.jsonl --num-samples 16 --seq-len 256 \
        --profile fast --group-size 64 --threads 1 "${@:2}" > "$work/$1.log"
}

quantize w4 --scheme W4A16
quantize w4-asymmetric --scheme W4A16 --no-symmetric
quantize w2 --scheme W2A16
quantize w4a8 --scheme W4A8
for name in w4 w4a8 w2; do
    echo "transformers, $name: $(python ../tools/generate.py "$work/$name" "$prompt")"
done
echo "transformers, w4-asymmetric: $(python ../tools/generate.py "$work/w4-asymmetric" "$prompt" --dequantize)"

for pair in w4:gptq w4:gptq_v2 w4:awq w4-asymmetric:awq; do
    name=${pair%:*} format=${pair#*:}
    for each in "$format" dense; do
        [ -e "$work/$name-$each" ] || python -m cbqstream export "$work/$name" "$work/$name-$each" --format "$each" > "$work/export.log"
    done
    "$autoround" peer_unpack.py "$work/$name-$format" "$work/$name-dense"
done

python clients.py "$model" "$work/w4" "$work/w4-gguf"
