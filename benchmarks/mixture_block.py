#!/usr/bin/env python3
"""Quantize one block of a large mixture of experts with real data, and compare memory, bytes read and written and time with the plan.

Usage: mixture_block.py WORK [--only qwen3-30b-a3b] [--experts alone] [--num-samples 16] [--seq-len 512] [--threads 1] [--max-ram 16GiB]
                        [--flags "--epochs 1"] [--results FILE] [--keep]

Models of one block with random bf16 weights and a vocabulary of 1000:

- qwen3-30b-a3b: the block as published, 128 experts of which 8 compute a token, 1.2 GB;
- deepseek-v3: the width and the attention as published, with 16 experts in place of 256, of which 8 compute a token in one group, 1.9 GB.

Profile fast, W4A16 group 128, windows of one block, random tokens. The plan is made with the same flags before the run. Bytes are those of
the system calls of the process (rchar and wchar in /proc/PID/io), which include the files that Python loads: those that `cbqstream plan`
reads are subtracted. Time is CPU time divided by the number of threads; the wall time is stored too. The last line of a table says which
ratios are outside the targets: 15 % for memory and bytes, 30 % for time. Files are deleted after a run, unless --keep is given.
"""

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path

from deepseek_fp8 import CONFIG, HIDDEN, block_tensors, write_shard
from measure import Measured, cbqstream, load, run, save
from random_model import ensure_checkpoint, random_tokens

HERE = Path(__file__).resolve().parent
VOCABULARY, EXPERTS = 1000, 16
QWEN = {"hidden": 2048, "inner": 768, "experts": 128, "heads": 32, "key_value_heads": 4}
SHAPES = ("qwen3-30b-a3b", "deepseek-v3")
TARGETS = {"memory": 0.15, "bytes read": 0.15, "bytes written": 0.15, "seconds": 0.30}
"""Largest difference between plan and run, relative to the run."""
UNITS = {"memory": 1 << 30, "bytes read": 1 << 30, "bytes written": 1 << 30, "seconds": 1}
"""GiB, and seconds."""


def write_deepseek(folder: Path) -> None:
    """Write the DeepSeek model of one block, if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    few = {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    config = {**CONFIG, **few, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    del config["quantization_config"]
    matrix = ("BF16", (VOCABULARY, HIDDEN))
    shards = {
        "outer": {
            "model.embed_tokens.weight": matrix,
            "model.norm.weight": ("BF16", (HIDDEN,)),
            "lm_head.weight": matrix,
        },
        "block-0": block_tensors(0, dense=0, experts=EXPERTS, fp8=False),
    }
    size = sum(write_shard(folder / f"{name}.safetensors", tensors, real=True) for name, tensors in shards.items())
    weight_map = {tensor: f"{name}.safetensors" for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def ensure_model(shape: str, folder: Path) -> int:
    """Write the model of one block in a process of its own, if it does not exist, and return the size of its weights in bytes."""
    if shape == "deepseek-v3":
        run(sys.executable, __file__, str(folder.parent), "--write-deepseek")
    else:
        ensure_checkpoint(folder, **QWEN, blocks=1, vocabulary=VOCABULARY)
    return int(json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"])


def measure(shape: str, folder: Path, args: argparse.Namespace) -> dict:
    """Planned and measured memory, bytes read, bytes written and seconds, and other facts of the run."""
    size, out = ensure_model(shape, folder), args.work / f"out-{shape}"
    tokens = random_tokens(args.work / "tokens.npy", VOCABULARY, args.num_samples * args.seq_len)
    for path in (out, Path(f"{out}.run")):
        shutil.rmtree(path, ignore_errors=True)
    lengths = ["--num-samples", str(args.num_samples), "--seq-len", str(args.seq_len), "--threads", str(args.threads)]
    method = ["--profile", "fast", "--window-size", "1", "--overlap", "0", "--experts", args.experts]
    common = [*lengths, *method, "--device", "cpu", "--max-ram", args.max_ram, *shlex.split(args.flags)]
    planned = cbqstream("plan", str(folder), "--json", *common)
    made = cbqstream("quantize", str(folder), str(out), "--dataset", str(tokens), *common)
    if not args.keep:
        for path in (folder, out, Path(f"{out}.run")):
            shutil.rmtree(path, ignore_errors=True)
    return {**compared(json.loads(planned.output), planned, made, args.threads), "checkpoint": size, "flags": common}


def compared(plan: dict, planned: Measured, made: Measured, threads: int) -> dict:
    """Planned and measured values of a run, by name, and what the plan and the system say besides.

    Args:
        plan: output of `plan --json`.
        planned: the process of `plan`, which reads what every process of cbqstream reads when it starts.
        made: the process of `quantize`.
        threads: CPU threads.
    """
    pairs = {
        "memory": [plan["ram_total"], made.peak_rss],
        "bytes read": [plan["bytes_read"], made.io["rchar"] - planned.io["rchar"]],
        "bytes written": [plan["bytes_written"], made.io["wchar"]],
        "seconds": [plan["seconds_total"], made.cpu_seconds / threads],
    }
    parts = {"ram": plan["ram"], "parts of the time": plan["seconds"], "memory_mode": plan["memory_mode"]}
    return {**pairs, **parts, "io": made.io, "io of plan": planned.io, "wall": made.seconds, "threads": threads}


def table(rows: dict[str, dict]) -> str:
    """The results as a Markdown table with planned and measured values, and the ratios that are outside the targets."""
    heads = [f"{name}{', GiB' if UNITS[name] > 1 else ''}: plan, run | ratio" for name in TARGETS]
    lines = [f"| run | {' | '.join(heads)} |", "|---" * (1 + 2 * len(TARGETS)) + "|"]
    outside = []
    for run_name, row in rows.items():
        cells = []
        for name, unit in UNITS.items():
            planned, measured = row[name]
            cells += [f"{planned / unit:.2f}, {measured / unit:.2f}", f"{planned / measured:.2f}"]
            if abs(planned / measured - 1) > TARGETS[name]:
                outside.append(f"{run_name}: {name} {planned / measured:.2f}")
        lines.append(f"| {run_name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"outside the targets: {'; '.join(outside) or 'none'}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for models and runs")
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=SHAPES, help="shapes to run")
    parser.add_argument("--experts", default="alone", help="how experts are trained: alone or window")
    parser.add_argument("--num-samples", type=int, default=16, help="calibration segments")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a segment")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--max-ram", default="16GiB", help="memory limit of the run")
    parser.add_argument("--flags", default="", help="further flags of plan and quantize, in one argument")
    default = HERE / "results" / "mixture_block.json"
    parser.add_argument("--results", type=Path, default=default, help="JSON file for the rows")
    parser.add_argument("--keep", action="store_true", help="keep the models and the results of the runs")
    parser.add_argument("--write-deepseek", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.write_deepseek:
        write_deepseek(args.work / "deepseek-v3")
        return
    for shape in args.only:
        name = f"{shape}, experts {args.experts}, {args.num_samples} x {args.seq_len} {args.flags}".strip()
        save(args.results, name, measure(shape, args.work / shape, args))
    print(table(load(args.results)))


if __name__ == "__main__":
    main()
