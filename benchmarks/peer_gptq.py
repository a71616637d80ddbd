#!/usr/bin/env python3
"""Quantize with the GPTQ of llm-compressor, on the calibration tokens and with the evaluation of compare.py.

Usage: peer_gptq.py MODEL TOKENS.npy TEXT ... --bits 3 --group-size 64 [--asymmetric] [--act-bits 8]

It runs in a virtual environment with llmcompressor. It prints one line of JSON (peer.py). The perplexity is that of the quantized model
that llm-compressor leaves in memory, computed in float32.
"""

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from peer import arguments, load, report


def main() -> None:
    args = arguments(__doc__).parse_args()
    model, tokenizer, tokens = load(args)
    grouped = args.group_size > 0
    weights = QuantizationArgs(
        num_bits=args.bits,
        symmetric=not args.asymmetric,
        strategy="group" if grouped else "channel",
        group_size=args.group_size if grouped else None,
    )
    activations = None
    if args.act_bits < 16:
        activations = QuantizationArgs(num_bits=args.act_bits, symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    rows = tokens.tolist()
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(rows),
        max_seq_length=tokens.shape[1],
    )
    report(model, tokenizer, args.texts)


if __name__ == "__main__":
    main()
