"""Fixtures: tiny checkpoints of every family, and the real SmolLM2 where it was prepared."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is loaded

from hypothesis import settings

from cbqstream.config import CalibrationConfig, QuantizeConfig, ReconstructionConfig
from cbqstream.scheme import Scheme
from tiny import SEQ_LEN, make_model, save_model, save_tokens

settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("default")

SMOLLM2 = Path(os.environ.get("CBQSTREAM_TEST_MODEL", Path(__file__).parent.parent / ".models" / "smollm2-135m"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors are faster on one thread, and results do not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def small_collections() -> None:
    """A window ends with a collection of garbage, which need not look at all of torch and transformers: half of a tiny run otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def whole_collection_at_the_end() -> Iterator[None]:
    """What is not collected then is taken for a leak by the libraries that made it."""
    yield
    gc.unfreeze()


class TinyModels(dict[str, Path]):
    """A checkpoint folder of each family, made when it is asked for; read only."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, family: str) -> Path:
        self[family] = save_model(self._folder / family, family)
        return self[family]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> TinyModels:
    """A checkpoint folder of every family; read only."""
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    """Random token ids for 16 segments."""
    return save_tokens(tmp_path_factory.mktemp("tokens") / "tokens.npy", 16 * SEQ_LEN)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M, made by tools/get_smollm2.py."""
    assert (SMOLLM2 / "config.json").is_file(), f"{SMOLLM2} is missing. Run: python tools/get_smollm2.py {SMOLLM2}"
    return SMOLLM2


@pytest.fixture
def make_config(tiny_models, tokens, tmp_path):
    """A function that makes the settings of a small, fast run."""

    def make(family: str = "llama", *, name: str = "out", scheme: Scheme | None = None, **options) -> QuantizeConfig:
        reconstruction = {"epochs": 2, "batch_size": 4, **options.pop("reconstruction", {})}
        return QuantizeConfig(
            model=str(options.pop("model", tiny_models[family])),
            out=str(tmp_path / name),
            scheme=scheme or Scheme(num_bits=4, group_size=32),
            calibration=CalibrationConfig(
                dataset=str(options.pop("dataset", tokens)),
                num_samples=options.pop("num_samples", 16),
                seq_len=SEQ_LEN,
                all_experts=options.pop("all_experts", False),
            ),
            reconstruction=ReconstructionConfig(**reconstruction),
            threads=1,
            device="cpu",
            **options,
        )

    return make


@pytest.fixture
def with_outliers(tmp_path):
    """A function that makes a checkpoint whose norms have a large channel, as trained models do."""

    def make(family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        model = make_model(family)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layers." in name and ("layernorm" in name or "layer_norm" in name):
                    parameter[7] *= 50
        model.to(dtype).save_pretrained(tmp_path / "with-outliers")
        return tmp_path / "with-outliers"

    return make
