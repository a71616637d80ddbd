"""Row 20: the parsers accept random input or raise a CbqstreamError, within limits of time and memory."""

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
from cbqstream.errors import CbqstreamError, InputError
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
"""Limits of the time that a parser takes, and of the growth of the peak memory of the process."""

plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=12)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
garbage = st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode())


def parse_within_limits(parse, *arguments) -> None:
    """Call a parser. It may raise a CbqstreamError with a printable message only, and must keep the limits of time and memory."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        parse(*arguments)
    except CbqstreamError as error:
        assert str(error).isprintable(), repr(str(error))  # noqa: PT017
    assert time.monotonic() - began < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


@pytest.fixture
def counting(tally):
    """The tally of the fuzz tests."""
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


def test_random_headers_of_safetensors_files(tmp_path, counting):
    """The header is random, and its length may be wrong by up to 9 bytes."""

    @FUZZ
    @given(headers.map(lambda value: json.dumps(value).encode()) | garbage, st.integers(-9, 9), st.binary(max_size=64))
    def fuzz(header, off, data):
        length = max(0, len(header) + off)
        (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)
        parse_within_limits(read_header, tmp_path / "x.safetensors")
        counting.add()

    fuzz()


def test_random_indexes_of_shards(toy, tmp_path, counting):
    model = Path(shutil.copytree(toy.model, tmp_path / "model"))
    index = model / "model.safetensors.index.json"
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    maps = st.dictionaries(st.text(max_size=20), st.sampled_from(shards) | st.text(max_size=20) | plain, max_size=5)

    @FUZZ
    @given(maps.map(lambda value: json.dumps({"weight_map": value}).encode()) | garbage)
    def fuzz(text):
        index.write_bytes(text)
        parse_within_limits(find_tensors, model)
        counting.add()

    fuzz()


def test_random_fields_in_config_json(toy, counting):
    good = read_json(toy.model, "config.json")
    infos = find_tensors(toy.model)

    @FUZZ
    @given(st.dictionaries(st.sampled_from(sorted(good)) | st.text(max_size=12), values, min_size=1, max_size=3))
    def fuzz(changes):
        parse_within_limits(MetaModel, toy.model, {**good, **changes}, infos)
        counting.add()

    fuzz()


def test_random_settings_of_a_run(toy, counting):
    """One setting, in the form in which run.json stores it, has a random value or a random name."""
    run = toy.stopped(toy.new_out(), 1)
    good = Chain.read(run).run.config.to_dict()

    @FUZZ
    @given(st.sampled_from(sorted(good)) | st.text(max_size=12), values)
    def fuzz(key, value):
        parse_within_limits(QuantizeConfig.from_dict, {**good, key: value})
        counting.add()

    fuzz()


def test_random_records_of_a_run_directory(toy, tmp_path, counting):
    """run.json or a commit is random, or has a random field and a seal that fits the new content, as no accident gives it."""
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
        parse_within_limits(Chain.read, run)
        (run / name).write_bytes(texts[name])
        counting.add()

    fuzz()


def fields(value, path=()):
    """Paths of all values inside nested dictionaries and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from fields(item, (*path, key))


def nested(depth):
    """Lists in lists."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


TERMINAL_CODE = "\x1b[2J\n"
IMPLAUSIBLE = {
    "infinity": float("inf"),
    "terminal code": TERMINAL_CODE,
    "terminal code as a key": {TERMINAL_CODE: 1},
    "nested 400 times": nested(400),
    "nested 900 times": nested(900),
}


@pytest.mark.parametrize("case", IMPLAUSIBLE)
@pytest.mark.parametrize("name", ["run.json", "commits/00000"])
def test_sealed_records_with_an_implausible_value(toy, tmp_path, counting, name, case):
    """Each field of a record in turn has a value that is easily converted or printed without care, and the record has a seal that fits."""
    run = Path(shutil.copytree(toy.stopped(toy.new_out(), 1), tmp_path / "run"))
    text = (run / name).read_bytes()
    for *folders, key in fields(json.loads(text)):
        body = json.loads(text)
        inner = body
        for folder in folders:
            inner = inner[folder]
        inner[key] = IMPLAUSIBLE[case]
        body["self"] = digest_of({key: item for key, item in body.items() if key != "self"})
        (run / name).write_bytes(canonical(body))
        parse_within_limits(Chain.read, run)
        counting.add()


def test_records_that_are_nested_as_deeply_as_json_can_be_read(toy, tmp_path, counting):
    """Python reads JSON that is nested somewhat deeper than it can write."""
    run = Path(shutil.copytree(toy.stopped(toy.new_out(), 1), tmp_path / "run"))
    text = (run / "run.json").read_text()
    for depth in range(900, 1000):
        (run / "run.json").write_text(f'{{"deep": {"[" * depth}{"]" * depth}, {text[1:]}')
        with pytest.raises(InputError):
            Chain.read(run)
        counting.add()
