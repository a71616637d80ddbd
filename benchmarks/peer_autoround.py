#!/usr/bin/env python3
"""Quantize with auto-round, on the calibration tokens and with the evaluation of compare.py.

Usage: peer_autoround.py MODEL TOKENS.npy TEXT ... --bits 2 --group-size 64 [--asymmetric] [--act-bits 8] --iters 200 [--alg-ext]

It runs in a virtual environment with auto-round. It prints one line of JSON (peer.py). The perplexity is that of the quantized model that
auto-round leaves in memory, computed in float32.
"""

import torch
from auto_round import AutoRound
from peer import arguments, load, report


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--iters", type=int, required=True, help="training steps per block")
    parser.add_argument("--batch-size", type=int, default=4, help="segments in a training step")
    parser.add_argument("--alg-ext", action="store_true", help="set enable_alg_ext")
    args = parser.parse_args()
    model, tokenizer, tokens = load(args)
    quantizer = AutoRound(
        model,
        tokenizer,
        bits=args.bits,
        group_size=args.group_size,
        sym=not args.asymmetric,
        act_bits=args.act_bits,
        act_group_size=-1,
        act_sym=True,
        act_dynamic=True,
        iters=args.iters,
        batch_size=args.batch_size,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens],
        amp=False,
        device_map="cpu",
        enable_torch_compile=False,
        enable_alg_ext=args.alg_ext,
        seed=0,
    )
    quantized, _ = quantizer.quantize()
    report(quantized.float().eval(), tokenizer, args.texts)


if __name__ == "__main__":
    main()
