#!/usr/bin/env python3
"""Continue a prompt with the model in a folder, with transformers alone.

Usage: generate.py FOLDER PROMPT [--dequantize]

--dequantize is needed for weights with zero points, which transformers 5.24 does not load without it.
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["--dequantize"]):
        sys.exit(__doc__)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, prompt = sys.argv[1:3]
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if sys.argv[3:] else {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(generated[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
