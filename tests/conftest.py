"""Fixtures of all tests: tiny checkpoints of every family, settings of small runs, devices, and the real SmolLM2-135M."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before triton is imported

from hypothesis import settings

from cbqstream.config import CalibrationConfig, QuantizeConfig, ReconstructionConfig
from cbqstream.scheme import Scheme
from tiny import SEQ_LEN, make_model, save_model, save_tokens

settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("default")

SMOLLM2 = Path(os.environ.get("CBQSTREAM_TEST_MODEL", Path(__file__).parent.parent / ".models" / "smollm2-135m"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests with the marker `gpu` if there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Compute with one thread, which is fastest for tiny tensors. Results then do not depend on the number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def imported_modules_excluded_from_garbage_collection() -> None:
    """Exclude the objects of torch and transformers from garbage collection.

    Every window ends with a garbage collection. With these objects, the collections would take half of the time of a tiny run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def full_garbage_collection_at_the_end() -> Iterator[None]:
    """Include all objects in garbage collection again after the last test; some libraries report objects that are left over as leaks."""
    yield
    gc.unfreeze()


class TinyModels(dict[str, Path]):
    """Checkpoint folder of each family, by its name. A folder is made when it is first used. Tests must not change it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, family: str) -> Path:
        self[family] = save_model(self._folder / family, family)
        return self[family]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> TinyModels:
    """Checkpoint folder of each family, by its name. Tests must not change a folder."""
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    """File with random token ids for 16 calibration segments."""
    return save_tokens(tmp_path_factory.mktemp("tokens") / "tokens.npy", 16 * SEQ_LEN)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real SmolLM2-135M, which tools/get_smollm2.py writes."""
    assert (SMOLLM2 / "config.json").is_file(), f"{SMOLLM2} is missing. Run: python tools/get_smollm2.py {SMOLLM2}"
    return SMOLLM2


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request) -> str:
    """Name of the device of a test. The test runs on the CPU, and with the marker `gpu` on the CUDA device if there is one."""
    return request.param


@pytest.fixture
def make_config(tiny_models, tokens, tmp_path):
    """A function that makes the settings of a small, fast run.

    The function takes the family of the model, the name of the output folder and the scheme. Other options are fields of
    `QuantizeConfig` and `CalibrationConfig`, or a dict of fields of `ReconstructionConfig`. The default device is the CPU.
    """

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
            device=options.pop("device", "cpu"),
            **options,
        )

    return make


@pytest.fixture
def with_outliers(tmp_path):
    """A function that makes a checkpoint in which one channel of the norms of all blocks is 50 times as large, as in trained models."""

    def make(family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        model = make_model(family)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layers." in name and ("layernorm" in name or "layer_norm" in name):
                    parameter[7] *= 50
        model.to(dtype).save_pretrained(tmp_path / "with-outliers")
        return tmp_path / "with-outliers"

    return make
