"""Row 20: a model or calibration data that cannot be used is refused with exit code 65 and one line.

Nothing is written before that, except where the values of a weight are bad: weights are read window by window, so a run has begun.
The cases are a catalogue of mistakes. Each one has a number, damages a good model or calibration file, and has a pattern for the message.
Wrong flags are tested in tests/integration/test_cli.py, damaged run directories in test_damage.py and test_surroundings.py.
"""

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import one_line

from quantized import fp8
from tiny import save_model, save_tokenizer


class Bad:
    """A good model in one shard, and a good calibration file, which a case then damages."""

    def __init__(self, folder: Path, single: Path, sharded: Path) -> None:
        self.folder, self.sharded = folder, sharded
        self.model = Path(shutil.copytree(single, folder / "model"))
        self.weights = self.model / "model.safetensors"
        self.tokens: Path | None = None

    def shards(self) -> None:
        """Replace the model by one in several shards, with an index."""
        shutil.rmtree(self.model)
        shutil.copytree(self.sharded, self.model)
        self.weights = sorted(self.model.glob("*.safetensors"))[1]

    def put(self, content: bytes) -> None:
        """Replace the content of the shard."""
        self.weights.write_bytes(content)

    def header(self, change) -> None:
        """Change the parsed header of the shard. If `change` returns bytes, they replace the text of the header."""
        content = self.weights.read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        text = change(entries)
        text = text if isinstance(text, bytes) else json.dumps(entries).encode()
        self.put(len(text).to_bytes(8, "little") + text + content[8 + length :])

    def entry(self, change, name="lm_head.weight") -> None:
        """Change the entry of a tensor in the header of the shard."""
        self.header(lambda entries: change(entries[name]))

    def index(self, change) -> None:
        """Change the index of a model in several shards. If `change` returns text, it replaces the content of the file."""
        self.shards()
        path = self.model / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        text = change(index)
        path.write_text(text if isinstance(text, str) else json.dumps(index))

    def config(self, **changes) -> None:
        """Set fields of config.json."""
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def tensors(self, change) -> None:
        """Change the tensors of the shard."""
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights)

    def in_fp8(self, layer: str = "model.layers.1.mlp.up_proj", **changes) -> None:
        """Store a layer in FP8 with a scale for every block, with other parts or without those that are None."""
        self.config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})

        def store(tensors) -> None:
            parts = {**fp8(tensors.pop(f"{layer}.weight"), (128, 128)), **changes}
            tensors |= {f"{layer}.{part}": value for part, value in parts.items() if value is not None}

        self.tensors(store)

    def calibration(self, name: str, content: bytes | np.ndarray) -> None:
        """Write a calibration file, as bytes or as .npy, and use it in the run."""
        self.tokens = self.folder / name
        if isinstance(content, bytes):
            self.tokens.write_bytes(content)
        else:
            np.save(self.tokens, content)


def replace_by(path: Path, make) -> None:
    path.unlink()
    make(path)


def rename_in(entries, old, new):
    entries[new] = entries.pop(old)


def swap_text(bad, old: bytes, new: bytes):
    bad.header(lambda entries: json.dumps(entries).encode().replace(old, new))


def outside_link(bad):
    bad.shards()
    target = bad.folder / "elsewhere.safetensors"
    bad.weights.rename(target)
    bad.weights.symlink_to(target)


def disagree(bad):
    bad.index(
        lambda index: index["weight_map"].update({"model.norm.weight": sorted(set(index["weight_map"].values()))[0]})
    )


def twice(bad):
    bad.shards()
    bad.tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}))


AGAIN = r" Download the file again, or save it again\."
DEEP = b"[" * 100_000
CASES: dict[str, tuple[Callable[[Bad], object], str]] = {
    "1 empty file": (lambda bad: bad.put(b""), r"{weights}: empty file \(0 bytes\)\. Download it again\."),
    "2 file of seven bytes": (
        lambda bad: bad.put(b"\1" * 7),
        r"{weights}: too short to be safetensors \(7 bytes\)\. .*",
    ),
    "3 git-lfs pointer": (
        lambda bad: bad.put(b"version https://git-lfs.github.com/spec/v1\n"),
        r"{weights}: a git-lfs pointer, not weights\. .*",
    ),
    "4 HTML page": (lambda bad: bad.put(b"<!DOCTYPE html><html>"), r"{weights}: an HTML page, not weights .*"),
    "5 pickle checkpoint in a zip file": (
        lambda bad: bad.put(b"PK\x03\x04" + b"\0" * 99),
        r"{weights}: a pickle checkpoint, which is never read\. .*",
    ),
    "6 pickle checkpoint": (
        lambda bad: bad.put(b"\x80\x02}q\x00." + b"\0" * 99),
        r"{weights}: a pickle checkpoint, .*",
    ),
    "7 GGUF file": (lambda bad: bad.put(b"GGUF" + b"\0" * 99), r"{weights}: a GGUF file\. .*"),
    "8 header above the limit": (
        lambda bad: bad.put((10**9).to_bytes(8, "little") + b"{" + b"\0" * 99),
        r"{weights}: header of 1,000,000,000 bytes exceeds the 100,000,000 limit\." + AGAIN,
    ),
    "9 header longer than the file": (
        lambda bad: bad.put((5000).to_bytes(8, "little") + b"{}"),
        r"{weights}: header is 5000 bytes long, file has 10 \(truncated\?\)\. .*",
    ),
    "10 header is not JSON": (
        lambda bad: bad.header(lambda entries: b"{nothing"),
        r"{weights}: header is not JSON\." + AGAIN,
    ),
    "10 header is not UTF-8": (
        lambda bad: bad.header(lambda entries: b'{"\xff": 1}'),
        r"{weights}: header is not JSON\." + AGAIN,
    ),
    "10 header is a list": (
        lambda bad: bad.header(lambda entries: b"[]"),
        r"{weights}: header is not a JSON object\." + AGAIN,
    ),
    "11 header nested too deeply": (
        lambda bad: bad.header(lambda entries: DEEP),
        r"{weights}: header is not JSON \(too deeply nested\)\." + AGAIN,
    ),
    "12 tensor name appears twice": (
        lambda bad: swap_text(bad, b'"model.norm.weight"', b'"lm_head.weight"'),
        r'{weights}: "lm_head.weight" appears twice in the header\.' + AGAIN,
    ),
    "13 unknown dtype": (
        lambda bad: bad.entry(lambda entry: entry.update(dtype="F99")),
        r'{weights}: tensor "lm_head.weight": dtype F99 is not known\. Convert it to bf16, fp16 or fp32\.',
    ),
    "14 offsets in reverse order": (
        lambda bad: bad.entry(lambda entry: entry.update(data_offsets=[8, 0])),
        r'{weights}: tensor "lm_head.weight": offsets \[8, 0\] are not valid\.' + AGAIN,
    ),
    "14 negative offset": (
        lambda bad: bad.entry(lambda entry: entry.update(data_offsets=[-8, 0])),
        r'{weights}: tensor "lm_head.weight": offsets \[-8, 0\] are not valid\.' + AGAIN,
    ),
    "15 bytes that belong to no tensor": (
        lambda bad: bad.header(lambda entries: entries.pop("lm_head.weight") and None),
        r'{weights}: tensor ".*": bytes overlap or leave a hole\.' + AGAIN,
    ),
    "16 shape and size disagree": (
        lambda bad: bad.entry(lambda entry: entry.update(shape=[3])),
        r'{weights}: tensor "lm_head.weight": shape \[3\] BF16 needs 6 bytes, header gives 12288\.' + AGAIN,
    ),
    "17 size that overflows 64 bits": (
        lambda bad: bad.entry(lambda entry: entry.update(shape=[1 << 33, 1 << 33])),
        r'{weights}: tensor "lm_head.weight": shape is not plausible\.' + AGAIN,
    ),
    "18 empty tensor with a huge side": (
        lambda bad: bad.entry(lambda entry: entry.update(shape=[0, 1 << 40])),
        r'{weights}: tensor "lm_head.weight": shape is not plausible\.' + AGAIN,
    ),
    "19 truncated file": (
        lambda bad: bad.put(bad.weights.read_bytes()[:-100]),
        r"{weights}: file is \d+ bytes, header describes \d+\. Download it again\.",
    ),
    "20 tensor name with a path": (
        lambda bad: bad.header(lambda entries: rename_in(entries, "lm_head.weight", "../x")),
        r'{weights}: tensor name "../x" is empty, a path, too long or not printable\. Save the model with another name\.',
    ),
    "20 tensor name with a terminal code": (
        lambda bad: bad.header(lambda entries: rename_in(entries, "lm_head.weight", "a\x1b[2J\0")),
        r'{weights}: tensor name "a\\x1b\[2J\\x00" is empty, a path, too long or not printable\. Save the model with another name\.',
    ),
    "20 tensor name too long": (
        lambda bad: bad.header(lambda entries: rename_in(entries, "lm_head.weight", "x" * 1025)),
        r'{weights}: tensor name "x{{120}}\.\.\." is empty, a path, too long or not printable\. Save the model with another name\.',
    ),
    "21 metadata that is not text": (
        lambda bad: bad.header(lambda entries: entries.update(__metadata__={"a": 1})),
        r"{weights}: metadata of the header is not text\." + AGAIN,
    ),
    "22 shards without an index": (
        lambda bad: (bad.shards(), (bad.model / "model.safetensors.index.json").unlink()),
        r"{model}: \d+ shards but no model\.safetensors\.index\.json\. .*",
    ),
    "23 index without a weight map": (
        lambda bad: bad.index(lambda index: index.pop("weight_map") and None),
        r"{model}/model\.safetensors\.index\.json: not a weight index \(no weight_map\)\. Download it again\.",
    ),
    "23 index is not JSON": (
        lambda bad: bad.index(lambda index: "{"),
        r"{model}/model\.safetensors\.index\.json: not JSON\. Download it again\.",
    ),
    "28 missing shard": (
        lambda bad: (bad.shards(), bad.weights.unlink()),
        r"{weights}: missing \(\d+ tensors\)\. Download it again\.",
    ),
    "26 shard is a link to the outside": (
        outside_link,
        r"{weights}: a link to .*elsewhere\.safetensors, outside the model\. If you trust it, give --allow-links;"
        r" or copy the file into the folder\.",
    ),
    "27 shard is a pipe": (
        lambda bad: (bad.shards(), replace_by(bad.weights, os.mkfifo)),
        r"{weights}: not a regular file\. Replace it by the shard\.",
    ),
    "27 shard is a folder": (
        lambda bad: (bad.shards(), replace_by(bad.weights, Path.mkdir)),
        r"{weights}: not a regular file\. Replace it by the shard\.",
    ),
    "29 30 index and shards disagree": (
        disagree,
        r'{model}/model\.safetensors\.index\.json: tensor "model.norm.weight": is in model-\S+\.safetensors,'
        r" but the index lists it for model-\S+\.safetensors\. Download the index again\.",
    ),
    "29 tensor that no shard has": (
        lambda bad: bad.index(lambda index: index["weight_map"].update({"x": bad.weights.name})),
        r'{weights}: tensor "x": is in no shard, but model\.safetensors\.index\.json lists it for this one\. Download both again\.',
    ),
    "30 tensor that the index does not list": (
        lambda bad: bad.index(lambda index: index["weight_map"].pop("model.norm.weight") and None),
        r'{model}/\S+: tensor "model.norm.weight": is in this shard, but not in model\.safetensors\.index\.json\. Download both again\.',
    ),
    "30 tensor in two shards": (
        twice,
        r'{weights}: tensor "model.norm.weight": is in this shard and in model-\S+\. Download the model again\.',
    ),
    "26 shard is a link to nothing": (
        lambda bad: (bad.shards(), replace_by(bad.weights, lambda path: path.symlink_to("gone"))),
        r"{weights}: a link to gone, which does not exist\. Restore the file\.",
    ),
    "32 single file beside shards": (
        lambda bad: (
            bad.weights.rename(bad.folder / "aside"),
            bad.shards(),
            (bad.folder / "aside").rename(bad.model / "model.safetensors"),
        ),
        r"{model}: two layouts in one folder: .* Remove one\.",
    ),
    "33 missing config.json": (lambda bad: (bad.model / "config.json").unlink(), r"{model}/config\.json: missing\. .*"),
    "33 config.json is not JSON": (
        lambda bad: (bad.model / "config.json").write_text("[1,"),
        r"{model}/config\.json: not JSON\. Download it again\.",
    ),
    "33 config.json is a list": (
        lambda bad: (bad.model / "config.json").write_text("[]"),
        r"{model}/config\.json: not a JSON object\. Download it again\.",
    ),
    "33 config.json too large": (
        lambda bad: (bad.model / "config.json").write_text(" " * (2 << 20)),
        r"{model}/config\.json: larger than 1 MiB, which is not plausible\. Download it again\.",
    ),
    "33 config.json with a key twice": (
        lambda bad: (bad.model / "config.json").write_text('{"hidden_size": 64, "hidden_size": 32}'),
        r'{model}/config\.json: "hidden_size" appears twice\. Remove one, or download the file again\.',
    ),
    "33 adapter without a model": (
        lambda bad: [
            path.unlink() if path.name != "model.safetensors" else path.rename(bad.model / "adapter_model.safetensors")
            for path in bad.model.iterdir()
        ],
        r"{model}: holds a LoRA adapter \(adapter_model\.safetensors\), whose weights would be left out\."
        r" Merge it into the base model first \(peft: merge_and_unload\), then quantize the merged folder\.",
    ),
    "33 adapter beside a model": (
        lambda bad: (bad.model / "adapter_config.json").write_text("{}"),
        r"{model}: holds a LoRA adapter \(adapter_config\.json\), .*",
    ),
    "34 unknown architecture": (
        lambda bad: bad.config(model_type="\x1b[2Jfoo"),
        r'{model}/config\.json: architecture "\\x1b\[2Jfoo" is not in transformers\. Use another model\.',
    ),
    "35 architecture that needs remote code": (
        lambda bad: bad.config(model_type="foo", auto_map={"AutoModel": "x.y"}),
        r'{model}/config\.json: architecture "foo" needs remote code, which is never run\. Use another model\.',
    ),
    "37 hidden size of zero": (
        lambda bad: bad.config(hidden_size=0),
        r"{model}/config\.json: hidden_size is 0\. It must be .*",
    ),
    "37 negative number of heads": (
        lambda bad: bad.config(num_attention_heads=-4),
        r"{model}/config\.json: num_attention_heads is -4\. It must be .*",
    ),
    "37 hidden size is a float": (
        lambda bad: bad.config(hidden_size=64.0),
        r"{model}/config\.json: hidden_size is 64\.0\. It must be .*",
    ),
    "37 huge vocabulary": (
        lambda bad: bad.config(vocab_size=10**12),
        r"{model}/config\.json: vocab_size is 1000000000000\. It must be .*",
    ),
    "37 number of blocks is text": (
        lambda bad: bad.config(num_hidden_layers="4"),
        r"{model}/config\.json: num_hidden_layers is 4\. It must be .*",
    ),
    "37 more blocks than tensors": (
        lambda bad: bad.config(num_hidden_layers=1 << 20),
        r"{model}/config\.json: num_hidden_layers is 1,048,576, but the weights have 39 tensors\.",
    ),
    "37 negative intermediate size": (
        lambda bad: bad.config(intermediate_size=-1),
        r"{model}/config\.json: intermediate_size is -1\. It must be .*",
    ),
    "37 huge intermediate size": (
        lambda bad: bad.config(intermediate_size=10**12),
        r"{model}/config\.json: intermediate_size is 1000000000000\. It must be .*",
    ),
    "38 weights of a block are missing": (
        lambda bad: bad.config(num_hidden_layers=5),
        r'{model}: tensor "model.layers.4.*": missing from the weights\. Download the model again\.',
    ),
    "38 weights of one block too many": (
        lambda bad: bad.config(num_hidden_layers=3),
        r"{model}: config.json describes 3 blocks, but the weights have 4\.",
    ),
    "39 tensor of another shape": (
        lambda bad: bad.config(intermediate_size=96),
        r"{model}: tensor .*: has shape \[128, 64\], but config.json requires \[96, 64\]\.",
    ),
    "40 weight of integers": (
        lambda bad: bad.tensors(
            lambda tensors: tensors.update(
                {"model.layers.1.mlp.up_proj.weight": torch.ones(128, 64, dtype=torch.int32)}
            )
        ),
        r'{weights}: tensor "model.layers.1.mlp.up_proj.weight": has dtype int32\. Convert it to bf16, fp16 or fp32\.',
    ),
    "40 norm in FP8": (
        lambda bad: bad.tensors(
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)})
        ),
        r'{weights}: tensor "model.norm.weight": has dtype F8_E4M3, which is copied but not computed with\.'
        r" Convert it to bf16, fp16 or fp32\.",
    ),
    "41 missing head": (
        lambda bad: bad.tensors(lambda tensors: tensors.pop("lm_head.weight")),
        r'{model}: tensor "lm_head.weight": missing from the weights\. Download the model again\.',
    ),
    "42 model that is already quantized": (
        lambda bad: bad.config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"{model}/config\.json: the model is already quantized \(bitsandbytes\), which is not decoded\. .*",
    ),
    "42 text model that is already quantized": (
        lambda bad: bad.config(text_config={"quantization_config": {"quant_method": "fp8"}}),
        r"{model}/config\.json: text_config: the model is already quantized \(fp8\) by this description, but none of its weights is\."
        r" Remove the description if the weights are dense, or download them again\.",
    ),
    "42 quantize_config.json of AutoGPTQ": (
        lambda bad: (bad.model / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}'),
        r"{model}/quantize_config\.json: the model is already quantized \(gptq\) by this description, but none .*",
    ),
    "42 description without what is needed": (
        lambda bad: bad.config(quantization_config={"quant_method": "gptq", "group_size": 64}),
        r"{model}/config\.json: the model is already quantized \(gptq\), and its bits, None, are not 2, 3, 4 or 8\. .*",
    ),
    "42 scale of another shape": (
        lambda bad: bad.in_fp8(weight_scale_inv=torch.ones(2, 3)),
        r'{weights}: tensor "model.layers.1.mlp.up_proj.weight_scale_inv": has shape \[2, 3\], but must have \[1, 1\] or .*',
    ),
    "42 scale without codes": (
        lambda bad: (bad.in_fp8(), bad.tensors(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))),
        r'{weights}: tensor "model.layers.1.mlp.up_proj.weight_scale_inv": is a part of the quantized weight .*',
    ),
    "42 codes without a scale": (
        lambda bad: (bad.in_fp8(), bad.in_fp8("model.layers.2.mlp.up_proj", weight_scale_inv=None)),
        r'{weights}: tensor "model.layers.2.mlp.up_proj.weight": has dtype F8_E4M3, which is copied but not computed with\. .*',
    ),
    "43 scale that is not finite": (
        lambda bad: bad.in_fp8(weight_scale_inv=torch.full((1, 1), float("nan"))),
        r'{weights}: tensor "model.layers.1.mlp.up_proj.weight": a scale is not finite\. Download it again, or repair the model\.',
    ),
    "43 codes that are not finite": (
        lambda bad: bad.in_fp8(weight=torch.full((128, 64), float("nan")).to(torch.float8_e4m3fn)),
        r'{weights}: tensor "model.layers.1.mlp.up_proj.weight": 8,192 non-finite values \(first at 0\)\. .*',
    ),
    "43 weight with NaN": (
        lambda bad: bad.tensors(
            lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[17:20].fill_(float("nan"))
        ),
        r'{weights}: tensor "model.layers.1.mlp.up_proj.weight": 3 non-finite values \(first at 17\)\. .*',
    ),
    "45 activations that overflow": (
        lambda bad: bad.tensors(lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)),
        r"block 0-1: [1-4] of 4 segments are not finite\. .*",
    ),
    "46 tokenizer.json is not JSON": (
        lambda bad: ((bad.model / "tokenizer.json").write_text("{"), bad.calibration("c.txt", b"some text " * 99)),
        r"{model}/tokenizer\.json: not JSON\. Download it again\.",
    ),
    "46 tokenizer that transformers cannot load": (
        lambda bad: (
            (bad.model / "tokenizer.json").write_text('{"model": 1}'),
            bad.calibration("c.txt", b"some text " * 99),
        ),
        r"{model}/tokenizer\.json: transformers \S+ cannot load the tokenizer \(.*\)\. Download it again, .*",
    ),
    "46 no tokenizer": (
        lambda bad: bad.calibration("c.txt", b"some text " * 99),
        r"{model}: no tokenizer \(looked for .*tokenizer\.json.*\)\. Add the file of the model, or give token ids .*",
    ),
    "46 tokenizer with code of its own": (
        lambda bad: (
            (bad.model / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'),
            (bad.model / "evil.py").write_text("raise SystemExit(99)"),
            bad.calibration("c.txt", b"some text " * 99),
        ),
        r"{model}: the tokenizer needs code of the model \(auto_map: .*evil\.Evil.*\), which is never run\. Give token ids .*",
    ),
    "46 tokenizer is a git-lfs pointer": (
        lambda bad: (
            (bad.model / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
            bad.calibration("c.txt", b"some text " * 99),
        ),
        r"{model}/tokenizer\.json: a git-lfs pointer, not a tokenizer\. .*",
    ),
    "46 tokenizer of a larger model": (
        lambda bad: (save_tokenizer(bad.model, ["some text"]), bad.calibration("c.txt", b"some text " * 99)),
        r"{model}: the tokenizer has \d+ tokens, but the model has 96: token \d+ of the text is outside\. .*",
    ),
    "46 chats without a chat template": (
        lambda bad: (
            save_tokenizer(bad.model, ["some text"]),
            bad.calibration("c.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}'),
        ),
        r"{tokens}: line 1 is a chat, but the tokenizer of {model} has no chat template\. .*",
    ),
    "46 token outside the vocabulary": (
        lambda bad: bad.calibration("c.npy", np.full(64, 151_936)),
        r"{tokens}: token 151936 is outside the vocabulary of 96\.",
    ),
    "48 missing calibration file": (
        lambda bad: setattr(bad, "tokens", Path("/nowhere.txt")),
        r"/nowhere\.txt: no such file\.",
    ),
    "48 calibration file is a folder": (
        lambda bad: setattr(bad, "tokens", bad.folder),
        r"{tokens}: a folder\. Give text in UTF-8, JSON lines, a JSON list, CSV, TSV or parquet .*",
    ),
    "48 calibration file is a pipe": (
        lambda bad: (setattr(bad, "tokens", bad.folder / "pipe"), os.mkfifo(bad.tokens)),
        r"{tokens}: not a regular file, but a pipe or a device\. Give the \.gz, or write the text to a file\. .*",
    ),
    "48 calibration file of another kind": (
        lambda bad: bad.calibration("c.arrow", b"\xff\xff\xff\xff\0\0"),
        r"{tokens}: an Arrow file\. Give text in UTF-8, JSON lines, .*",
    ),
    "48 binary calibration file": (
        lambda bad: bad.calibration("c", b"\x7fELF\0"),
        r"{tokens}: a binary file, or not UTF-8 \(it contains NUL bytes\)\. .*",
    ),
    "48 zip archive as calibration text": (
        lambda bad: bad.calibration("c.txt", b"PK\x03\x04\0"),
        r"{tokens}: a zip archive\. .*",
    ),
    "48 calibration text in UTF-16": (
        lambda bad: bad.calibration("c.txt", "text".encode("utf-16")),
        r"{tokens}: UTF-16 or UTF-32 text\. .*",
    ),
    "48 gzip data that end early": (
        lambda bad: bad.calibration("c.jsonl.gz", gzip.compress(b'{"text": "some text"}\n' * 99)[:-9]),
        r"{tokens}: damaged or truncated gzip data\.",
    ),
    "48 calibration text is not UTF-8": (
        lambda bad: bad.calibration("c.txt", b"abc\xff"),
        r"{tokens}: not UTF-8 text \(byte 3\)\.",
    ),
    "48 jsonl without the field text": (
        lambda bad: bad.calibration("c.jsonl", b'{"a": 1}\n'),
        r'{tokens}: line 1 has no field "text", "messages" or "conversations" \(fields: "a"\)\.',
    ),
    "48 json lines under another name, without the field text": (
        lambda bad: bad.calibration("c.txt", b'{"a": 1}\n'),
        r'{tokens}: line 1 has no field "text", "messages" or "conversations" \(fields: "a"\)\.',
    ),
    "48 json list without the field text": (
        lambda bad: bad.calibration("c.json", b'[{"a": 1, "\\u001b[2J": 2}]'),
        r'{tokens}: entry 1 has no field "text", "messages" or "conversations" \(fields: "a", "\\x1b\[2J"\)\.',
    ),
    "48 deeply nested json": (
        lambda bad: bad.calibration("c.json", b'{"text":' + DEEP),
        r"{tokens}: not JSON \(.*\)\. Give JSON lines, or one list of objects\.",
    ),
    "48 json object with two lists": (
        lambda bad: bad.calibration("c.json", b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}'),
        r'{tokens}: holds several lists of objects \("train", "test"\)\. Write one of them as JSON lines\.',
    ),
    "48 csv without the column text": (
        lambda bad: bad.calibration("c.csv", b"a,b\n1,2\n"),
        r'{tokens}: no column "text" in the first line \(columns: "a", "b"\)\.',
    ),
    "48 csv with a comma in the text": (
        lambda bad: bad.calibration("c.csv", b"id,text\n1,some, text\n"),
        r"{tokens}: line 2: 3 columns, but the first line has 2\. Quote the text\.",
    ),
    "48 token ids are floats": (
        lambda bad: bad.calibration("c.npy", np.zeros(64)),
        r"{tokens}: holds float64 values, but token ids are integers\.",
    ),
    "48 pickled objects instead of token ids": (
        lambda bad: bad.calibration("c.npy", np.array([{}], dtype=object)),
        r"{tokens}: not a \.npy file of numbers\.",
    ),
    "49 too few tokens": (
        lambda bad: bad.calibration("c.npy", np.zeros(63, dtype=np.int64)),
        r"{tokens}: has 63 tokens, 64 are needed \(4 x 16\)\. .*",
    ),
}
"""A function that does the damage, and the pattern of the message, by number and description of the case.

The pattern is a regular expression in which {weights}, {model} and {tokens} are the paths of the shard, the model and the calibration file.
"""
OUTSIDE = {
    "24 relative path": "../../etc/passwd",
    "24 relative path in a subfolder": "a/../../x.safetensors",
    "25 absolute path": "/etc/passwd",
}
"""Names of a shard in an index that leave the folder, by number and description of the case."""
NAMES = {
    "25 backslash": "..\\x.safetensors",
    "25 drive letter": "C:x.safetensors",
    "25 empty name": "",
    "25 number": 7,
    "25 control character": "a\n.safetensors",
    "25 too long": "x" * 256,
}
"""Names of a shard in an index that no file can have, by number and description of the case."""


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("single") / "model", max_shard_size="1GB")


def refused(toy, bad, pattern, tally, *, late=False):
    """Quantize a bad model or bad data, and check that this is refused as `pattern` says. Returns the files of the run directory.

    `plan` refuses it with the same line, except a fault of the values of a weight, which is found late.
    """
    out = bad.folder / "out"
    before = {str(path) for path in bad.folder.rglob("*")}
    with tally(20, "bad input of the catalogue") as counted:
        ended = toy.run(toy.quantize(out, "--dataset", bad.tokens or toy.tokens, model=bad.model))
        assert ended.code == 65, ended.err
        said = ended.out.splitlines()
        assert not said or (late and all(line.startswith("warning: ") for line in said)), said
        assert one_line(ended.err), ended.err
        places = {"weights": bad.weights, "model": bad.model, "tokens": bad.tokens}
        places = {key: re.escape(str(value)) for key, value in places.items()}
        expected = re.sub(r"\{(weights|model|tokens)\}", lambda match: places[match[1]], pattern)
        expected = expected.replace("{{", "{").replace("}}", "}")
        assert re.fullmatch(f"cbqstream: error: {expected}\n", ended.err), ended.err
        assert ended.seconds < 3
        planned = toy.run(
            ["plan", *toy.quantize(out, "--dataset", bad.tokens or toy.tokens, model=bad.model)[1:], "--without-time"]
        )
        assert (planned.code, planned.err) == ((0, "") if late else (65, ended.err))
        counted.add()
    after = {str(path) for path in bad.folder.rglob("*")}
    run = {path for path in after if path.startswith(f"{out}.run")}
    assert after - run == before
    return run


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line(toy, single, tmp_path, tally, case):
    damage, pattern = CASES[case]
    bad = Bad(tmp_path, single, toy.model)
    damage(bad)
    found_late = case.split()[0] in ("43", "45")  # tensors are read window by window
    assert bool(refused(toy, bad, pattern, tally, late=found_late)) == found_late


def test_harmless_oddities_give_warnings_at_most(toy, single, tmp_path, tally):
    """A model is quantized although four things about it are odd.

    35: it has code of its own, which is not run. 36: config.json asks for an attention kernel from elsewhere, which is ignored. 44: a
    tensor is zero. 47: its chat template would never end; it is copied and only run for chats.
    """
    bad = Bad(tmp_path, single, toy.model)
    bad.config(
        auto_map={"AutoModel": "modeling_evil.Evil"},
        _attn_implementation="evil/kernel",
        attn_implementation="evil/kernel",
    )
    (bad.model / "modeling_evil.py").write_text("raise SystemExit(99)")
    endless = "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}"
    (bad.model / "chat_template.jinja").write_text(endless)
    bad.tensors(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].zero_())
    with tally(20, "bad input of the catalogue") as counted:
        ended = toy.run(toy.quantize(tmp_path / "out", model=bad.model))
        assert (ended.code, ended.err) == (0, "")
        warnings = [line for line in ended.out.splitlines() if line.startswith("warning: ")]
        assert warnings == [
            f"warning: {bad.model}: the model contains code (auto_map), which is not run.",
            f'warning: {bad.weights}: tensor "model.layers.1.mlp.up_proj.weight" is zero throughout.',
        ]
        assert (tmp_path / "out" / "chat_template.jinja").read_text() == endless
        counted.add(faults=4)


@pytest.mark.parametrize("case", [*OUTSIDE, *NAMES])
def test_shard_names_that_cannot_be_inside_the_model_folder_are_refused(toy, single, tmp_path, tally, case):
    bad = Bad(tmp_path, single, toy.model)
    bad.index(lambda index: index["weight_map"].update({"lm_head.weight": {**OUTSIDE, **NAMES}[case]}))
    reason = "leaves the model folder" if case in OUTSIDE else "is not valid"
    pattern = r'{model}/model\.safetensors\.index\.json: shard name ".*" ' + reason + r"\. Download the index again\."
    assert not refused(toy, bad, pattern, tally)
