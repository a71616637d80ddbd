"""Export to other formats. Exported weights are read back by code that shares nothing with the export.

The readers of GPTQ and AWQ are plain loops over bits after the descriptions of the formats, and GGUF is read with the package gguf.
"""

import errno
import json
import os

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cbqstream import quantize
from cbqstream.calibration.segments import load_segments
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.commands.export import export
from cbqstream.errors import InputError, StorageError, UsageError
from cbqstream.evaluation.model import open_model
from cbqstream.packed.exports import EXPORTS
from cbqstream.packed.packed_checkpoint import PackedCheckpoint
from cbqstream.records import Compute
from cbqstream.runtime.interruption import Interrupted
from cbqstream.scheme import Scheme
from perplexities import plain_perplexity, streamed_perplexity
from tiny import SEQ_LEN, VOCAB, save_model, save_tokenizer

CPU = torch.device("cpu")
COMPUTE = Compute(CPU, torch.float32, 4)
SYMMETRIC, ASYMMETRIC = Scheme(num_bits=4, group_size=32), Scheme(num_bits=4, group_size=32, symmetric=False)
EIGHT, CHANNEL = Scheme(num_bits=8, group_size=16), Scheme(num_bits=4, group_size=None)


def field(word, place, bits):
    """Unsigned value of the field number `place` of an int32 that is divided into fields of `bits` bits."""
    return ((int(word) & 0xFFFFFFFF) >> (place * bits)) & ((1 << bits) - 1)


def read_gptq(tensors, layer, bits, offset):
    """Weight of a GPTQ layer after the description of GPTQModel: w[i, o] = s[g, o] (q[i, o] - z[g, o]) with g = g_idx[i]."""
    qweight, qzeros, scales, g_idx = (
        tensors[f"{layer}.{part}"].numpy() for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    per_word = 32 // bits
    weight = np.zeros((scales.shape[1], len(g_idx)), dtype=np.float32)
    for row in range(weight.shape[0]):
        for column, group in enumerate(g_idx):
            code = field(qweight[column // per_word, row], column % per_word, bits)
            zero = field(qzeros[group, row // per_word], row % per_word, bits) + offset
            weight[row, column] = np.float32(scales[group, row]) * (code - zero)
    return torch.from_numpy(weight)


def read_awq(tensors, layer, group_size):
    """Weight of an AWQ layer as the gemm kernels of AutoAWQ read it: nibble j of word n is output 8 n + (0, 4, 1, 5, 2, 6, 3, 7)^-1 [j]."""
    qweight, qzeros, scales = (tensors[f"{layer}.{part}"].numpy() for part in ("qweight", "qzeros", "scales"))
    place_of = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}  # AWQ_REVERSE_ORDER
    weight = np.zeros((scales.shape[1], len(qweight)), dtype=np.float32)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            group, place = column // group_size, place_of[row % 8]
            code, zero = field(qweight[column, row // 8], place, 4), field(qzeros[group, row // 8], place, 4)
            weight[row, column] = np.float32(scales[group, row]) * (code - zero)
    return torch.from_numpy(weight)


def tensors_of(folder):
    """All tensors of a checkpoint by name."""
    return {name: value for shard in folder.glob("*.safetensors") for name, value in load_file(shard).items()}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("gptq", SYMMETRIC),
        ("gptq", CHANNEL),
        ("gptq", EIGHT),
        ("gptq_v2", SYMMETRIC),
        ("gptq_v2", EIGHT),
        ("awq", SYMMETRIC),
        ("awq", ASYMMETRIC),
        ("dense", ASYMMETRIC),
    ],
)
def test_exported_weights_equal_the_quantized_weights(make_config, tmp_path, name, scheme):
    """Weights are compared exactly, or after rounding to bfloat16 if the format is dense. Block 3 is in full precision.

    Tensors that are not quantized are copied, as is generation_config.json.
    """
    made = quantize(make_config(scheme=scheme, keep_last=1))
    out = export(made, tmp_path / "exported", name)
    meta_model, source = open_model(made)
    tensors, quantized = tensors_of(out), 0
    for spec in meta_model.blocks:
        for local in spec.linears:
            layer = f"{spec.prefix}.{local}"
            expected = source.read(f"{layer}.weight", device=CPU)
            if spec.index == 3 or name == "dense":
                assert torch.equal(tensors[f"{layer}.weight"], expected.to(torch.bfloat16))
                continue
            quantized += 1
            if name == "awq":
                found = read_awq(tensors, layer, scheme.group_size)
            else:
                found = read_gptq(tensors, layer, scheme.num_bits, 1 if name == "gptq" else 0)
            assert torch.equal(found, expected), layer
    assert quantized == (0 if name == "dense" else 21)
    others = [spec.tensors[local] for spec in meta_model.blocks for local in spec.tensors if "norm" in local]
    for tensor in (*others, "model.embed_tokens.weight", "lm_head.weight"):
        copy, original = Checkpoint.open(out), Checkpoint.open(made)
        assert b"".join(copy.raw(copy.infos[tensor])) == b"".join(original.raw(original.infos[tensor]))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert (out / "generation_config.json").read_bytes() == (made / "generation_config.json").read_bytes()


def test_a_dense_export_is_a_plain_checkpoint_with_the_perplexity_of_the_quantized_model(make_config, tokens, tmp_path):
    made = quantize(make_config(scheme=ASYMMETRIC))
    out = export(made, tmp_path / "dense", "dense")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    plain = plain_perplexity(out, ids)
    assert streamed_perplexity(out, ids) == pytest.approx(plain, rel=1e-5)
    assert streamed_perplexity(made, ids) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize(("name", "group_size"), [("gptq", 32), ("awq", 32)])
def test_the_exported_config_lists_the_layers_that_are_not_quantized(make_config, tmp_path, name, group_size):
    """Block 0, all layers o_proj and the head are in full precision."""
    out = export(quantize(make_config(keep_first=1, ignore=("o_proj",))), tmp_path / "exported", name)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == (name, 4, group_size)
    patterns = config["dynamic"] if name == "gptq" else config["modules_to_not_convert"]
    for path, whole in (("lm_head", True), ("model.layers.0.mlp.up_proj", True), ("model.layers.1.mlp.up_proj", False)):
        pattern = "-:^" + path.replace(".", r"\.") + "$" if name == "gptq" else path
        assert (pattern in patterns) == whole
    assert any("o_proj" in pattern for pattern in patterns)
    if name == "gptq":  # transformers and vLLM use this list, and ignore `dynamic`
        (modules,) = config["modules_in_block_to_quantize"]
        stored = Checkpoint.open(out).infos
        assert {f"{path}.qweight" for path in modules} == {name for name in stored if name.endswith(".qweight")}
        assert len(modules) == 3 * 6


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_experts_in_full_precision_are_listed_under_one_name(make_config, tmp_path, name):
    """Inference engines look all experts of a block up under one name."""
    config = make_config("qwen3_moe", keep_first=1, reconstruction={"rounding": "nearest"})
    out = export(quantize(config), tmp_path / "exported", name)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    together = "-:^model\\.layers\\.0\\.mlp\\.experts$" if name == "gptq" else "model.layers.0.mlp.experts"
    patterns = config["dynamic"] if name == "gptq" else config["modules_to_not_convert"]
    assert together in patterns
    assert not any("layers.1.mlp.experts" in pattern.replace("\\", "") for pattern in patterns)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "gptq",
            {"scheme": ASYMMETRIC},
            r"format gptq cannot represent zero points .* exactly\. Formats that can: awq; dense rounds the weights\.",
        ),
        (
            "gptq",
            {"scheme": Scheme(num_bits=3, group_size=32)},
            r"cannot represent 3 bits .*\. No other format can; dense rounds",
        ),
        (
            "awq",
            {"scheme": EIGHT},
            r"cannot represent 8 bits \(4 is supported\) exactly\. Formats that can: gptq, gptq_v2; dense",
        ),
        (
            "awq",
            {"scheme": CHANNEL},
            r"cannot represent one scale per channel exactly\. Formats that can: gptq, gptq_v2, gguf; dense",
        ),
        (
            "awq",
            {"scheme": Scheme(num_bits=4, group_size=32, activation_bits=8)},
            r"cannot represent inputs of 8 bits exactly",
        ),
        (
            "awq",
            {"scheme": Scheme(num_bits=4, group_size=8)},
            r"cannot represent groups of 8 \(16, 32, 64, 128 are supported\) exactly\. No other format",
        ),
        (
            "gptq",
            {"scheme": Scheme(num_bits=8, group_size=8)},
            r"cannot represent groups of 8 \(16, .*, 1024 are supported\)",
        ),
        (
            "gptq",
            {"override": ("down_proj=W8",)},
            r"cannot represent layers with different schemes exactly\. Formats that can: gguf; dense",
        ),
        ("exl3", {}, r"format 'exl3' is not supported\. Use dense, gptq, gptq_v2, awq, gguf\."),
    ],
)
def test_a_format_that_cannot_represent_the_weights_is_refused(make_config, tmp_path, name, settings, message):
    made = quantize(make_config(reconstruction={"rounding": "nearest"}, **settings))
    with pytest.raises(UsageError, match=message):
        export(made, tmp_path / "exported", name)
    assert not list(tmp_path.glob("exported*"))


def test_export_needs_a_quantized_model_and_a_free_folder(make_config, tiny_models, tmp_path):
    with pytest.raises(InputError, match=r"the model is not quantized"):
        export(tiny_models["llama"], tmp_path / "exported", "dense")
    made = quantize(make_config(reconstruction={"rounding": "nearest"}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(UsageError, match=r"exists and is not empty"):
        export(made, tmp_path / "full", "dense")
    with pytest.raises(UsageError, match=r"no such folder"):
        export(made, tmp_path / "none" / "exported", "dense")


@pytest.mark.parametrize("name", ["gptq", "awq", "gguf"])
def test_scales_that_float16_cannot_represent_are_refused(make_config, with_tokenizer, tmp_path, name):
    """A checkpoint of another program may have such scales. They are not rounded silently."""
    made = quantize(make_config(model=with_tokenizer("llama"), reconstruction={"rounding": "nearest"}))
    shard = made / "block-00001.safetensors"
    tensors = load_file(shard)
    scale = tensors["model.layers.1.mlp.up_proj.weight_scale"].float()
    tensors["model.layers.1.mlp.up_proj.weight_scale"] = scale + 2.0**-18
    shard.unlink()
    save_file(tensors, shard)
    with pytest.raises(UsageError, match=r"stores scales in float16, which would round them\. Use --format dense"):
        export(made, tmp_path / "exported", name)
    assert not list(tmp_path.glob("exported*"))


@pytest.mark.parametrize("name", ["gptq", "gguf"])
def test_an_export_that_fails_leaves_no_files(make_config, with_tokenizer, tmp_path, monkeypatch, name):
    """The export is interrupted, or the disk is full. A link as the output folder is refused before anything is written."""
    made = quantize(make_config(model=with_tokenizer("llama"), reconstruction={"rounding": "nearest"}))

    def stop(*_):
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(PackedCheckpoint, "packed", stop)
        with pytest.raises(Interrupted):
            export(made, tmp_path / "exported", name)
    assert not list(tmp_path.glob("exported*"))
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match=r"a link or a mount point"):
        export(made, tmp_path / "link", name)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    if name == "gguf":
        with pytest.raises(StorageError, match=r"write failed: No space left on device\. Free some space"):
            export(made, tmp_path / "exported", name)
        assert not list(tmp_path.glob("exported*"))


def test_the_multiples_of_rows_and_columns_that_fill_whole_words():
    for name, (rows, columns) in {"dense": (1, 1), "gptq": (8, 8), "gptq_v2": (8, 8), "awq": (8, 1)}.items():
        assert EXPORTS[name].fills(4) == (rows, columns)


@pytest.fixture
def with_tokenizer(tmp_path):
    """A function that makes a checkpoint of a family with its own byte-level tokenizer."""

    def make(family, vocab_size=304, **options):
        folder = save_model(tmp_path / family, family, vocab_size=vocab_size, **options)
        text = ["the quick brown fox jumps over the lazy dog " * 20, "there then that than"]
        save_tokenizer(folder, text, special_tokens=("<s>", "</s>"))
        return folder

    return make


def halves(rows, heads):
    """Rows in the order of transformers, from rows in the order of llama.cpp; all rows as they are if `heads` is None.

    The two rows of a rotary pair are neighbors in llama.cpp. In transformers, the first rows of all pairs of a head are followed by the
    second rows.
    """
    return rows if heads is None else torch.cat([torch.cat([head[0::2], head[1::2]]) for head in rows.chunk(heads)])


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("llama", {"attention_bias": True}), ("qwen2", {}), ("qwen3", {})]
)
def test_the_package_gguf_reads_the_quantized_weights_and_settings(
    make_config, with_tokenizer, tmp_path, family, options
):
    """Weights, biases, the final norm, the tokenizer and the settings of attention are those of the quantized model."""
    model = with_tokenizer(family, **options)
    made = quantize(make_config(model=model, scheme=SYMMETRIC, keep_last=1, override=("down_proj=W8",)))
    out = export(made, tmp_path / "gguf", "gguf")
    reader = gguf.GGUFReader(out / "model-W4.gguf")
    values = {key: item.contents() for key, item in reader.fields.items()}
    config = json.loads((made / "config.json").read_text())
    assert values["general.architecture"] == family
    assert values[f"{family}.attention.head_count_kv"] == 2
    assert values[f"{family}.attention.key_length"] == config.get("head_dim", 16)
    tokens = values["tokenizer.ggml.tokens"]
    assert (len(tokens), tokens[0], tokens[-1]) == (304, "<s>", "[PAD303]")
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    meta_model, source = open_model(made)
    found = {tensor.name: tensor for tensor in reader.tensors}
    kinds = set()
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    }
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for spec in meta_model.blocks:
        for local, exported in names.items():
            expected = source.read(f"{spec.prefix}.{local}.weight", device=CPU)
            tensor = found[f"blk.{spec.index}.{exported}.weight"]
            kinds.add(tensor.tensor_type.name)
            weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            heads = {"attn_q": 4, "attn_k": 2}.get(exported) if family == "llama" else None
            assert torch.equal(halves(weight, heads), expected.float()), tensor.name
            if f"{spec.prefix}.{local}.bias" in source.tensors():
                bias = torch.from_numpy(found[f"blk.{spec.index}.{exported}.bias"].data.copy())
                expected = source.read(f"{spec.prefix}.{local}.bias", device=CPU)
                assert torch.equal(halves(bias, heads), expected.float()), tensor.name
    assert kinds == {"Q4_0", "Q8_0", "BF16"}
    norm = torch.from_numpy(found["output_norm.weight"].data.copy())
    assert torch.equal(norm, source.read("model.norm.weight", device=CPU).float())


@pytest.mark.parametrize(
    ("family", "settings", "error", "message"),
    [
        ("opt", {}, UsageError, r"gguf: supports llama, mistral, qwen2, qwen3 only"),
        (
            "llama",
            {"scheme": ASYMMETRIC},
            UsageError,
            r"cannot represent groups of 32 \(Q4_K supports multiples of 256",
        ),
        (
            "llama",
            {"scheme": Scheme(num_bits=2, group_size=None)},
            UsageError,
            r"Q2_K has blocks of 256 columns, but model\.layers\.0",
        ),
        ("llama", {}, InputError, r"tokenizer\.json: missing\. Add it, or use another format"),
        ("relu", {}, UsageError, r"gguf: the activation must be silu, not relu"),
    ],
)
def test_a_model_that_gguf_cannot_represent_is_refused(make_config, tmp_path, family, settings, error, message):
    if family == "relu":
        family, settings = "llama", {"model": save_model(tmp_path / "relu", hidden_act="relu")}
    made = quantize(make_config(family, reconstruction={"rounding": "nearest"}, **settings))
    with pytest.raises(error, match=message):
        export(made, tmp_path / "gguf", "gguf")
    assert not list(tmp_path.glob("gguf*"))


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        (
            "tokenizer.json",
            lambda content: content["pre_tokenizer"].update(use_regex=False),
            r"llama\.cpp would split text differently",
        ),
        (
            "tokenizer.json",
            lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
            r"llama\.cpp would split text differently",
        ),
        (
            "tokenizer.json",
            lambda content: content.update(normalizer={"type": "Lowercase"}),
            r"llama\.cpp would split text differently",
        ),
        (
            "tokenizer.json",
            lambda content: content["added_tokens"].append(
                {**content["added_tokens"][0], "id": 304, "content": "<new>"}
            ),
            r"tokenizer\.json: has a token 304, but the model has 304 rows of embeddings\. Resize the embeddings",
        ),
        (
            "config.json",
            lambda content: content.update(pad_token_id=-1),
            r"gguf cannot read the special tokens: invalid value for special token type pad: -1",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_differently_is_refused(
    make_config, with_tokenizer, tmp_path, file, edit, message
):
    made = quantize(make_config(model=with_tokenizer("llama"), reconstruction={"rounding": "nearest"}))
    content = json.loads((made / file).read_text())
    edit(content)
    (made / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        export(made, tmp_path / "gguf", "gguf")
    assert not list(tmp_path.glob("gguf*"))


def test_gguf_has_the_added_tokens_and_the_dtype_of_the_source(make_config, with_tokenizer, tmp_path):
    """The model has a vocab.json without the added tokens beside its tokenizer.json, as many models do.

    Its config.json has no rms_norm_eps, so the default of its class is written.
    """
    model = with_tokenizer("llama")
    content = json.loads((model / "tokenizer.json").read_text())
    (model / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    next_id = 1 + max([*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])])
    plain = {"id": next_id, "content": "<think>", "special": False}
    content["added_tokens"].append({**content["added_tokens"][0], **plain})
    (model / "tokenizer.json").write_text(json.dumps(content))
    for shard in model.glob("*.safetensors"):
        save_file({name: value.to(torch.float16) for name, value in load_file(shard).items()}, shard)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "rms_norm_eps"})
    )
    made = quantize(make_config(model=model, reconstruction={"rounding": "nearest"}))
    reader = gguf.GGUFReader(export(made, tmp_path / "gguf", "gguf") / "model-W4.gguf")
    values = {key: item.contents() for key, item in reader.fields.items()}
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert (tokens[next_id], kinds[next_id]) == ("<think>", gguf.TokenType.USER_DEFINED)
    assert kinds[tokens.index("<s>")] == gguf.TokenType.CONTROL
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    (embedding,) = (tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert embedding.tensor_type.name == "F16"
    source = Checkpoint.open(model).read("model.embed_tokens.weight", device=CPU)
    assert np.array_equal(embedding.data, source.numpy())
