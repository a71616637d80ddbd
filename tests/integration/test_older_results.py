"""Results and run directories of older versions, which stored W8A8 as pack-quantized. New ones are int-quantized with the same codes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cbqstream import quantize
from cbqstream.calibration.segments import load_segments
from cbqstream.commands.check import check
from cbqstream.commands.export import export
from cbqstream.commands.report import report
from cbqstream.errors import IdentityError, StoppedError
from cbqstream.evaluation.model import open_model
from cbqstream.packed.int_quantized import IntQuantized
from cbqstream.scheme import Scheme
from perplexities import streamed_perplexity
from tiny import SEQ_LEN, VOCAB, files_of

CPU = torch.device("cpu")
W8A8 = Scheme(num_bits=8, group_size=None, activation_bits=8)
SCHEMES = {
    "symmetric": W8A8,
    "asymmetric": Scheme(num_bits=8, group_size=None, activation_bits=8, symmetric=False),
    "static inputs": Scheme(num_bits=8, group_size=None, activation_bits=8, activation_strategy="tensor"),
}
NEAREST = {"rounding": "nearest"}


def quantize_as_before(config, **options):
    """Quantize as an older version does."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(IntQuantized, "is_for", lambda self, scheme: False)
        return quantize(config, **options)


def formats_of(folder):
    """Formats of a result: the top-level one, and those of the groups."""
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found["format"], *(group["format"] for group in found["config_groups"].values())


@pytest.mark.parametrize("name", SCHEMES)
def test_both_formats_hold_the_same_weights_and_are_loaded_by_transformers(make_config, name):
    """Asymmetric weights in the older format are loaded dequantized, those in the new one as they are."""
    old = quantize_as_before(make_config(name="old", scheme=SCHEMES[name], reconstruction=NEAREST))
    new = quantize(make_config(name="new", scheme=SCHEMES[name], reconstruction=NEAREST))
    assert formats_of(old) == ("pack-quantized", "pack-quantized")
    assert formats_of(new) == ("int-quantized", "int-quantized")
    layer, stored = "model.layers.1.mlp.up_proj", load_file(new / "block-00001.safetensors")
    assert stored[f"{layer}.weight"].dtype == torch.int8
    assert not {f"{layer}.weight_packed", f"{layer}.weight_shape"} & stored.keys()
    assert (f"{layer}.input_scale" in stored) == (name == "static inputs")
    sources = [open_model(folder)[1] for folder in (old, new)]
    assert sources[0].tensors() == sources[1].tensors()
    for tensor in sources[0].tensors():
        assert torch.equal(*(source.read(tensor, device=CPU) for source in sources))
    for folder in (old, new):
        found = check(folder, read_data=True, load=True)
        assert found.problems == []
        how = " with dequantize=True" if folder == old and name == "asymmetric" else ""
        assert f"loads it as LlamaForCausalLM{how}: logits within" in found.facts[-1]


def test_older_results_and_run_directories_are_evaluated_checked_exported_and_reported_as_new_ones(
    make_config, tokens, tmp_path
):
    old = quantize_as_before(make_config(name="old", scheme=W8A8, reconstruction=NEAREST))
    new = quantize(make_config(name="new", scheme=W8A8, reconstruction=NEAREST))
    ids = load_segments(tokens, new, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    assert streamed_perplexity(old, ids) == streamed_perplexity(new, ids)
    shards = []
    for folder in (old, new):
        files = files_of(export(folder, tmp_path / f"dense-{folder.name}", "dense"))
        shards.append({name: content for name, content in files.items() if name.endswith(".safetensors")})
    assert len(shards[0]) == 5
    assert shards[0] == shards[1]
    for path in (old.with_name("old.run"), new.with_name("new.run"), old):
        assert check(path, read_data=True).problems == []
        text = report(path, tmp_path / f"report-{path.name}").read_text()
        assert "8.222 of 147,456 quantized weights" in text


def test_a_run_that_an_older_version_began_is_not_continued_with_shards_of_another_format(make_config):
    """Neither an unfinished run nor a finished one whose result was deleted. Other schemes are stored as before, and their runs go on."""
    config = make_config(scheme=W8A8, reconstruction=NEAREST)
    with pytest.raises(StoppedError):
        quantize_as_before(config, stop_after_window=1)
    before = files_of(config.run_path)
    message = r'settings\.formats: absent -> \["int-quantized"\]\)\. Restore them, or use another --run-dir\.'
    with pytest.raises(IdentityError, match=message):
        quantize(config)
    assert files_of(config.run_path) == before
    shutil.rmtree(quantize_as_before(config))
    with pytest.raises(IdentityError, match=message):
        quantize(config)
    other = make_config(
        name="w4", scheme=Scheme(num_bits=4, group_size=None, activation_bits=8), reconstruction=NEAREST
    )
    with pytest.raises(StoppedError):
        quantize_as_before(other, stop_after_window=1)
    assert formats_of(quantize(other)) == ("pack-quantized", "pack-quantized")


def test_a_stopped_run_with_int_quantized_shards_resumes_with_identical_files(make_config):
    settings = {"scheme": W8A8, "override": ("down_proj=W4",), "reconstruction": {"epochs": 1, "end_to_end_epochs": 1}}
    whole, config = make_config(name="whole", **settings), make_config(name="stopped", **settings)
    expected = files_of(quantize(whole))
    with pytest.raises(StoppedError):
        quantize(config, stop_after_window=2)
    out = quantize(config)
    assert files_of(out) == expected
    assert formats_of(out)[0] == "mixed-precision"
    assert check(out, read_data=True, load=True).problems == []
