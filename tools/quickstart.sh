#!/usr/bin/env bash
# Quantize the real SmolLM2-135M to 4 bits on the CPU, measure it before and after, and let plain transformers write with it.
# Usage: tools/quickstart.sh [OUT]      (default: build/smollm2-135m-w4)
# Run it again after an interruption: it goes on where it was.
. "$(dirname "$0")/setup.sh" eval,report
out=${1:-build/smollm2-135m-w4}
mkdir -p "$(dirname "$out")"
data=benchmarks/data

echo "--- perplexity of the original, WikiText-2 test"
"$venv/bin/cbqstream" eval "$model" --text "$data/wikitext2-test.txt" --num-samples 32

echo "--- quantizing to W4A16, group size 64"
"$venv/bin/cbqstream" quantize "$model" "$out" --scheme W4A16 --group-size 64 \
    --dataset "$data/c4-calibration.jsonl" --num-samples 32 --seq-len 512 --profile fast

echo "--- perplexity of the quantized model, same text"
"$venv/bin/cbqstream" eval "$out" --text "$data/wikitext2-test.txt" --num-samples 32

echo "--- a sentence from the quantized model, with plain transformers"
"$venv/bin/python" tools/generate.py "$out" "The three primary colors are"

echo "--- a page to look at"
rm -rf "$out.report"
"$venv/bin/cbqstream" report "$out.run" --out "$out.report"

echo "--- where everything is"
echo "original:       $model"
echo "quantized:      $out  (AutoModelForCausalLM.from_pretrained(\"$out\"))"
echo "report:         $out.report/report.html"
echo "run directory:  $out.run  (cbqstream status $out.run; it can be deleted)"
