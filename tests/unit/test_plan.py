"""The plan of a run: sizes compared with counts by hand and with real runs, memory modes, limits, and the time that planning takes."""

import ast
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from cbqstream import quantize
from cbqstream.config import (
    CalibrationConfig,
    QuantizeConfig,
    ReconstructionConfig,
    RoundingName,
    WindowConfig,
    parse_bytes,
)
from cbqstream.errors import DeviceMemoryError, InputError, StorageError, UsageError
from cbqstream.models.meta_model import MetaModel
from cbqstream.planning.advice import ENDURANCE, advice
from cbqstream.planning.alternatives import smaller_settings
from cbqstream.planning.closed_form import closed_form_bytes, closed_form_flop, closed_form_passes
from cbqstream.planning.disk_rates import DiskRates, measure_disks
from cbqstream.planning.plan import compared, fitting_plan, make_plan, memory_modes
from cbqstream.planning.plan import plan as plan_of
from cbqstream.planning.plan_lines import plan_lines
from cbqstream.planning.rates import Rates, measure_rates
from cbqstream.planning.requirements import read_headers
from cbqstream.planning.sizes import ModelSizes
from cbqstream.records import MemoryMode
from cbqstream.scheme import Scheme
from tiny import SEQ_LEN, save_model, save_tokens

PACKAGE = Path(__file__).parent.parent.parent / "cbqstream"
RATES = Rates(product=1e-11, weight=1e-8, value=1e-9)
GIB = 1 << 30
DISKS = DiskRates("FOLDER", read=2e9, write=1e9, source=4e9, cached=8e9, bus=16e9, memory=1 << 40)


@pytest.fixture(autouse=True)
def much_free_memory(monkeypatch):
    """Without a limit, the plan depends on the memory that is free."""
    monkeypatch.setattr("cbqstream.planning.plan.available_bytes", lambda: 1 << 40)


def settings(model="MODEL", scheme=None, **sizes):
    scheme = scheme or Scheme(num_bits=4, group_size=32)
    return QuantizeConfig(
        model=str(model), out="OUT", scheme=scheme, calibration=CalibrationConfig(dataset="D", **sizes)
    )


@pytest.fixture(scope="module")
def sizes_405b(tmp_path_factory):
    """Sizes of Llama-3.1-405B, and the seconds that it took to read them.

    The folder has the 191 headers and the index of the model. The data of the shards are holes in sparse files.
    """
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
        file, offset, header = f"model-{shard:05d}.safetensors", 0, {}
        for name in names[shard::191]:
            shape, start = tensors[name], offset
            offset += 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[f"{name}.weight"] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, offset]}
            weight_map[f"{name}.weight"] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "llama", "hidden_size": hidden, "vocab_size": vocabulary, "num_hidden_layers": 126}
    config |= {"num_attention_heads": 128, "num_key_value_heads": 8, "intermediate_size": inner}
    (folder / "config.json").write_text(json.dumps(config))
    started = time.process_time()
    sizes = sizes_of(folder)
    return sizes, time.process_time() - started


def sizes_of(folder):
    """Sizes of the model in a folder."""
    model, infos = read_headers(str(folder))
    return ModelSizes.of(MetaModel(folder, model, infos))


def test_a_model_of_405_billion_weights_is_planned_in_less_than_five_seconds(sizes_405b):
    sizes, seconds = sizes_405b
    started = time.process_time()
    plan = make_plan(settings(num_samples=128, seq_len=2048), sizes, "cuda", RATES)
    assert seconds + time.process_time() - started < 5
    assert (sizes.num_blocks, plan.windows) == (126, 125)
    assert plan.source == pytest.approx(811.7e9, rel=0.001)
    assert sizes.weights == 2 * 16384**2 + 2 * 1024 * 16384 + 3 * 16384 * 53248
    assert plan.vram["weights"] == 2 * sizes.block_bytes
    assert plan.vram["rounding"] == 2 * 2 * sizes.weights
    assert plan.ram["streams"] == 5 * 128 * 2048 * 16384 * 2
    assert plan.disk["streams"] == 4 * 128 * 2048 * 16384 * 2
    # the forward pass of a block takes 6.442 GFLOP per token at 2048 tokens, with half of the attention matrix
    passes = 125 * 2 * 6 * 112 * 3 + 125 * (128 * (1 + 2 + 1) + 2 * 16 * 2)
    assert plan.flop == pytest.approx(passes * 2048 * 6.442e9, rel=0.01)


def test_lora_rounding_moves_fewer_bytes_with_the_kernels_for_cuda(sizes_405b):
    config = settings(num_samples=128, seq_len=2048)
    lora = ReconstructionConfig(rounding="lora_rounding", rounding_rank=5)
    cpu, cuda = (make_plan(replace(config, reconstruction=lora), sizes_405b[0], name) for name in ("cpu", "cuda"))
    plain = make_plan(replace(config, reconstruction=replace(lora, kernels="plain")), sizes_405b[0], "cuda")
    assert cpu.rounding_bytes == plain.rounding_bytes
    assert cuda.rounding_bytes / cpu.rounding_bytes == pytest.approx(14.8125 / 600)


def test_memory_does_not_depend_on_the_number_of_blocks(sizes_405b):
    sizes, _ = sizes_405b
    small, large = (make_plan(settings(), replace(sizes, num_blocks=blocks), "cpu", RATES) for blocks in (8, 126))
    assert small.ram == large.ram


def test_streams_are_in_memory_if_that_fits(sizes_405b, monkeypatch):
    """With streams on disk alone, memory does not depend on the number of segments. Without a limit, half of the free memory is used."""
    sizes, _ = sizes_405b
    on_disk, (few, many) = MemoryMode(streams_on_disk=True), (settings(num_samples=count) for count in (32, 512))
    resident, small = (make_plan(few, sizes, "cuda", RATES, mode) for mode in (MemoryMode(), on_disk))
    large = make_plan(many, sizes, "cuda", RATES, on_disk)
    stream = 32 * 2048 * 16384 * 2
    assert small.ram == large.ram == {part: size for part, size in resident.ram.items() if part != "streams"}
    assert (resident.ram["streams"], small.disk["streams"], large.disk["streams"]) == (
        5 * stream,
        5 * stream,
        80 * stream,
    )
    assert (resident.read["streams"], resident.written["streams"]) == (2 * stream, 125 * 2 * stream)
    passes = (6 * 28 + 2 * 4) / 32
    assert (small.read["streams"], small.written["streams"]) == (125 * (3 + 2 * passes) * stream, 125 * 3 * stream)
    assert resident.bus["streams"] == small.bus["streams"] == 125 * (3 + 2 * passes + 3) * stream
    needed = resident.largest("ram")
    for limit, way in ((needed, "all layers in memory"), (needed - 1, "all layers in memory, streams on disk")):
        assert fitting_plan(replace(few, max_ram=limit), sizes, "cuda").way == way
        monkeypatch.setattr("cbqstream.planning.plan.available_bytes", lambda limit=limit: 2 * limit)
        made = fitting_plan(few, sizes, "cuda")
        assert made.way == way
    reason = compared(few, sizes, "cuda", made, None).reason
    assert reason == 'the first that fits: "all layers in memory" would exceed half of the free memory'


def test_with_fewer_than_eight_segments_all_are_trained_on_and_held_out(sizes_405b):
    """Each of the 4 segments counts as a training and as a held-out segment, but passes each block only once for the streams."""
    sizes, _ = sizes_405b
    plan = make_plan(settings(num_samples=4, seq_len=2048), sizes, "cuda", RATES)
    passes = 125 * (2 * 6 * 4 * 3 + 4 * (1 + 2 + 1) + 2 * 4 * 2)
    assert plan.flop == pytest.approx(passes * 2048 * 6.442e9, rel=0.01)


def test_the_time_is_proportional_to_the_number_of_windows(sizes_405b):
    sizes, _ = sizes_405b
    seconds = [
        sum(make_plan(settings(), replace(sizes, num_blocks=1 + blocks), "cuda", RATES).seconds.values())
        for blocks in (25, 100)
    ]
    assert seconds[1] == pytest.approx(4 * seconds[0], rel=0.01)  # the head and the start add a constant


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
def test_planned_size_of_the_result_equals_the_size_that_a_run_writes(tiny_models, tmp_path, family, scheme):
    """The plan does not count the headers of files and the shape that is stored with each layer."""
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
    sizes = sizes_of(Path(config.model))
    plan = make_plan(config, sizes, "cpu")
    out = quantize(config)
    written = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    headers = {path.name: 8 + int.from_bytes(path.read_bytes()[:8], "little") for path in out.glob("*.safetensors")}
    blocks = sum(size - headers[name] for name, size in written.items() if name.startswith("block"))
    shapes = sizes.num_blocks * len(sizes.layers) * 16
    assert blocks - shapes == pytest.approx(plan.disk["blocks"], rel=0.02)
    assert written["rest.safetensors"] - headers["rest.safetensors"] == plan.disk["rest of the model"]


def test_every_suggested_setting_needs_less_of_something(sizes_405b):
    sizes, _ = sizes_405b
    config = settings(num_samples=128)
    plan = make_plan(config, sizes, "cuda", RATES)
    others = {flags: make_plan(other, sizes, "cuda", RATES) for flags, other in smaller_settings(config, sizes).items()}
    assert list(others) == [
        "--batch-size 2",
        "--rounding lora_rounding",
        "--rounding gptq --window-size 1 --overlap 0",
        "--window-size 1 --overlap 0",
        "--window-size 1 --overlap 0 --batch-size 1",
        "--seq-len 1024",
        "--num-samples 64",
        "--epochs 3",
    ]
    for other in others.values():
        totals = [
            (sum(getattr(other, name).values()), sum(getattr(plan, name).values()))
            for name in ("vram", "ram", "disk", "seconds")
        ]
        assert any(smaller < larger for smaller, larger in totals)
    lines = plan_lines(replace(plan, smaller=others))
    assert lines[0] == "windows: 125"
    assert any(line.startswith("device memory: ") for line in lines)
    (row,) = (line.split() for line in lines if line.startswith("  --batch-size 2 "))
    assert float(row[2]) == pytest.approx(others["--batch-size 2"].largest("vram") / GIB, abs=0.005)


def test_measured_rates_are_plausible():
    layers = ((64, 64), (128, 64))
    rates = measure_rates(settings(num_samples=4, seq_len=64), layers, torch.device("cpu"), torch.float32)
    assert rates.product >= 0
    assert rates.weight > 0
    assert 0 < rates.value < 1e-6


def test_eager_attention_keeps_a_matrix_of_scores_for_every_head(tiny_models):
    """BLOOM and Gemma 2 have only eager attention in transformers. Llama has fused attention, which keeps no scores."""
    of = {family: sizes_of(tiny_models[family]) for family in ("bloom", "gemma2", "llama")}
    assert {family: sizes.eager_heads for family, sizes in of.items()} == {"bloom": 4, "gemma2": 4, "llama": 0}
    config = settings(num_samples=8, seq_len=64)
    eager, fused = (make_plan(config, sizes, "cpu") for sizes in (of["bloom"], replace(of["bloom"], eager_heads=0)))
    batch = config.reconstruction.batch_size
    assert eager.ram["activations"] - fused.ram["activations"] == 3 * 8 * 4 * batch * 64 * 64


def test_end_to_end_stage_needs_five_float32_values_per_scale_in_every_memory_mode(sizes_405b):
    """The scales of all blocks are in memory together, so the memory modes, which save memory in a window, do not help."""
    sizes, _ = sizes_405b
    config = settings(num_samples=128)
    whole = replace(config, reconstruction=replace(config.reconstruction, end_to_end_epochs=2))
    plans = [
        make_plan(whole, sizes, "cuda", memory_mode=mode)
        for mode in (MemoryMode(), MemoryMode(activation_checkpointing=True, offload=True))
    ]
    scales = sum(rows * columns // 32 for rows, columns in sizes.layers.values())
    assert plans[0].vram["step sizes"] == plans[1].vram["step sizes"] == 126 * 20 * scales
    with pytest.raises(DeviceMemoryError, match=r"These settings fit: .*--end-to-end-epochs 0"):
        fitting_plan(replace(whole, max_vram=48 << 30), sizes, "cuda")


def test_missing_models_and_settings_without_blocks_are_refused(tmp_path, tiny_models):
    with pytest.raises(InputError, match="no such folder"):
        sizes_of(tmp_path / "nowhere")
    sizes = sizes_of(tiny_models["llama"])
    with pytest.raises(UsageError, match="leave none of the 4 blocks"):
        make_plan(replace(settings(), keep_first=4), sizes, "cpu")


def test_fitting_plan_chooses_the_first_memory_mode_within_the_limits(sizes_405b):
    """Streams on disk are tried first, then activation checkpointing, then offloading. The error names settings that fit."""
    sizes, _ = sizes_405b
    config = settings(num_samples=128)
    modes = [
        MemoryMode(),
        MemoryMode(activation_checkpointing=True),
        MemoryMode(activation_checkpointing=True, offload=True),
    ]
    plain, checkpointing, offloading = (make_plan(config, sizes, "cuda", RATES, mode) for mode in modes)
    assert plain.largest("vram") > checkpointing.largest("vram") > 3 * 2 * sizes.weights + offloading.largest("vram")
    assert sum(checkpointing.seconds.values()) > sum(plain.seconds.values())
    assert offloading.disk["layers of a window"] > 2 * 4 * sizes.weights
    assert offloading.bytes_read > checkpointing.bytes_read + 2 * 4 * sizes.weights * plain.windows
    for limit, mode in (
        (plain.largest("vram"), modes[0]),
        (plain.largest("vram") - 1, modes[1]),
        (checkpointing.largest("vram"), modes[1]),
        (checkpointing.largest("vram") - 1, modes[2]),
        (offloading.largest("vram"), modes[2]),
    ):
        assert fitting_plan(replace(config, max_vram=limit), sizes, "cuda").memory_mode == mode
    with pytest.raises(
        DeviceMemoryError, match=r"--max-vram .* GiB: this run needs .*\. These settings fit: --batch-size 2 \("
    ):
        fitting_plan(replace(config, max_vram=offloading.largest("vram") - 1), sizes, "cuda")
    with pytest.raises(DeviceMemoryError, match=r"No smaller setting fits; use a higher limit\."):
        fitting_plan(replace(config, max_ram=1 << 30), sizes, "cuda")


@pytest.mark.parametrize(
    ("text", "size"), [("16GiB", 16 << 30), ("1.5 gb", 1_500_000_000), ("800MiB", 800 << 20), ("2TB", 2 * 10**12)]
)
def test_sizes_with_a_unit_are_parsed(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["16", "GiB", "16 PiB", "-1GiB", "1e3GB", ""])
def test_text_that_is_not_a_size_is_refused(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


@pytest.fixture(scope="module")
def sizes_with_experts(tmp_path_factory):
    """Sizes of a model of two blocks, each with four layers of attention of 64 x 64 and eight experts of 3 x 64 x 128."""
    settings = {"num_hidden_layers": 2, "num_experts": 8, "moe_intermediate_size": 128, "num_key_value_heads": 4}
    return sizes_of(save_model(tmp_path_factory.mktemp("experts") / "model", "qwen3_moe", **settings))


def test_all_experts_count_as_weights_and_those_of_a_token_as_active(sizes_with_experts):
    dense, expert = 4 * 64 * 64, 3 * 64 * 128
    assert sizes_with_experts.weights == dense + 8 * expert
    assert sizes_with_experts.active == dense + 2 * expert
    assert sizes_with_experts.outputs == 4 * 64 + 2 * (128 + 128 + 64)


def test_closed_form_needs_the_gram_matrices_of_all_experts(sizes_with_experts, sizes_405b):
    """The largest stages: down_proj of eight experts with 128 columns, and down_proj of the dense model with 53,248 columns."""
    config = replace(
        settings(), window=WindowConfig(size=1, overlap=0), reconstruction=ReconstructionConfig(rounding="gptq")
    )
    for sizes, square in ((sizes_with_experts, 8 * 128**2), (sizes_405b[0], 53248**2)):
        parts = closed_form_bytes(config, sizes)
        assert parts["Gram matrices"] == 4 * 4 * square
        assert make_plan(config, sizes, "cpu").largest("ram") >= sum(parts.values())


def test_work_of_codes_in_closed_form_is_that_counted_by_hand(sizes_with_experts):
    """Attention reads inputs of 64 columns: one for q, k and v, one for o. An expert of 64 x 128 reads inputs of 64 and of 128 columns.

    Two of eight experts compute a token. Experts in a window have no cross matrix, unless their inputs are quantized.
    """
    sizes, tokens, rounding = sizes_with_experts, 16 * 32, ReconstructionConfig(rounding="gptq")
    config = replace(
        settings(num_samples=16, seq_len=32), window=WindowConfig(size=1, overlap=0), reconstruction=rounding
    )

    def cost(tokens, rows, columns, grams):
        return 2 * grams * tokens * columns**2 + 5 * columns**3 + (6 if grams == 1 else 14) * rows * columns**2

    attention = cost(tokens, 3 * 64, 64, 2) + cost(tokens, 64, 64, 2)
    experts = {grams: 8 * (cost(tokens / 4, 2 * 128, 64, grams) + cost(tokens / 4, 64, 128, grams)) for grams in (1, 2)}
    assert closed_form_flop(config, sizes) == attention + experts[1]
    quantized = replace(config, scheme=Scheme(num_bits=4, group_size=32, activation_bits=8))
    assert closed_form_flop(quantized, sizes) == attention + experts[2]
    alone = replace(config, reconstruction=replace(rounding, experts="alone"))
    assert closed_form_flop(alone, sizes.dense) == attention
    assert closed_form_flop(alone, sizes.routed) == experts[2]
    assert (closed_form_passes(sizes), closed_form_passes(sizes.dense)) == (2 * 2 + 2, 2 * 2)
    square = dict.fromkeys(sizes.layers, (64, 64))  # as wide inside as outside
    assert closed_form_passes(replace(sizes, layers=square)) == 2 * 2 + 2
    plain = replace(config, reconstruction=replace(rounding, rounding="nearest"))
    found, basis = (make_plan(one, sizes, "cpu", RATES) for one in (config, plain))
    assert found.seconds["codes in closed form"] == pytest.approx(2 * (attention + experts[1]) * RATES.product / 6)
    assert "codes in closed form" not in basis.seconds
    assert found.flop - basis.flop > 2 * (attention + experts[1])
    assert [mode.activation_checkpointing for mode in memory_modes(config, sizes)] == [False, False, True, True]


def test_layers_with_more_bits_and_in_full_precision_take_more_disk_space(sizes_with_experts):
    def packed(**settings):
        config = QuantizeConfig(
            model="m",
            out="o",
            scheme=Scheme(num_bits=4, group_size=32),
            calibration=CalibrationConfig(dataset="d"),
            **settings,
        )
        return make_plan(config, sizes_with_experts, "cpu").disk["blocks"]

    down = 2 * 8 * 64 * 128
    assert packed(override=("down_proj=W8",)) - packed() == down // 2
    assert packed(ignore=("down_proj",)) - packed() == 3 * down // 2


def compared_method_names(source):
    """Lines of Python source that compare something with the name of a rounding method."""
    compared = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare | ast.MatchValue)]
    return sorted(
        part.lineno
        for node in compared
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and part.value in get_args(RoundingName)
    )


def test_only_rounding_methods_and_settings_compare_the_name_of_a_rounding_method():
    """Planning and the pipeline use what a method declares, so a new method needs no change of theirs."""
    example = 'if a == "nearest":\n    b\nc = d in ("x", "signround")\ne = f(mode="nearest")'
    assert compared_method_names(example) == [1, 3]
    allowed = {PACKAGE / "config.py", PACKAGE / "profiles.py", *(PACKAGE / "rounding").glob("*.py")}
    files = set(PACKAGE.rglob("*.py")) - allowed
    assert len(files) > 50
    found = {str(path.relative_to(PACKAGE)): compared_method_names(path.read_text()) for path in sorted(files)}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_plan_warns_of_a_result_that_programs_do_not_load(tiny_models):
    """The same settings give no warning with one scale per channel."""
    parts = {"with_time": False, "check_out": False, "check_dataset": False}
    scheme = Scheme(num_bits=8, group_size=32, activation_bits=8)
    grouped = plan_of(settings(tiny_models["llama"], scheme), **parts)
    (warning,) = grouped.to_dict()["warnings"]
    assert "Use --group-size -1." in warning
    assert plan_lines(grouped)[-1] == f"warning: {warning}"
    assert not plan_of(settings(tiny_models["llama"], replace(scheme, group_size=None)), **parts).warnings
    (warning,) = plan_of(settings(tiny_models["qwen3_moe"], replace(scheme, group_size=None)), **parts).warnings
    assert warning.startswith("the experts are stored as int-quantized, which transformers 5.24 does not load.")


OFFLOADED = MemoryMode(activation_checkpointing=True, offload=True)


def test_reading_and_writing_take_the_time_that_computing_does_not_hide(sizes_405b):
    """Source and streams are read ahead and written behind. The computation waits for offloaded layers and for finished blocks."""
    sizes, _ = sizes_405b
    config, streams = settings(num_samples=128), ("source", "streams")
    idle, busy = (Rates(product, 0, 0, DISKS) for product in (0, 1))
    hidden = make_plan(config, sizes, "cpu", busy)
    assert hidden.seconds["reading"] == 0
    waited = sum(size for part, size in hidden.written.items() if part not in streams)
    assert hidden.seconds["writing"] == pytest.approx(waited / 1e9)
    assert hidden.seconds_total == sum(hidden.seconds.values())
    shown = make_plan(config, sizes, "cpu", idle)
    ahead = {
        "reading": shown.read["source"] / 4e9 + shown.read["streams"] / 2e9,
        "writing": shown.written["streams"] / 1e9,
    }
    left = 1 - shown.seconds["starting"] / sum(ahead.values())
    assert shown.seconds["reading"] == pytest.approx(ahead["reading"] * left)
    assert shown.seconds["writing"] == pytest.approx(ahead["writing"] * left + waited / 1e9)
    assert "reading" not in make_plan(config, sizes, "cpu", RATES).seconds


def test_offloaded_layers_are_read_from_the_page_cache_only_if_their_file_fits(sizes_405b):
    sizes, _ = sizes_405b
    config, offloaded = settings(num_samples=128), "offloaded layers"
    needed = make_plan(config, sizes, "cuda", memory_mode=OFFLOADED)
    fits = needed.disk["layers of a window"] + needed.largest("ram")
    for memory, rate in ((fits, 8e9), (fits - 1, 2e9)):
        rates = Rates(1, 0, 0, replace(DISKS, memory=memory))
        made = make_plan(config, sizes, "cuda", rates, OFFLOADED)
        assert made.seconds["reading"] == pytest.approx(made.read[offloaded] / rate)
    assert made.bus[offloaded] == made.read[offloaded] + made.written[offloaded]
    assert made.seconds["copying to the device"] == pytest.approx(made.bus[offloaded] / 16e9)
    limited = make_plan(replace(config, max_ram=fits - 1), sizes, "cuda", Rates(1, 0, 0, DISKS), OFFLOADED)
    assert limited.seconds["reading"] == made.seconds["reading"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_memory_mode_takes_less_time_than_the_one_before(sizes_405b, device):
    """The first mode that fits, which a run takes without measuring anything, is therefore the fastest."""
    sizes, _ = sizes_405b
    rates = replace(RATES, disks=DISKS)
    config = settings(num_samples=128)
    times = [make_plan(config, sizes, device, rates, mode).seconds_total for mode in memory_modes(config, sizes)]
    assert times == sorted(times)
    assert len(set(times)) == 3  # reading streams is hidden by computing


def test_a_plan_compares_the_ways_and_says_which_one_the_run_takes(sizes_405b):
    sizes, _ = sizes_405b
    config = replace(settings(num_samples=128), max_vram=30 << 30)
    rates = replace(RATES, disks=DISKS)
    made = compared(config, sizes, "cuda", fitting_plan(config, sizes, "cuda", rates), rates)
    names = "all layers in memory", "activation checkpointing", "layers on disk"
    assert list(made.modes) == [each for name in names for each in (name, f"{name}, streams on disk")]
    assert [plan.exceeded for plan in made.modes.values()] == ["--max-vram 30.00 GiB"] * 4 + [None] * 2
    assert made.way == "layers on disk"
    lines = plan_lines(made)
    assert (
        'the run takes: layers on disk (the first that fits: "all layers in memory", "all layers in memory, streams on disk", '
        '"activation checkpointing", "activation checkpointing, streams on disk" would exceed --max-vram 30.00 GiB)'
        in lines
    )
    (header,) = (line for line in lines if line.startswith("  way "))
    for column in ("device memory", "memory", "copied to device", "disk", "read", "written", "time", "fits"):
        assert column in header
    rows = {name: line for line in lines for name in (*made.modes, *made.smaller) if line.startswith(f"  {name}  ")}
    assert list(rows) == [*made.modes, *made.smaller]
    assert rows["all layers in memory"].endswith("no: --max-vram 30.00 GiB")
    assert f"{made.modes['all layers in memory'].largest('vram') / GIB:,.2f}" in rows["all layers in memory"]
    assert rows["layers on disk"].endswith("yes")
    values = json.loads(json.dumps(made.to_dict()))
    assert values["way"] == "layers on disk"
    assert values["modes"]["all layers in memory"]["exceeded"] == "--max-vram 30.00 GiB"
    assert values["bytes_read"] == sum(values["read"].values()) == values["modes"]["layers on disk"]["bytes_read"]
    assert values["smaller"]["--batch-size 2"]["memory_mode"]["offload"]
    unlimited = compared(settings(), sizes, "cuda", fitting_plan(settings(), sizes, "cuda"), None)
    assert "the run takes: all layers in memory (the fastest, and no limit is set)" in plan_lines(unlimited)


def test_a_run_that_reads_its_source_many_times_is_advised_of_a_setting_that_cuts_it(sizes_405b):
    """The first setting that cuts the bytes read by 5 times and fits is advised, with both figures. The wear of the disk is a warning."""
    sizes, _ = sizes_405b
    made = make_plan(settings(num_samples=128), sizes, "cuda", memory_mode=OFFLOADED)
    small = make_plan(settings(num_samples=128), sizes, "cuda")
    smaller = {"--a": made, "--b": replace(small, exceeded="--max-ram 1.00 GiB"), "--c": small, "--d": small}
    cut, worn = advice(made, smaller)
    assert cut == (
        f"this run reads {made.bytes_read / 1e12:,.0f} TB from disk, {made.bytes_read / made.source:,.0f} times its source."
        f" With --c it would read {small.bytes_read / 1e12:,.2f} TB; the result changes."
    )
    assert worn == (
        f"this run writes {made.bytes_written / 1e12:,.0f} TB to disk, {made.bytes_written / 600e12:.0%} of the endurance of a"
        " common SSD of 1 TB (600 TB)."
    )
    assert list(advice(made, {"--a": made})) == [worn]
    few = replace(small, read={"source": 20 * small.source})
    assert not list(advice(few, {"--d": replace(small, read={})}))
    for written, count in ((ENDURANCE // 10, 0), (ENDURANCE // 10 + 1, 1)):
        assert len(list(advice(replace(small, written={"streams": written}), {}))) == count


def test_bytes_of_experts_that_are_reconstructed_alone_are_those_counted_by_hand(sizes_with_experts):
    """Two blocks of 8 experts of 3 x 64 x 128 weights, 2 for each token; windows of one; 16 segments of 32 tokens, 14 to train on."""
    sizes, expert, tokens = sizes_with_experts, 3 * 64 * 128, 16 * 32
    window = replace(settings(num_samples=16, seq_len=32), window=WindowConfig(size=1, overlap=0))
    config = replace(window, reconstruction=replace(window.reconstruction, experts="alone", batch_size=2, epochs=3))
    packed = 8 * (expert // 2 + expert // 32 * 2)  # codes of 4 bits, scales of 2 bytes for 32 weights
    attention, store = 4 * 64 * 64, tokens * 64 * 2
    plain, made = make_plan(window, sizes, "cpu"), make_plan(config, sizes, "cpu")
    dense = 2 * attention + sizes.block_bytes - 2 * sizes.weights
    ends = sizes.ends_bytes + sizes.outer_read
    assert made.read["source"] == 2 * dense + 2 * 4 * 2 * 8 * expert + ends
    assert plain.read["source"] == 2 * (dense + 2 * 8 * expert) + ends
    assert made.read["finished experts"] == 2 * 2 * packed
    assert made.written["finished experts"] == 2 * packed
    assert made.written["blocks"] == plain.written["blocks"]
    assert made.written["streams"] == plain.written["streams"]
    assert made.ram["inputs of experts"] == 2 * store
    assert made.ram["weights"] == dense
    assert made.ram["weights of an expert"] == expert * (2 + 4)
    assert made.ram["finished experts"] == 8 * expert + packed
    on_disk = make_plan(config, sizes, "cpu", memory_mode=MemoryMode(expert_inputs_on_disk=True))
    assert "inputs of experts" not in on_disk.ram
    passes = (3 * 14 + 2 * 2) / 16
    assert on_disk.read["inputs of experts"] == int(2 * store * (12 * 2 + 4 + passes))
    assert on_disk.written["inputs of experts"] == 2 * store * (5 * 2 + 4)
    assert on_disk.disk["inputs of experts"] == 8 * store
    assert on_disk.disk["other layers of a block"] == 2 * attention + attention // 32 * 8  # rounding values and scales
    on_device = make_plan(config, sizes, "cuda")
    assert on_device.bus["inputs of experts"] == 2 * tokens * 2 * 64 * (8 * 2 + 5 * 4)
    # each token passes 6 times through its experts, twice an eighth for the loss, and 3 times in training by 14 of the 16 segments
    passes = 6 + 2 * 2 / 16 + 3 * 3 * 14 / 16
    alone = (
        2 * 2 * tokens * 2 * expert * passes + 2 * 3 * 7 * 8 * expert * 30
    )  # signround takes 30 for each weight and step
    # the other layers run four times more on all tokens, for the inputs and the residuals of experts
    alone += 2 * 2 * tokens * 4 * (attention + 32 * 64)
    rest = replace(config, reconstruction=replace(config.reconstruction, experts="window"))
    assert made.flop - alone == pytest.approx(make_plan(rest, replace(sizes.dense, routed=None), "cpu").flop)


def test_all_tokens_for_all_experts_are_planned(sizes_with_experts):
    """With --calibrate-all-experts, every token passes every expert once more: 8 experts instead of 2, so 4 passes more."""
    sizes, tokens, expert = sizes_with_experts, 16 * 32, 3 * 64 * 128
    config = replace(settings(num_samples=16, seq_len=32), window=WindowConfig(size=1, overlap=0))
    config = replace(config, reconstruction=replace(config.reconstruction, experts="alone"))
    everything = replace(config, calibration=replace(config.calibration, all_experts=True))
    on_disk = MemoryMode(expert_inputs_on_disk=True)
    few, many = (make_plan(each, sizes, "cpu", memory_mode=on_disk) for each in (config, everything))
    assert many.flop - few.flop == 2 * 2 * tokens * 8 * expert
    assert many.read["inputs of experts"] - few.read["inputs of experts"] == 2 * 8 * tokens * 64 * 2


def test_codes_of_experts_in_closed_form_need_the_inputs_of_both_streams(sizes_with_experts):
    config = replace(settings(num_samples=16, seq_len=32), window=WindowConfig(size=1, overlap=0))
    trained, gptq = (
        make_plan(
            replace(config, reconstruction=replace(config.reconstruction, experts="alone", rounding=rounding)),
            sizes_with_experts,
            "cuda",
        )
        for rounding in ("signround", "gptq")
    )
    assert gptq.ram["inputs of experts"] == trained.ram["inputs of experts"] // 2 * 3


def test_a_405b_model_on_a_small_gpu_is_advised_of_a_window_that_stays_in_memory(sizes_405b):
    """Offloaded, a window of two blocks reads its source thousands of times; one block at batch size 1 stays in 24 GB."""
    sizes, _ = sizes_405b
    config = settings(scheme=Scheme(num_bits=4, group_size=128), num_samples=128)
    config = replace(config, max_vram=24 * 10**9)
    made = compared(config, sizes, "cuda", fitting_plan(config, sizes, "cuda"), None)
    assert made.way == "layers on disk"
    assert made.smaller["--window-size 1 --overlap 0 --batch-size 1"].way == "all layers in memory"
    cut, _ = advice(made, made.smaller)
    assert "With --window-size 1 --overlap 0 --batch-size 1 it would read 0.84 TB" in cut


def test_experts_alone_is_a_way_for_mixtures_only(sizes_with_experts, sizes_405b):
    flags = "--experts alone --window-size 1 --overlap 0"
    assert flags not in smaller_settings(settings(), sizes_405b[0])
    alone = smaller_settings(settings(), sizes_with_experts)[flags]
    assert (alone.reconstruction.experts, alone.window.size) == ("alone", 1)
    assert not any("alone" in other for other in smaller_settings(alone, sizes_with_experts))
    names = [
        make_plan(alone, sizes_with_experts, "cuda", memory_mode=mode).way
        for mode in memory_modes(alone, sizes_with_experts)
    ]
    assert names[::2] == [
        "all layers in memory",
        "activation checkpointing",
        "all layers in memory, inputs of experts on disk",
        "activation checkpointing, inputs of experts on disk",
        "layers on disk",
        "layers on disk, inputs of experts on disk",
    ]
    assert names[1:3] == ["all layers in memory, streams on disk", "activation checkpointing"]
    assert names[-1] == "layers on disk, inputs of experts and streams on disk"


def test_measuring_the_disks_leaves_nothing_behind(tmp_path):
    shard = tmp_path / "shard.safetensors"
    shard.write_bytes(bytes(9 << 20))
    before = sorted(tmp_path.rglob("*"))
    found = measure_disks(tmp_path / "a" / "b" / "OUT.run", [shard], torch.device("cpu"))
    assert sorted(tmp_path.rglob("*")) == before
    assert found.folder == str(tmp_path)
    assert min(found.read, found.write, found.source, found.cached, found.memory) > 1 << 20
    assert found.bus is None
    assert measure_disks(tmp_path, [], torch.device("cpu")).source > 0
    with pytest.raises(StorageError, match=r"^/proc/.*scratch failed: "):
        measure_disks(Path("/proc/OUT.run"), [shard], torch.device("cpu"))


def test_a_plan_says_if_the_disk_could_not_be_measured(tiny_models):
    config = replace(settings(tiny_models["llama"], num_samples=8, seq_len=SEQ_LEN), run_dir="/proc/OUT.run")
    made = plan_of(config, check_out=False, check_dataset=False)
    assert made.disks is None
    assert {"reading", "writing"}.isdisjoint(made.seconds)
    assert made.warnings[0].startswith("the time of the disk is not counted. /proc/")
    measured = plan_of(replace(config, run_dir=None), check_out=False, check_dataset=False)
    assert {"reading", "writing"} < set(measured.seconds)
    assert any(line.startswith("speed of disks: ") for line in plan_lines(measured))
