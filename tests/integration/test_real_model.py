"""Quantization of blocks of the real SmolLM2-135M."""

from pathlib import Path

import pytest

from cbqstream import quantize
from cbqstream.calibration.segments import load_segments
from cbqstream.config import CalibrationConfig, QuantizeConfig, ReconstructionConfig
from cbqstream.records import WindowReport
from cbqstream.scheme import Scheme
from perplexities import streamed_perplexity

DATA = Path(__file__).parent.parent.parent / "benchmarks" / "data"


@pytest.mark.model
def test_training_removes_most_of_the_perplexity_that_two_bit_rounding_to_nearest_adds(smollm2, tmp_path):
    """The first three blocks have 2 bits. Perplexity is measured on other text than the calibration text."""
    segments = load_segments(
        DATA / "wikitext2-test.txt", smollm2, num_samples=4, seq_len=256, vocab_size=49152, choice="spread"
    )

    def run(name, **reconstruction):
        config = QuantizeConfig(
            model=str(smollm2),
            out=str(tmp_path / name),
            scheme=Scheme(num_bits=2, group_size=64),
            calibration=CalibrationConfig(dataset=str(DATA / "c4-calibration.jsonl"), num_samples=16, seq_len=256),
            reconstruction=ReconstructionConfig(**reconstruction),
            keep_last=27,
            device="cpu",
            threads=1,
        )
        reports = []
        quantize(config, lambda event: reports.append(event) if isinstance(event, WindowReport) else None)
        return streamed_perplexity(tmp_path / name, segments), reports

    original = streamed_perplexity(smollm2, segments)
    nearest, _ = run("nearest", rounding="nearest")
    learned, reports = run("learned", epochs=4)
    assert 20 < original < 60
    assert nearest > 1.8 * original
    assert learned - original < 0.4 * (nearest - original)
    assert all(report.loss_after < 0.8 * report.loss_before for report in reports[:1])
