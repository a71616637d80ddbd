#!/usr/bin/env bash
# Quantize SmolLM2-135M to 4 bits on the CPU, measure its perplexity before and after, and generate text with plain transformers.
# Usage: tools/quickstart.sh [OUT]      (default: build/smollm2-135m-w4)
# Run the script again after an interruption: it resumes.
. "$(dirname "$0")/setup.sh" eval,report
out=${1:-build/smollm2-135m-w4}
mkdir -p "$(dirname "$out")"
data=benchmarks/data

echo "--- perplexity of the original model on WikiText-2 test"
"$venv/bin/cbqstream" eval "$model" --text "$data/wikitext2-test.txt" --num-samples 32

echo "--- quantizing to W4A16, group size 64"
"$venv/bin/cbqstream" quantize "$model" "$out" --scheme W4A16 --group-size 64 \
    --dataset "$data/c4-calibration.jsonl" --num-samples 32 --seq-len 512 --profile fast

echo "--- perplexity of the quantized model on the same text"
"$venv/bin/cbqstream" eval "$out" --text "$data/wikitext2-test.txt" --num-samples 32

echo "--- text generated with the quantized model by plain transformers"
"$venv/bin/python" tools/generate.py "$out" "The three primary colors are"

echo "--- report"
rm -rf "$out.report"
"$venv/bin/cbqstream" report "$out.run" --out "$out.report"

echo "--- files"
echo "original model:   $model"
echo "quantized model:  $out  (load: AutoModelForCausalLM.from_pretrained(\"$out\"))"
echo "report:           $out.report/report.html"
echo "run directory:    $out.run  (show: cbqstream status $out.run; it can be deleted)"
