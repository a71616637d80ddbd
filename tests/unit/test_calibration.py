"""Calibration segments from text files and files of token ids, and reasons why a dataset or a tokenizer is refused."""

import importlib.util
import json
import logging
import re
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import import_utils

from cbqstream.calibration.segments import load_segments, segments_digest
from cbqstream.calibration.text import documents
from cbqstream.calibration.tokenizer import load_tokenizer
from cbqstream.errors import InputError

WORDS = [f"w{index}" for index in range(50)]
DOCUMENTS = [" ".join(WORDS[(3 * line + word) % 50] for word in range(40)) for line in range(30)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """Folder with a tokenizer that maps each word to one id."""
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def load(path, folder="/nowhere", num_samples=4, seq_len=16, **options):
    return load_segments(path, folder, num_samples=num_samples, seq_len=seq_len, vocab_size=60, **options)


def test_jsonl_parquet_and_plain_text_give_the_same_segments(tmp_path, tokenizer_folder):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS) + "\n\n")
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n\n".join(DOCUMENTS))
    first, second, third = (load(tmp_path / f"a.{kind}", tokenizer_folder, 20) for kind in ("jsonl", "parquet", "txt"))
    assert first.shape == (20, 16)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    whole = [WORDS.index(word) + 1 for word in "\n\n".join(DOCUMENTS).split()]
    assert first.flatten().tolist() == whole[: 20 * 16]


def test_segments_do_not_depend_on_text_after_the_last_segment(tmp_path, tokenizer_folder):
    (tmp_path / "long.txt").write_text("\n\n".join(DOCUMENTS * 50))
    (tmp_path / "short.txt").write_text("\n\n".join(DOCUMENTS))
    assert torch.equal(load(tmp_path / "long.txt", tokenizer_folder), load(tmp_path / "short.txt", tokenizer_folder))


@pytest.mark.parametrize("choice", ["first", "spread"])
@pytest.mark.parametrize("beginning", [WORDS[:1], WORDS[1:3]], ids=["BOS", "two tokens"])
def test_with_begun_every_segment_starts_with_the_special_tokens_of_the_tokenizer(
    tmp_path, tokenizer_folder, choice, beginning
):
    """Without such tokens, `begun` changes nothing. Without `begun`, only the first segment starts with them."""
    (tmp_path / "a.txt").write_text("\n\n".join(DOCUMENTS))
    plain = load(tmp_path / "a.txt", tokenizer_folder, 20, choice=choice, begun=True)
    assert torch.equal(plain, load(tmp_path / "a.txt", tokenizer_folder, 20, choice=choice))
    size = len(beginning)
    words = load(tmp_path / "a.txt", tokenizer_folder, 20 * (16 - size), 1).flatten()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    ids = [WORDS.index(word) + 1 for word in beginning]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{' '.join(beginning)} $A", special_tokens=list(zip(beginning, ids, strict=True))
    )
    tokenizer.save_pretrained(tmp_path / "bos")
    begun = load(tmp_path / "a.txt", tmp_path / "bos", 20, choice=choice, begun=True)
    assert begun.shape == (20, 16)
    assert (begun[:, :size] == torch.tensor(ids)).all()
    if choice == "first":
        assert torch.equal(begun[:, size:].flatten(), words)
    usual = load(tmp_path / "a.txt", tmp_path / "bos", 20, choice=choice)
    assert usual[0, :size].tolist() == ids
    assert not (usual[1:, :size] == torch.tensor(ids)).all()


def test_npy_and_safetensors_files_of_token_ids_are_read(tmp_path):
    ids = np.arange(100) % 60
    np.save(tmp_path / "ids.npy", ids)
    save_file({"ids": torch.from_numpy(ids).to(torch.int32)}, tmp_path / "ids.safetensors")
    expected = torch.from_numpy(ids[:64]).view(4, 16)
    assert torch.equal(load(tmp_path / "ids.npy"), expected)
    assert torch.equal(load(tmp_path / "ids.safetensors"), expected)


def test_spread_segments_include_the_first_and_the_last(tmp_path):
    np.save(tmp_path / "ids.npy", np.repeat(np.arange(11), 16))
    segments = load(tmp_path / "ids.npy", num_samples=3, choice="spread")
    assert segments[:, 0].tolist() == [0, 5, 10]
    assert len(load(tmp_path / "ids.npy", num_samples=99, choice="spread")) == 11


def test_segments_digest_depends_on_shape_and_content():
    ids = torch.arange(12)
    digests = {segments_digest(ids.view(3, 4)), segments_digest(ids.view(4, 3)), segments_digest((ids + 1).view(3, 4))}
    assert len(digests) == 3
    assert segments_digest(ids.view(3, 4)) == segments_digest(ids.view(3, 4).clone())


def write(path, content):
    path.write_bytes(content)
    return path


def test_too_few_tokens_are_refused_with_the_number_that_is_needed(tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros(63, dtype=np.int64))
    with pytest.raises(InputError, match="63 tokens, 64 are needed"):
        load(tmp_path / "ids.npy")


@pytest.mark.parametrize("value", [60, -1])
def test_tokens_outside_the_vocabulary_are_refused(tmp_path, value):
    np.save(tmp_path / "ids.npy", np.full(64, value))
    with pytest.raises(InputError, match=f"token {value} is outside"):
        load(tmp_path / "ids.npy")


BROKEN = {
    "x.jsonl": (b'{"txt": 1}\n', 'line 1 is not a JSON object with a field "text"'),
    "y.jsonl": (b'{"text": "a"}\n[1]\n', "line 2"),
    "n.jsonl": (b'{"text": 7}\n', "not a string"),
    "u.txt": (b"caf\xe9", "not UTF-8"),
    "p.parquet": (b"PAR0", "not a parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_text_files_are_refused(tmp_path, name):
    content, message = BROKEN[name]
    with pytest.raises(InputError, match=message):
        list(documents(write(tmp_path / name, content)))


def test_parquet_with_damaged_pages_is_refused(tmp_path):
    """The footer, which is read first, is intact; the pages before it are damaged."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": DOCUMENTS * 20}), path, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged parquet data"):
        list(documents(path))


def test_missing_files_and_folders_are_refused_as_text(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        list(documents(tmp_path / "none.txt"))
    with pytest.raises(InputError, match="a folder"):
        list(documents(tmp_path))


def test_npy_with_pickled_objects_is_refused(tmp_path):
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"not a \.npy"):
        load(tmp_path / "o.npy")


def test_npy_of_floats_is_refused_as_token_ids(tmp_path):
    np.save(tmp_path / "f.npy", np.zeros(64))
    with pytest.raises(InputError, match="token ids are integers"):
        load(tmp_path / "f.npy")


def test_a_tokenizer_with_more_tokens_than_the_model_is_blamed_instead_of_the_text(tmp_path, tokenizer_folder):
    folder, words = tokenizer_folder, ["<unk>", *WORDS]
    path = write(tmp_path / "a.txt", " ".join(WORDS * 9).encode())
    with pytest.raises(InputError) as caught:
        load_segments(path, folder, num_samples=4, seq_len=16, vocab_size=45)
    assert str(caught.value) == (
        f"{folder}: the tokenizer has 51 tokens, but the model has 45: token {words.index('w44')} of the text is outside. "
        "The tokenizer belongs to another model. Use the tokenizer files of this model."
    )


BPE = {"type": "BPE", "dropout": None, "unk_token": None, "vocab": {"a": 0}, "merges": []}
FAST = {"version": "1.0", "added_tokens": [], "model": BPE}
CODE = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
TEKKEN = {"config": {"pattern": ".", "default_vocab_size": 9, "default_num_special_tokens": 1}, "vocab": []}
IDS = r"give token ids \(\.npy or \.safetensors\) instead of text\."
TOKENIZERS = {
    "no files, unknown model": ({}, "x", rf": no tokenizer \(looked for .*tokenizer\.json, .*\)\. Add .*, or {IDS}"),
    "no files, for which transformers returns an empty tokenizer": (
        {},
        "gpt2",
        r": no tokenizer \(looked for merges\.txt, tekken\.json, tiktoken\.model, tokenizer\.json, tokenizer\.model, vocab\.json\)\. ",
    ),
    "only a configuration": (
        {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
        "llama",
        ": no tokenizer",
    ),
    "own code": (
        {"tokenizer_config.json": CODE, "tokenization_own.py": b"raise SystemExit(9)", "own.tiktoken": b"IQ== 0\n"},
        "x",
        r': the tokenizer needs code of the model \(auto_map: .*"tokenization_own.OwnTokenizer".*\), which is never run\. G'
        + IDS[1:],
    ),
    "own code beside tokenizer.json": (
        {"tokenizer_config.json": CODE, "tokenizer.json": FAST, "tokenization_own.py": b"raise SystemExit(9)"},
        "llama",
        r": the tokenizer needs code of the model \(auto_map: .*\), which is never run\. ",
    ),
    "sentencepiece": (
        {"tokenizer.model": SENTENCEPIECE},
        "llama",
        r"/tokenizer\.model: transformers needs sentencepiece and protobuf to read it\. "
        rf"Run: pip install sentencepiece protobuf, or {IDS}",
    ),
    "tiktoken": (
        {"tiktoken.model": b"IQ== 0\nIg== 1\n"},
        "llama",
        rf"/tiktoken\.model: transformers needs tiktoken to read it\. Run: pip install tiktoken, or {IDS}",
    ),
    "tekken": (
        {"tekken.json": TEKKEN},
        "mistral",
        r": the tokenizer needs a package that is not installed \(ImportError: .*mistral-common.*\)\. "
        rf"Run: pip install mistral-common, or {IDS}",
    ),
    "another package": (
        {"vocab.json": {"a": 0}, "merges.txt": b"#\n", "tokenizer_config.json": {"tokenizer_class": "BioGptTokenizer"}},
        "biogpt",
        rf": the tokenizer needs a package that is not installed \(ImportError: .*sacremoses.*\)\. Install it, or {IDS}",
    ),
    "damaged tekken": (
        {"tekken.json": {"a": 1}},
        "mistral",
        rf": transformers .* cannot load the tokenizer \(KeyError: 'config'\)\. Download it again, .*, or {IDS}",
    ),
    "tokenizer.json is not JSON": ({"tokenizer.json": b"{"}, "llama", r"/tokenizer\.json: not JSON\."),
    "tokenizer.json of another kind": (
        {"tokenizer.json": {**FAST, "model": {"type": "Own"}}},
        "llama",
        r"/tokenizer\.json: transformers .* cannot load the tokenizer \(Exception: data did not match any variant .*\)\. "
        rf"Download it again, upgrade transformers, or {IDS}",
    ),
    "tokenizer_config.json is not JSON": (
        {"tokenizer.json": FAST, "tokenizer_config.json": b"{"},
        "llama",
        r"/tokenizer_config\.json: not JSON\.",
    ),
    "git-lfs pointer": (
        {"tokenizer.json": b"version https://git-lfs.github.com/spec/v1\n"},
        "llama",
        r"/tokenizer\.json: a git-lfs pointer, not a tokenizer\. .*",
    ),
    "empty file": (
        {"tokenizer.model": b""},
        "llama",
        r"/tokenizer\.model: empty file \(0 bytes\)\. Download it again\.",
    ),
}
"""Files beside config.json, the type of the model, and the pattern of the message after the folder, by description."""


def tokenizer_files(folder, files, model_type="llama"):
    folder.mkdir()
    for name, content in {"config.json": {"model_type": model_type}, **files}.items():
        write(folder / name, content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


@pytest.fixture
def installed(monkeypatch):
    """Function that makes transformers find only the given ones of the packages for vocabularies; none before it is called."""
    modules = {
        "sentencepiece": "sentencepiece",
        "google": "protobuf",
        "tiktoken": "tiktoken",
        "mistral_common": "",
        "sacremoses": "",
    }
    found, real = set(), importlib.util.find_spec
    checks = [
        getattr(import_utils, f"is_{name}_available")
        for name in ("sentencepiece", "protobuf", "tiktoken", "mistral_common")
    ]

    def find_spec(name, package=None):
        package_of = modules.get(name.split(".")[0])
        return real(name, package) if package_of is None else (real("json") if package_of in found else None)

    def only(*names):
        found.update(names)
        for check in checks:
            check.cache_clear()

    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", find_spec)
        for name in ("tiktoken", "sacremoses"):
            patch.setitem(sys.modules, name, None)
        only()
        yield only
    only()


@pytest.fixture
def logged():
    """Messages that transformers logs."""
    messages, library = [], logging.getLogger("transformers")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    library.addHandler(handler)
    yield messages
    library.removeHandler(handler)


@pytest.mark.parametrize("case", TOKENIZERS)
def test_the_reason_why_a_tokenizer_cannot_be_loaded_is_true(tmp_path, installed, logged, case):
    files, model_type, pattern = TOKENIZERS[case]
    folder = tokenizer_files(tmp_path / "model", files, model_type)
    with pytest.raises(InputError) as caught:
        load(write(tmp_path / "a.txt", b"words"), folder)
    assert re.match(f"{re.escape(str(folder))}{pattern}", str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    assert logged == []  # the warnings of transformers name other reasons


def test_only_the_missing_package_of_a_vocabulary_is_named(tmp_path, installed):
    installed("sentencepiece")
    folder = tokenizer_files(tmp_path / "model", {"tokenizer.model": SENTENCEPIECE})
    with pytest.raises(
        InputError, match=r"tokenizer\.model: transformers needs protobuf to read it\. Run: pip install protobuf,"
    ):
        load_tokenizer(folder)


def test_warnings_of_transformers_about_a_good_tokenizer_are_logged_once(tmp_path, logged):
    load_tokenizer(tokenizer_files(tmp_path / "model", {"tokenizer.json": FAST}, "no_such_type"))
    assert len(logged) == 1
    assert "no_such_type" in logged[0]


UNUSABLE = {
    "knows no word": ({**FAST, "model": {**BPE, "vocab": {"z": 0}}}, "the tokenizer knows no word of the text"),
    "fails": (
        {**FAST, "model": {"type": "WordLevel", "vocab": {"z": 0}, "unk_token": "<unk>"}},
        r"the tokenizer fails on the text \(Exception: WordLevel error: Missing \[UNK\] token",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_tokenizer_that_cannot_tokenize_the_text_is_blamed(tmp_path, case):
    content, message = UNUSABLE[case]
    folder = tokenizer_files(tmp_path / "model", {"tokenizer.json": content})
    with pytest.raises(InputError, match=message):
        load(write(tmp_path / "a.txt", b"words"), folder)
