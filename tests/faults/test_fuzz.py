"""Row 20: parsers on text that nobody wrote on purpose. They take it, or raise an error of ours, soon and without much memory."""

import json
import resource
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import NIGHTLY

from cbqstream.checkpoint.folder import find_tensors, read_json
from cbqstream.checkpoint.header import read_header
from cbqstream.config import QuantizeConfig
from cbqstream.errors import CbqstreamError
from cbqstream.models.meta_model import MetaModel
from cbqstream.rundir.chain import Chain
from cbqstream.rundir.identity import canonical, digest_of

FUZZ = settings(
    max_examples=2000 if NIGHTLY else 60,
    deadline=None,
    derandomize=not NIGHTLY,
    database=None,
    suppress_health_check=list(HealthCheck),
)
MOST_SECONDS, MOST_BYTES = 2.0, 300 << 20

plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=12)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
garbage = st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode())


def calmly(parse, *arguments) -> None:
    """Parse; only our own errors, in time, in memory."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        parse(*arguments)
    except CbqstreamError as error:
        assert str(error).isprintable(), repr(str(error))  # noqa: PT017
    assert time.monotonic() - began < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


@pytest.fixture
def counting(tally):
    """The fuzzers count what they try."""
    with tally(20, "fuzzed headers, indexes, configs, records") as counted:
        yield counted


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", 3, None]),
        "shape": st.lists(st.integers(-1, 2**50) | st.booleans(), max_size=9) | plain,
        "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3) | plain,
    },
)
headers = st.dictionaries(st.text(max_size=10) | st.just("__metadata__"), entries | plain, max_size=4)


def test_headers(tmp_path, counting):
    @FUZZ
    @given(headers.map(lambda value: json.dumps(value).encode()) | garbage, st.integers(-9, 9), st.binary(max_size=64))
    def fuzz(header, off, data):
        length = max(0, len(header) + off)
        (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)
        calmly(read_header, tmp_path / "x.safetensors")
        counting.add()

    fuzz()


def test_indexes(toy, tmp_path, counting):
    model = Path(shutil.copytree(toy.model, tmp_path / "model"))
    index = model / "model.safetensors.index.json"
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    maps = st.dictionaries(st.text(max_size=20), st.sampled_from(shards) | st.text(max_size=20) | plain, max_size=5)

    @FUZZ
    @given(maps.map(lambda value: json.dumps({"weight_map": value}).encode()) | garbage)
    def fuzz(text):
        index.write_bytes(text)
        calmly(find_tensors, model)
        counting.add()

    fuzz()


def test_configs(toy, counting):
    good = read_json(toy.model, "config.json")
    shapes = {name: info.shape for name, info in find_tensors(toy.model).items()}

    @FUZZ
    @given(st.dictionaries(st.sampled_from(sorted(good)) | st.text(max_size=12), values, min_size=1, max_size=3))
    def fuzz(changes):
        calmly(MetaModel, toy.model, {**good, **changes}, shapes)
        counting.add()

    fuzz()


def test_settings(toy, counting):
    run = toy.stopped(toy.new_out(), 1)
    good = dict(Chain.read(run).run["config"])

    @FUZZ
    @given(st.sampled_from(sorted(good)) | st.text(max_size=12), values)
    def fuzz(key, value):
        calmly(QuantizeConfig.from_dict, {**good, key: value})
        counting.add()

    fuzz()


def test_records(toy, tmp_path, counting):
    """Also those whose checksum fits, which no accident makes."""
    run = Path(shutil.copytree(toy.stopped(toy.new_out(), 1), tmp_path / "run"))
    texts = {name: (run / name).read_bytes() for name in ("run.json", "commits/00000")}

    @FUZZ
    @given(st.sampled_from(sorted(texts)), st.integers(0, 20), st.text(max_size=8), values, garbage, st.booleans())
    def fuzz(name, pick, key, value, text, whole):
        body = json.loads(texts[name])
        keys = sorted(body.keys() - {"self"})
        body |= {keys[pick % len(keys)] if pick else key: value}
        body["self"] = digest_of({key: item for key, item in body.items() if key != "self"})
        (run / name).write_bytes(text if whole else canonical(body))
        calmly(Chain.read, run)
        (run / name).write_bytes(texts[name])
        counting.add()

    fuzz()
