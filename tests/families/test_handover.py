"""Models whose blocks hand each other more than one hidden state for each token, or get arguments that depend on the tokens."""

import pytest

from cbqstream import plan, quantize
from cbqstream.commands.check import check
from cbqstream.errors import StoppedError
from tiny import files_of

TYPES = {
    "bamba": "blocks return two values",
    "gemma4 shared keys": "the last blocks read keys and values that earlier ones left in a dict",
    "gemma4_text": "inputs for each layer depend on the tokens",
    "glm_moe_dsa shared indexers": "indices of the most relevant tokens are handed to the next block",
    "idefics3": "the first parameters of the model are not loaded",
    "qwen4_exp_text": "parallel hidden states, token ids, and rotary embeddings for each segment",
    "roberta": "embedding and head are outside the parent of the blocks; positions begin at the one after that of the padding",
    "xglm": "masks for each segment",
    "zaya": "states of the router are handed on, which change the choice of experts for some tokens only",
}
"""Types, with what is special about them."""


@pytest.mark.parametrize("name", TYPES)
def test_it_evaluates_as_transformers_and_resumes_to_the_same_bytes(tool, tmp_path, make_config, name):
    """The logits of two different segments are compared."""
    tool.make_model(name, tmp_path / name)
    assert tool.streamed_difference(tmp_path / name) < 1e-5
    settings = {
        "model": tmp_path / name / "source",
        "num_samples": 8,
        "reconstruction": {"epochs": 1, "batch_size": 2},
    }
    whole = files_of(quantize(make_config(name="whole", **settings)))
    stopped = make_config(name="stopped", **settings)
    for window in (1, 2):
        with pytest.raises(StoppedError):
            quantize(stopped, stop_after_window=window)
        assert not (stopped.run_path / "beside").exists()
    assert {key: value for key, value in files_of(quantize(stopped)).items() if key != "metrics.jsonl"} == {
        key: value for key, value in whole.items() if key != "metrics.jsonl"
    }


@pytest.mark.parametrize("damaged", ["quantized", "reference+shared_kv_states+full_attention+1=*"])
def test_streams_that_are_lost_are_recomputed_with_the_values_beside_them(tool, tmp_path, make_config, damaged):
    """The checksums of the recomputed streams, and of the values that are handed on with them, are compared with the commits."""
    tool.make_model("gemma4 shared keys", tmp_path / "model")
    config = make_config(model=tmp_path / "model" / "source", num_samples=8, reconstruction={"rounding": "nearest"})
    with pytest.raises(StoppedError):
        quantize(config, stop_after_window=1)
    acts = config.run_path / "acts"
    before = files_of(acts)
    (folder,) = acts.glob(f"*/{damaged}")
    (folder / "c.3.0.0").write_bytes(b"x")
    assert "They will be recomputed" in "".join(check(config.run_path, read_data=True).facts)
    with pytest.raises(StoppedError):
        quantize(config, stop_after_window=1)
    assert files_of(acts) == before
    assert any("+shared_kv_states" in name for name in before)
    assert quantize(config).is_dir()


def test_the_plan_counts_the_values_beside_the_streams(tool, tmp_path, make_config):
    """Gemma 4 has 4 blocks with 32 values in float32 for each token; the hidden states are 128 wide.

    The disk holds four streams; the targets stay in memory. With shared keys, the model hands on keys and values of two heads,
    32 wide and 512 wide, in four streams.
    """
    shared = 4 * 2 * 2 * (32 + 512) * 4
    for name, beside in (("gemma4 dense", 0), ("gemma4_text", 4 * 32 * 4), ("gemma4 shared keys", 4 * 32 * 4 + shared)):
        tool.make_model(name, tmp_path / name)
        found = plan(make_config(model=tmp_path / name / "source", num_samples=8), with_time=False)
        assert found.disk["streams"] == 8 * 16 * (4 * 128 * 2 + beside)


def test_the_end_to_end_stage_reads_the_values_beside_the_hidden_states(tool, tmp_path, make_config):
    tool.make_model("gemma4 shared keys", tmp_path / "model")
    settings = {"epochs": 1, "end_to_end_epochs": 1}
    config = make_config(model=tmp_path / "model" / "source", num_samples=16, reconstruction=settings)
    assert quantize(config).is_dir()
