#!/usr/bin/env python3
"""Compare the ways to quantize four very large models on two small machines, and the profiles for 65B, from plans alone.

Usage: plans.py WORK [--only NAME ...] [--results FILE]

Checkpoints with the shapes of DeepSeek V3 (FP8), Kimi K2 (FP8), Qwen3-235B-A22B and Llama 3.1 405B, in sparse files: only headers are read.
W4A16 group 128, `default`, 128 x 2,048 tokens, with the batch of 4, 2 or 1 segments that takes the least time. No run is made, and the
speed of the machines is assumed (`MACHINES`), so that hours compare ways and predict nothing. A way that fits in no memory mode is shown
with what it needs.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepseek_fp8 import CONFIG as DEEPSEEK
from deepseek_fp8 import Tensors, write_shard
from measure import load, save

from cbqstream.config import CalibrationConfig, QuantizeConfig, ReconstructionConfig, WindowConfig
from cbqstream.errors import DeviceMemoryError
from cbqstream.models.meta_model import MetaModel
from cbqstream.planning.disk_rates import DiskRates
from cbqstream.planning.plan import fitting_plan, make_plan, memory_modes
from cbqstream.planning.planned import Plan
from cbqstream.planning.rates import Rates
from cbqstream.planning.requirements import read_headers
from cbqstream.planning.sizes import ModelSizes
from cbqstream.profiles import PROFILES
from cbqstream.rounding.registry import METHODS
from cbqstream.scheme import Scheme

HERE = Path(__file__).resolve().parent
GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """A machine with assumed speeds."""

    device: str
    max_ram: int
    max_vram: int | None
    flops: float
    """Floating-point operations per second of matrix products."""
    memory: float
    """Bytes per second of the memory in which it computes."""
    width: int
    """Size of a value of the compute dtype."""
    disks: DiskRates


def _disks(memory: int, bus: float | None) -> DiskRates:
    return DiskRates("assumed", read=5e9, write=3e9, source=5e9, cached=25e9, bus=bus, memory=memory)


MACHINES = {
    "24 GB GPU, 64 GiB": Machine("cuda", 64 * GIB, 24 * 10**9, 140e12, 0.92e12, 2, _disks(64 * GIB, 25e9)),
    "no GPU, 16 GiB": Machine("cpu", 16 * GIB, None, 1e12, 40e9, 4, _disks(16 * GIB, None)),
}
PROFILED = "LLaMA 65B"
PROFILED_ON = "H100, 128 GiB", Machine("cuda", 128 * GIB, 80 * 10**9, 600e12, 2.7e12, 2, _disks(128 * GIB, 50e9))
"""The model and the machine for which the profiles are compared."""
KIMI = DEEPSEEK | {
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 163840,
}
QWEN = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA_65B = LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 32000,
}
MODELS: dict[str, dict[str, Any]] = {
    "DeepSeek V3": DEEPSEEK,
    "Kimi K2": KIMI,
    "Qwen3-235B-A22B": QWEN,
    "Llama 3.1 405B": LLAMA,
}


def gated(prefix: str, inner: int, hidden: int) -> dict[str, tuple[int, int]]:
    """Shapes of the layers of an MLP with a gate."""
    up = {f"{prefix}.{name}_proj": (inner, hidden) for name in ("gate", "up")}
    return up | {f"{prefix}.down_proj": (hidden, inner)}


def block_layers(config: dict[str, Any], index: int) -> tuple[dict[str, tuple[int, int]], dict[str, int], int]:
    """Shapes of the linear layers of a block, sizes of its norms, and the number of its experts."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config["model_type"] == "deepseek_v3":
        query, values = config["q_lora_rank"], config["kv_lora_rank"]
        attention = {
            "q_a_proj": (query, hidden),
            "q_b_proj": (heads * 192, query),
            "kv_a_proj_with_mqa": (values + 64, hidden),
            "kv_b_proj": (heads * 256, values),
            "o_proj": (hidden, heads * 128),
        }
        norms |= {"self_attn.q_a_layernorm": query, "self_attn.kv_a_layernorm": values}
        experts = config["n_routed_experts"] if index >= config["first_k_dense_replace"] else 0
        rest = gated("mlp.shared_experts", 2048, hidden) if experts else gated("mlp", 18432, hidden)
    else:
        size = config.get("head_dim", 128)
        keys = (config["num_key_value_heads"] * size, hidden)
        attention = {"q_proj": (heads * size, hidden), "k_proj": keys, "v_proj": keys, "o_proj": (hidden, heads * size)}
        experts = config.get("num_experts", 0)
        rest = {} if experts else gated("mlp", config["intermediate_size"], hidden)
        norms |= {"self_attn.q_norm": size, "self_attn.k_norm": size} if experts else {}
    layers = {f"self_attn.{name}": shape for name, shape in attention.items()} | rest
    for number in range(experts):
        layers |= gated(f"mlp.experts.{number}", config["moe_intermediate_size"], hidden)
    return layers, norms, experts


def block_tensors(config: dict[str, Any], index: int) -> Tensors:
    """The tensors of a block as published."""
    prefix, hidden = f"model.layers.{index}.", config["hidden_size"]
    layers, norms, experts = block_layers(config, index)
    tensors: Tensors = {f"{prefix}{name}.weight": ("BF16", (size,)) for name, size in norms.items()}
    fp8 = "quantization_config" in config
    if experts:
        tensors[f"{prefix}mlp.gate.weight"] = ("BF16", (experts, hidden))
        if fp8:
            tensors[f"{prefix}mlp.gate.e_score_correction_bias"] = ("F32", (experts,))
    for name, (rows, columns) in layers.items():
        tensors[f"{prefix}{name}.weight"] = ("F8_E4M3" if fp8 else "BF16", (rows, columns))
        if fp8:
            tensors[f"{prefix}{name}.weight_scale_inv"] = ("F32", (-(-rows // 128), -(-columns // 128)))
    return tensors


def sizes_of(folder: Path, config: dict[str, Any]) -> ModelSizes:
    """Sizes of a checkpoint of holes, which is written first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    hidden, matrix = config["hidden_size"], ("BF16", (config["vocab_size"], config["hidden_size"]))
    outer = {"model.embed_tokens.weight": matrix, "model.norm.weight": ("BF16", (hidden,)), "lm_head.weight": matrix}
    shards = {"outer": outer}
    shards |= {f"block-{index}": block_tensors(config, index) for index in range(config["num_hidden_layers"])}
    for name, tensors in shards.items():
        write_shard(folder / f"{name}.safetensors", tensors, real=False)
    weight_map = {tensor: f"{name}.safetensors" for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model, infos = read_headers(str(folder))
    return ModelSizes.of(MetaModel(folder, model, infos))


def ways(sizes: ModelSizes) -> dict[str, dict[str, Any]]:
    """Settings that are compared, by the flags that select them."""
    one = WindowConfig(size=1, overlap=0)
    found: dict[str, dict[str, Any]] = {
        "default": {},
        "--rounding lora_rounding": {"rounding": "lora_rounding"},
        "--window-size 1 --overlap 0": {"window": one},
    }
    if "gptq" in METHODS:
        found["--rounding gptq --window-size 1 --overlap 0"] = {"rounding": "gptq", "window": one}
    if sizes.routed is not None:
        found["--experts alone --window-size 1 --overlap 0"] = {"experts": "alone", "window": one}
        if "gptq" in METHODS:
            flags = "--experts alone --rounding gptq --window-size 1 --overlap 0"
            found[flags] = {"experts": "alone", "rounding": "gptq", "window": one}
    return found


def rates_of(machine: Machine, settings: ReconstructionConfig) -> Rates:
    """Assumed times of elementary operations: a training step of a weight and a token takes 6 floating-point operations."""
    cost = METHODS[settings.rounding].cost(settings, 1024, 1024)
    step = cost.step_bytes_on(machine.device, settings.kernels) / 1024**2
    return Rates(
        product=6 / machine.flops,
        weight=max(step, 2 * machine.width) / machine.memory,
        value=machine.width / machine.memory,
        disks=machine.disks,
    )


def planned(machine: Machine, sizes: ModelSizes, way: dict[str, Any]) -> tuple[Plan, int]:
    """The plan of a way with the batch of 4, 2 or 1 segments that takes the least time, or with that of a profile, and the batch size.

    If none fits, the plan of the smallest batch in the memory mode that needs the least memory.
    """
    profile = PROFILES[way.get("profile", "default")]
    chosen = {name: way[name] for name in ("rounding", "experts") if name in way}
    fitting: list[tuple[Plan, int]] = []
    smallest = None
    for batch_size in (profile.reconstruction.batch_size,) if "profile" in way else (4, 2, 1):
        settings = replace(profile.reconstruction, batch_size=batch_size, **chosen)
        config = QuantizeConfig(
            model="MODEL",
            out="OUT",
            scheme=Scheme(num_bits=4, group_size=128),
            calibration=CalibrationConfig(dataset="D", num_samples=128, seq_len=2048),
            reconstruction=settings,
            window=way.get("window", profile.window),
            transforms=profile.transforms,
            max_ram=machine.max_ram,
            max_vram=machine.max_vram,
        )
        rates = rates_of(machine, settings)
        try:
            fitting.append((fitting_plan(config, sizes, machine.device, rates), batch_size))
        except DeviceMemoryError:
            smallest = make_plan(config, sizes, machine.device, rates, memory_modes(config, sizes)[-1]), batch_size
    return min(fitting, key=lambda found: found[0].seconds_total, default=smallest)


def row_of(made: Plan, batch_size: int) -> dict[str, Any]:
    """The figures of a plan that are compared."""
    result = made.disk["blocks"] + made.disk["rest of the model"]
    streams = made.written.get("streams", 0)
    return {
        "batch_size": batch_size,
        "mode": made.way,
        "exceeds": made.exceeded,
        "ram": made.largest("ram"),
        "vram": made.largest("vram"),
        "disk": made.disk_total,
        "read": dict(made.read),
        "written": dict(made.written),
        "bus": dict(made.bus),
        "source": made.source,
        "result": result,
        "read_by_source": made.bytes_read / made.source,
        "weights_read_by_source": (made.read["source"] + made.read.get("finished experts", 0)) / made.source,
        "written_by_target": made.bytes_written / (3 * result + streams),
        "seconds": dict(made.seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the checkpoints")
    parser.add_argument(
        "--only", nargs="+", default=[*MODELS, PROFILED], choices=[*MODELS, PROFILED], help="models to plan"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / "plans.json", help="JSON file for the rows")
    args = parser.parse_args()
    for name in (name for name in MODELS if name in args.only):
        sizes = sizes_of(args.work / name.replace(" ", "-").lower(), MODELS[name])
        for place, machine in MACHINES.items():
            for flags, way in ways(sizes).items():
                save(args.results, f"{name}; {place}; {flags}", row_of(*planned(machine, sizes, way)))
    if PROFILED in args.only:
        sizes, (place, machine) = sizes_of(args.work / "llama-65b", LLAMA_65B), PROFILED_ON
        for profile in PROFILES:
            row = row_of(*planned(machine, sizes, {"profile": profile}))
            save(args.results, f"{PROFILED}; {place}; --profile {profile}", row)
    print_table(load(args.results))


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """Print a table in Markdown; of the settings that fit in no memory mode only what they need."""
    head = ["model", "machine", "flags", "batch", "memory mode", "GPU, GB", "memory, GB", "read, TB", "read / source"]
    head += ["weights read / source", "to the GPU, TB", "written, TB", "written / (3 results + streams)", "hours"]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for name, row in rows.items():
        read, written, bus = (sum(row[key].values()) for key in ("read", "written", "bus"))
        mode = row["mode"] if row["exceeds"] is None else "none fits"
        cells = [part.strip() for part in name.split(";")]
        cells += [
            str(row["batch_size"]),
            mode,
            f"{row['vram'] / 1e9:.1f}" if row["vram"] else "",
            f"{row['ram'] / 1e9:.1f}",
        ]
        if row["exceeds"] is None:
            cells += [f"{read / 1e12:,.1f}", f"{row['read_by_source']:,.1f}", f"{row['weights_read_by_source']:.1f}"]
            cells += [f"{bus / 1e12:,.1f}" if bus else "", f"{written / 1e12:,.1f}", f"{row['written_by_target']:,.2f}"]
            cells.append(f"{sum(row['seconds'].values()) / 3600:,.1f}")
        print("| " + " | ".join([*cells, *("" for _ in head[len(cells) :])]) + " |")


if __name__ == "__main__":
    main()
