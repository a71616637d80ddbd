"""The plan: counted by hand where that is possible, and in time for a model of 405 billion weights."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cbqstream import quantize
from cbqstream.config import CalibrationConfig, QuantizeConfig, ReconstructionConfig, parse_bytes
from cbqstream.errors import DeviceMemoryError, InputError, UsageError
from cbqstream.planning.alternatives import smaller_settings
from cbqstream.planning.plan import fitting_plan, make_plan
from cbqstream.planning.plan_lines import plan_lines
from cbqstream.planning.rates import Rates, measure_rates
from cbqstream.planning.sizes import ModelSizes
from cbqstream.records import MemoryMode
from cbqstream.scheme import Scheme
from tiny import SEQ_LEN, save_tokens

RATES = Rates(product=1e-11, weight=1e-8, value=1e-9)


def settings(model="MODEL", scheme=None, **sizes):
    scheme = scheme or Scheme(num_bits=4, group_size=32)
    return QuantizeConfig(
        model=str(model), out="OUT", scheme=scheme, calibration=CalibrationConfig(dataset="D", **sizes)
    )


@pytest.fixture(scope="module")
def sizes_405b(tmp_path_factory):
    """Headers and an index as Llama-3.1-405B has them: 191 shards whose data are holes; and the seconds to read them."""
    folder = tmp_path_factory.mktemp("405b")
    hidden, inner, vocabulary = 16384, 53248, 128256
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
    shapes |= {f"self_attn.{name}_proj": (1024, hidden) for name in "kv"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    tensors = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    for index in range(126):
        tensors |= {f"model.layers.{index}.{name}": shape for name, shape in shapes.items()}
        tensors |= {
            f"model.layers.{index}.{name}": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    names, weight_map = list(tensors), {}
    for shard in range(191):
        file, at, header = f"model-{shard:05d}.safetensors", 0, {}
        for name in names[shard::191]:
            shape, start = tensors[name], at
            at += 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[f"{name}.weight"] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, at]}
            weight_map[f"{name}.weight"] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "llama", "hidden_size": hidden, "vocab_size": vocabulary, "num_hidden_layers": 126}
    (folder / "config.json").write_text(json.dumps(config))
    began = time.process_time()
    sizes = ModelSizes.of(folder)
    return sizes, time.process_time() - began


def test_405b_is_planned_at_once(sizes_405b):
    sizes, seconds = sizes_405b
    began = time.process_time()
    plan = make_plan(settings(num_samples=128, seq_len=2048), sizes, "cuda", RATES)
    assert seconds + time.process_time() - began < 1
    assert (sizes.num_blocks, plan.windows) == (126, 125)
    assert plan.source == pytest.approx(811.7e9, rel=0.001)
    assert sizes.weights == 2 * 16384**2 + 2 * 1024 * 16384 + 3 * 16384 * 53248
    assert plan.vram["weights"] == 2 * sizes.block_bytes
    assert plan.vram["rounding"] == 2 * 2 * sizes.weights
    assert plan.disk["streams"] == 5 * 128 * 2048 * 16384 * 2
    # per-block forward of reference/performance: 6.442 GFLOP a token at 2048 tokens, half of the attention counted
    steps = 125 * 2 * 6 * 112 * 3 + 125 * (128 * (1 + 2 + 1) + 2 * 16 * 2)
    assert plan.flop == pytest.approx(steps * 2048 * 6.442e9, rel=0.01)


def test_memory_does_not_grow_with_blocks_or_samples(sizes_405b):
    sizes, _ = sizes_405b
    small, large = (
        make_plan(settings(num_samples=count), replace(sizes, num_blocks=blocks), device, RATES)
        for count, blocks, device in ((32, 8, "cpu"), (512, 126, "cpu"))
    )
    assert small.ram == large.ram
    assert large.disk["streams"] == 16 * small.disk["streams"]


def test_few_samples_are_trained_on_and_judged_by(sizes_405b):
    """Fewer than eight are both; each passes the blocks once for the streams all the same."""
    sizes, _ = sizes_405b
    plan = make_plan(settings(num_samples=4, seq_len=2048), sizes, "cuda", RATES)
    passes = 125 * (2 * 6 * 4 * 3 + 4 * (1 + 2 + 1) + 2 * 4 * 2)
    assert plan.flop == pytest.approx(passes * 2048 * 6.442e9, rel=0.01)


def test_a_quarter_of_the_blocks_is_a_quarter_of_the_time(sizes_405b):
    sizes, _ = sizes_405b
    seconds = [
        sum(make_plan(settings(), replace(sizes, num_blocks=1 + blocks), "cuda", RATES).seconds.values())
        for blocks in (25, 100)
    ]
    assert seconds[1] == pytest.approx(4 * seconds[0], rel=0.01)  # but for the head and the start


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(num_bits=4, group_size=32),
        Scheme(num_bits=2, group_size=16, symmetric=False),
        Scheme(num_bits=3, group_size=None),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
def test_the_result_on_disk(tiny_models, tmp_path, family, scheme):
    """Counted against what a run writes, but for headers."""
    tokens = save_tokens(tmp_path / "tokens.npy", 2 * SEQ_LEN)
    config = QuantizeConfig(
        model=str(tiny_models[family]),
        out=str(tmp_path / "out"),
        scheme=scheme,
        calibration=CalibrationConfig(dataset=str(tokens), num_samples=2, seq_len=SEQ_LEN),
        reconstruction=ReconstructionConfig(rounding="nearest"),
        device="cpu",
        threads=1,
    )
    sizes = ModelSizes.of(Path(config.model))
    plan = make_plan(config, sizes, "cpu")
    out = quantize(config)
    written = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    headers = {path.name: 8 + int.from_bytes(path.read_bytes()[:8], "little") for path in out.glob("*.safetensors")}
    blocks = sum(size - headers[name] for name, size in written.items() if name.startswith("block"))
    shapes = sizes.num_blocks * len(sizes.layers) * 16
    assert blocks - shapes == pytest.approx(plan.disk["blocks"], rel=0.02)
    assert written["rest.safetensors"] - headers["rest.safetensors"] == plan.disk["rest of the model"]


def test_smaller_settings_are_smaller(sizes_405b):
    sizes, _ = sizes_405b
    config = settings(num_samples=128)
    plan = make_plan(config, sizes, "cuda", RATES)
    others = {flags: make_plan(other, sizes, "cuda", RATES) for flags, other in smaller_settings(config).items()}
    assert list(others) == [
        "--batch-size 2",
        "--rounding lora_rounding",
        "--seq-len 1024",
        "--num-samples 64",
        "--window-size 1 --overlap 0",
        "--epochs 3",
    ]
    for other in others.values():
        figures = [
            (sum(getattr(other, name).values()), sum(getattr(plan, name).values()))
            for name in ("vram", "ram", "disk", "seconds")
        ]
        assert any(smaller < larger for smaller, larger in figures)
    lines = plan_lines({**plan.to_dict(), "smaller": {flags: other.to_dict() for flags, other in others.items()}})
    assert lines[0] == "windows: 125"
    assert any(line.startswith("device memory: ") for line in lines)
    assert any(line.startswith("with --batch-size 2: device memory -") for line in lines)


def test_rates_are_measured():
    layers = ((64, 64), (128, 64))
    rates = measure_rates(settings(num_samples=4, seq_len=64), layers, torch.device("cpu"), torch.float32)
    assert rates.product >= 0
    assert rates.weight > 0
    assert 0 < rates.value < 1e-6


def test_attention_that_is_computed_whole(tiny_models):
    """BLOOM and Gemma 2 keep the scores of every head."""
    of = {family: ModelSizes.of(tiny_models[family]) for family in ("bloom", "gemma2", "llama")}
    assert {family: sizes.eager_heads for family, sizes in of.items()} == {"bloom": 4, "gemma2": 4, "llama": 0}
    config = settings(num_samples=8, seq_len=64)
    with_it, without = (make_plan(config, sizes, "cpu") for sizes in (of["bloom"], replace(of["bloom"], eager_heads=0)))
    batch = config.reconstruction.batch_size
    assert with_it.ram["activations"] - without.ram["activations"] == 3 * 8 * 4 * batch * 64 * 64


def test_what_the_stage_end_to_end_holds(sizes_405b):
    """The step sizes of the whole model, five times in float32: no smaller step of a window makes room for them."""
    sizes, _ = sizes_405b
    config = settings(num_samples=128)
    whole = replace(config, reconstruction=replace(config.reconstruction, end_to_end_epochs=2))
    plans = [
        make_plan(whole, sizes, "cuda", memory_mode=step)
        for step in (MemoryMode(), MemoryMode(activation_checkpointing=True, offload=True))
    ]
    scales = sum(rows * columns // 32 for rows, columns in sizes.layers.values())
    assert plans[0].vram["step sizes"] == plans[1].vram["step sizes"] == 126 * 20 * scales
    with pytest.raises(DeviceMemoryError, match=r"These fit: .*--end-to-end-epochs 0"):
        fitting_plan(replace(whole, max_vram=48 << 30), sizes, "cuda")


def test_what_cannot_be_planned(tmp_path, tiny_models):
    with pytest.raises(InputError, match="no such folder"):
        ModelSizes.of(tmp_path / "nowhere")
    sizes = ModelSizes.of(tiny_models["llama"])
    with pytest.raises(UsageError, match="leave none of the 4 blocks"):
        make_plan(replace(settings(), keep_first=4), sizes, "cpu")


def test_within_limits(sizes_405b):
    """Recomputing first, then layers on disk; then a refusal that says what would fit, or that nothing does."""
    sizes, _ = sizes_405b
    config = settings(num_samples=128)
    steps = [
        MemoryMode(),
        MemoryMode(activation_checkpointing=True),
        MemoryMode(activation_checkpointing=True, offload=True),
    ]
    free, again, memory_mode = (make_plan(config, sizes, "cuda", RATES, step) for step in steps)
    assert free.largest("vram") > again.largest("vram") > 3 * 2 * sizes.weights + memory_mode.largest("vram")
    assert sum(again.seconds.values()) > sum(free.seconds.values())
    assert memory_mode.disk["layers of a window"] > 2 * 4 * sizes.weights
    assert memory_mode.bytes_read > again.bytes_read + 2 * 4 * sizes.weights * free.windows
    for limit, step in (
        (free.largest("vram"), steps[0]),
        (free.largest("vram") - 1, steps[1]),
        (again.largest("vram"), steps[1]),
        (again.largest("vram") - 1, steps[2]),
        (memory_mode.largest("vram"), steps[2]),
    ):
        assert fitting_plan(replace(config, max_vram=limit), sizes, "cuda").memory_mode == step
    with pytest.raises(DeviceMemoryError, match=r"--max-vram .* GiB: this run needs .*\. These fit: --batch-size 2 \("):
        fitting_plan(replace(config, max_vram=memory_mode.largest("vram") - 1), sizes, "cuda")
    with pytest.raises(DeviceMemoryError, match="No smaller batch or window fits either"):
        fitting_plan(replace(config, max_ram=1 << 30), sizes, "cuda")


@pytest.mark.parametrize(
    ("text", "size"), [("16GiB", 16 << 30), ("1.5 gb", 1_500_000_000), ("800MiB", 800 << 20), ("2TB", 2 * 10**12)]
)
def test_sizes_in_words(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["16", "GiB", "16 PiB", "-1GiB", "1e3GB", ""])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


def sizes_with_experts(tmp_path, **settings):
    """Two blocks with an attention layer of 64 x 64 and eight experts of 3 x 64 x 128."""
    shapes = {"self_attn.q_proj.weight": (64, 64), "mlp.gate.weight": (8, 64)}
    for index in range(8):
        for name, shape in (("gate_proj", (128, 64)), ("up_proj", (128, 64)), ("down_proj", (64, 128))):
            shapes[f"mlp.experts.{index}.{name}.weight"] = shape
    tensors = {
        f"model.layers.{block}.{name}": torch.zeros(shape, dtype=torch.bfloat16)
        for block in range(2)
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "mixtral", "hidden_size": 64, "vocab_size": 96, "num_experts_per_tok": 2, **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return ModelSizes.of(tmp_path)


def test_a_token_is_computed_by_its_experts_and_all_of_them_are_held(tmp_path):
    sizes = sizes_with_experts(tmp_path)
    dense, expert = 64 * 64 + 8 * 64, 3 * 64 * 128
    assert sizes.weights == dense + 8 * expert
    assert sizes.active == dense + 2 * expert
    assert sizes.outputs == 64 + 8 + 2 * (128 + 128 + 64)


def test_wider_and_whole_layers_take_more_disk(tmp_path):
    sizes = sizes_with_experts(tmp_path)

    def packed(**settings):
        config = QuantizeConfig(
            model="m",
            out="o",
            scheme=Scheme(num_bits=4, group_size=32),
            calibration=CalibrationConfig(dataset="d"),
            **settings,
        )
        return make_plan(config, sizes, "cpu").disk["blocks"]

    down = 2 * 8 * 64 * 128
    assert packed(override=("down_proj=W8",)) - packed() == down // 2
    assert packed(ignore=("down_proj",)) - packed() == 3 * down // 2
