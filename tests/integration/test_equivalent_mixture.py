"""A Mixtral whose experts are the divided feed-forward layers of a Llama computes the same as the Llama."""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from perplexities import streamed_perplexity
from tiny import VOCAB, save_model

BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "equivalent_mixture.py"


@torch.no_grad()
def logits_of(folder, ids):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids, use_cache=False).logits


def test_the_mixture_predicts_what_the_llama_predicts(tmp_path):
    """The comparison of experts in benchmarks/experts_alone.py relies on it."""
    model, mixture = save_model(tmp_path / "llama"), tmp_path / "mixture"
    subprocess.run([sys.executable, str(BENCHMARK), str(model), str(mixture), "--experts", "4"], check=True)
    ids = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_of(mixture, ids), logits_of(model, ids), rtol=1e-5, atol=1e-5)
    assert abs(streamed_perplexity(mixture, ids) / streamed_perplexity(model, ids) - 1) < 1e-5
