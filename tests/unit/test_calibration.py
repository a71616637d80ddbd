"""Calibration segments from text files, chats and files of token ids, and reasons why a dataset or a tokenizer is refused."""

import codecs
import csv
import gzip
import importlib.util
import io
import json
import logging
import os
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import import_utils

from cbqstream.calibration import readers
from cbqstream.calibration.rows import Chat
from cbqstream.calibration.segments import load_segments, segments_digest
from cbqstream.calibration.text import KINDS, REFUSED, documents
from cbqstream.calibration.tokenizer import load_tokenizer, render
from cbqstream.errors import InputError
from tiny import save_tokenizer

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


def json_lines(rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def table(rows, delimiter):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(rows)
    return file.getvalue().encode()


def parquet(columns):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


ROWS = [{"id": number, "text": text} for number, text in enumerate(DOCUMENTS)]
CELLS = [["id", "text"], *([row["id"], row["text"]] for row in ROWS)]
SAME = {
    "jsonl": ("a.jsonl", json_lines(ROWS) + b"\n\n"),
    "jsonl with CRLF and blank lines": ("a.jsonl", b"\r\n\r\n" + json_lines(ROWS).replace(b"\n", b"\r\n\r\n")),
    "ndjson": ("a.NDJSON", json_lines(ROWS)),
    "json lines in .json": ("a.json", json_lines(ROWS)),
    "json lines in .txt": ("a.txt", b"\n" + json_lines(ROWS)),
    "json lines without suffix": ("a", json_lines(ROWS)),
    "list": ("a.json", json.dumps(ROWS).encode()),
    "list over many lines": ("a.json", json.dumps(ROWS, indent=1).encode()),
    "list in .jsonl": ("a.jsonl", json.dumps(ROWS, indent=1).encode()),
    "list in .txt": ("a.txt", json.dumps(ROWS).encode()),
    "object with a list": ("a.json", json.dumps({"version": 1, "data": ROWS}).encode()),
    "object with a list over many lines": ("a.json", json.dumps({"train": ROWS, "tags": []}, indent=1).encode()),
    "csv": ("a.csv", table(CELLS, ",")),
    "tsv": ("a.tsv", table(CELLS, "\t")),
    "parquet": ("a.parquet", parquet({"text": DOCUMENTS, "id": list(range(30))})),
    "parquet without suffix": ("a", parquet({"text": DOCUMENTS})),
    "plain": ("a.txt", "\n\n".join(DOCUMENTS).encode()),
    "plain with CRLF": ("a.md", "\r\n\r\n".join(DOCUMENTS).encode()),
}
"""Name and content of files whose texts are DOCUMENTS, by description."""


FORMS = ("", "with BOM", "as .gz", "gzip data without .gz")
FORMS_OF_KINDS = [(kind, form) for kind in SAME for form in FORMS if not ("parquet" in kind and form == "with BOM")]


@pytest.mark.parametrize(("kind", "form"), FORMS_OF_KINDS, ids=[f"{kind} {form}" for kind, form in FORMS_OF_KINDS])
def test_every_kind_of_dataset_gives_the_same_segments(tmp_path, tokenizer_folder, kind, form):
    name, content = SAME[kind]
    if form == "with BOM":
        content = codecs.BOM_UTF8 + content
    if "gz" in form:
        content, name = gzip.compress(content), f"{name}.gz" if form == "as .gz" else name
    segments = load(write(tmp_path / name, content), tokenizer_folder, 20)
    whole = [WORDS.index(word) + 1 for word in "\n\n".join(DOCUMENTS).split()]
    assert segments.shape == (20, 16)
    assert segments.flatten().tolist() == whole[: 20 * 16]
    joined = "\n\n".join(documents(tmp_path / name))
    assert joined.splitlines() == "\n\n".join(DOCUMENTS).splitlines()


PLAIN = {
    "prose": "Once upon a time, a text.\n",
    "empty": "",
    "blank": "\n \n",
    "a brace": "{not json} is how this text begins.\n",
    "json over many lines": '{\n"text": "a"\n}\n',
    "a bracket": '[Music] "a" [1]\n',
    "a list of numbers": "[1, 2]\n[3]\n",
    "a table": "text,b\n1,2\n",
    "the name of a magic": "%PD BZh9 PK PAR1 text\n",
    "an inner mark": "a\ufeffb\n",
    "form feed and other line ends": "a\x0cb\u2028c\x85d\n",
}


@pytest.mark.parametrize("content", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("suffix", [".txt", "", ".md", ".2024"])
def test_other_text_stays_plain_text(tmp_path, content, suffix):
    """Such a file is one document, which is what Python reads in text mode."""
    path = write(tmp_path / f"a{suffix}", content.encode())
    assert list(documents(path)) == [path.read_text(encoding="utf-8")]


def test_large_files_are_not_read_to_the_end(tmp_path):
    """What follows the first documents is damaged, and is not seen."""
    rows = json_lines(ROWS * 400)
    compressed = gzip.compress(rows)
    for name, content in (
        ("a.jsonl", rows + b"\n{broken"),
        ("a.jsonl.gz", compressed[:-100]),
        ("a.json", json.dumps(ROWS).encode()[:-1] + b", {broken"),
        ("a.csv", table(CELLS, ",") + b"1\n"),
    ):
        assert next(documents(write(tmp_path / name, content))) == DOCUMENTS[0]
        with pytest.raises(InputError):
            list(documents(tmp_path / name))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_lists_are_read_in_chunks_of_any_size(tmp_path, monkeypatch, chunk):
    texts = ["", "a", 'q"uo\\te', "caf\xe9 \u2028 \U0001f600", "]", "x" * 100]
    path = write(
        tmp_path / "a.json", json.dumps([{"text": text} for text in texts], ensure_ascii=False, indent=1).encode()
    )
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    assert list(documents(path)) == texts


def test_lists_may_be_empty(tmp_path):
    assert list(documents(write(tmp_path / "a.json", b" [ ] \n"))) == []


def test_cells_of_csv_may_hold_line_ends_and_quotation_marks(tmp_path):
    texts = ["a\nb", 'say "x", then', "c\td", "x" * 200_000]
    assert list(documents(write(tmp_path / "a.csv", table([["text"], *([text] for text in texts)], ",")))) == texts
    assert csv.field_size_limit() == 131_072


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


TAKEN = "Give text in UTF-8, JSON lines, a JSON list, CSV, TSV or parquet .* token ids in .npy or .safetensors"
NO_FIELD = 'has no field "text", "messages" or "conversations"'
BROKEN = {
    "x.jsonl": (b'{"txt": 1}\n', rf'line 1 {NO_FIELD} \(fields: "txt"\)'),
    "y.jsonl": (b'{"text": "a"}\n[1]\n', "line 2 is not a JSON object"),
    "z.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not a JSON object"),
    "n.jsonl": (b'{"text": 7}\n', "not a string"),
    "u.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2 is not UTF-8 text"),
    "p.jsonl": (b"prose", "line 1 is not a JSON object"),
    "s.jsonl": (rb'{"text": "\ud800"}', "unpaired surrogate"),
    "u.txt": (b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
    "j.txt": (b'{"a": 1, "b": 2}\n', rf'line 1 {NO_FIELD} \(fields: "a", "b"\)'),
    "e.txt": (b'{"\\u001b[2J": 1}\n', r'\(fields: "\\x1b\[2J"\)'),
    "p.parquet": (b"PAR0", "not a parquet"),
    "c.parquet": (parquet({"a": [1], "b": [2]}), r'the table has no column "text", .* \(columns: "a", "b"\)'),
    "n.parquet": (parquet({"text": [1]}), 'column "text" holds int64, not strings'),
    "a.json": (b"prose", "not JSON"),
    "b.json": (b'{"a": 1}\n{"a": 2}\n', rf'line 1 {NO_FIELD} \(fields: "a"\)'),
    "c.json": (b'{"a": {"b": 1}, "c": [1]}', r'the object has no list of objects .* \(fields: "a", "c"\)'),
    "d.json": (
        b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}',
        'several lists of objects \\("train", "test"\\)',
    ),
    "e.json": (b'{"data": [{"a": 1}]}', f'entry 1 of "data" {NO_FIELD}'),
    "f.json": (b'{"text": "a"\n}\n{"text": "b"\n}', "not JSON .*Give JSON lines"),
    "g.json": (b'["a", "b"]', "entry 1 is not a JSON object"),
    "h.json": (b'[{"text": "a"}, {"txt": "b"}]', f"entry 2 {NO_FIELD}"),
    "i.json": (b'[{"text": "a"},]', "entry 2 of the list is not complete JSON"),
    "k.json": (b'[{"text": "a"} {"text": "b"}]', "no comma after entry 1"),
    "l.json": (b'[{"text": "a"}]\n[{"text": "b"}]', "goes on after the end of the JSON list"),
    "m.json": (b'[{"text": "a"}, {"text": "caf\xe9"}]', "not UTF-8 text"),
    "n.json": (b"[" * 100_000, "entry 1 of the list is not complete JSON"),
    "o.json": (b"3", "neither a JSON object nor a list"),
    "a.csv": (b"a,b\n1,2\n", r'no column "text" in the first line \(columns: "a", "b"\)'),
    "b.csv": (b"id;text\n1;2\n", r'columns: "id;text"'),
    "c.csv": (b"", r"columns: none|no column"),
    "d.csv": (b"id,text\n1,a, b\n", "line 2: 3 columns, but the first line has 2"),
    "e.csv": (b'text\n"a\nb\n', "line 3: unexpected end of data"),
    "f.csv": (b'text\n"a" b\n', "line 2: .* expected after"),
    "g.csv": (b"text,text\na,b\n", 'several columns "text"'),
    "h.csv": (b"text\ncaf\xe9\n", "line 2 is not UTF-8"),
    "a.gz": (b"plain", "not gzip data"),
    "b.txt.gz": (gzip.compress(b"a" * 9999)[:-9], "damaged or truncated gzip data"),
    "c.txt.gz": (gzip.compress(b"a" * 9999)[:-8] + bytes(8), "damaged or truncated gzip data"),
    "16.txt": ("text".encode("utf-16"), f"UTF-16 or UTF-32 text. {TAKEN}"),
    "16be.jsonl": (codecs.BOM_UTF16_BE + "text".encode("utf-16-be"), f"UTF-16 text. {TAKEN}"),
    "16.csv.gz": (gzip.compress("text".encode("utf-16")), f"UTF-16 or UTF-32 text. {TAKEN}"),
    "16": ("text".encode("utf-16-le"), f"NUL bytes.*{TAKEN}"),
    "binary": (b"\x7fELF\0\0", f"NUL bytes.*{TAKEN}"),
    "a.npy.gz": (gzip.compress(b"\x93NUMPY\1\0"), f"a NumPy array, but its name does not end in .npy. {TAKEN}"),
    "c4.tar.gz": (gzip.compress(b"x"), f"a tar archive. {TAKEN}"),
    "archive": (b"PK\x03\x04" + bytes(99), f"a zip archive. {TAKEN}"),
    "chat.jsonl": (b'{"messages": []}', '"messages" is empty or not a list of messages'),
    "chat2.jsonl": (b'{"messages": ["hi"]}', "line 1, message 1 is not a JSON object"),
    "chat3.jsonl": (
        b'{"messages": [{"role": "user", "content": "a"}, {"who": "user"}]}',
        r'line 1, message 2 has no texts "role" and "content", or "from" and "value" \(fields: "who"\)',
    ),
    "chat4.jsonl": (b'{"conversations": [{"from": "bob", "value": "a"}]}', '"from" is "bob", not "system", "human"'),
    "chat5.jsonl": (rb'{"messages": [{"role": "user", "content": "\ud800"}]}', "unpaired surrogate"),
}
"""Content of files that are refused, and a pattern of the message, by the name of the file."""


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


SUFFIXES = [(suffix, kind.what) for kind in REFUSED for suffix in kind.suffixes]


@pytest.mark.parametrize(("suffix", "what"), SUFFIXES, ids=[suffix for suffix, _ in SUFFIXES])
def test_files_of_other_kinds_are_refused_by_name(tmp_path, suffix, what):
    with pytest.raises(InputError, match=f": {what}. {TAKEN}"):
        list(documents(write(tmp_path / f"data{suffix.upper()}", b"text")))


MAGICS = [kind for kind in REFUSED if kind.magic is not None]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", MAGICS, ids=[f"{kind.what} {kind.magic!r}" for kind in MAGICS])
def test_files_of_other_kinds_are_refused_by_content(tmp_path, kind, compressed):
    content = b"a" * kind.offset + kind.magic
    path = write(tmp_path / "data.txt", gzip.compress(content) if compressed else content)
    with pytest.raises(InputError, match=f": {re.escape(kind.what)}. {TAKEN}"):
        list(documents(path))


def test_no_suffix_is_both_read_and_refused():
    suffixes = [suffix for row in (*KINDS, *REFUSED) for suffix in row.suffixes]
    assert len(suffixes) == len(set(suffixes))


@pytest.mark.parametrize(
    ("name", "what"), [("a.jsonl", "JSON lines?|line 1"), ("a.txt", "plain text"), ("a.json", "a JSON object")]
)
def test_what_must_be_read_as_a_whole_has_a_largest_size(tmp_path, monkeypatch, name, what):
    for limit in ("_MAX_PLAIN", "_MAX_OBJECT", "MAX_LINE"):
        monkeypatch.setattr(readers, limit, 40)
    content = b'{"text":\n"' + b"a" * 50 + b'"}' if name == "a.json" else b"{" + b"a" * 50
    for compressed in (False, True):
        path = write(
            tmp_path / f"{name}{'.gz' if compressed else ''}", gzip.compress(content) if compressed else content
        )
        with pytest.raises(InputError, match=f"({what}).* (longer than|is read as a whole)"):
            list(documents(path))


@pytest.mark.parametrize("name", ["none.txt", "none.npy", "none.safetensors"])
def test_missing_files_and_folders_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"a folder. {TAKEN}"):
        load(tmp_path / name)


def test_pipes_are_refused(tmp_path):
    """A shell gives `<(zcat text.gz)` as such a path."""
    reading, writing = os.pipe()
    try:
        with pytest.raises(InputError, match=f"not a regular file, but a pipe or a device. Give the .gz, .*{TAKEN}"):
            load(Path(f"/dev/fd/{reading}"))
    finally:
        os.close(reading)
        os.close(writing)


def test_npy_with_pickled_objects_is_refused(tmp_path):
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"not a \.npy"):
        load(tmp_path / "o.npy")


def test_npy_of_floats_is_refused_as_token_ids(tmp_path):
    np.save(tmp_path / "f.npy", np.zeros(64))
    with pytest.raises(InputError, match="token ids are integers"):
        load(tmp_path / "f.npy")


CHAT = [("system", "w1 w2"), ("user", "w3"), ("assistant", "w4 w5 w6")]
STANDARD = {"messages": [{"role": role, "content": content} for role, content in CHAT]}
SHAREGPT = {
    "id": 7,
    "conversations": [
        {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": content} for role, content in CHAT
    ],
}
COLUMNS = {"messages": [[{**message, "name": None} for message in STANDARD["messages"]]] * 20}
CHATS = {
    "messages in jsonl": ("a.jsonl", json_lines([STANDARD] * 20)),
    "messages in .txt": ("a.txt", json_lines([STANDARD] * 20)),
    "messages in a list": ("a.json", json.dumps([STANDARD] * 20).encode()),
    "messages in parquet": ("a.parquet", parquet(COLUMNS)),
    "messages as conversations": ("a.jsonl", json_lines([{"conversations": STANDARD["messages"]}] * 20)),
    "conversations in jsonl": ("a.jsonl", json_lines([SHAREGPT] * 20)),
    "conversations in a gzipped list": ("a.json.gz", gzip.compress(json.dumps([SHAREGPT] * 20).encode())),
    "conversations in parquet": ("a.parquet", parquet({"conversations": [SHAREGPT["conversations"]] * 20})),
}
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"


def chat_tokenizer(folder, template=TEMPLATE, *, adds_bos=True):
    """Save a tokenizer of words with a chat template, and return the folder and the words by id."""
    words = ["<unk>", "<s>", "system", "user", "assistant", "26Jul2024", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return folder, words


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("kind", CHATS)
def test_chats_are_rendered_with_the_chat_template_of_the_model(tmp_path, kind, begun):
    """BOS, which both the template and the tokenizer write, stands where it stands in a text, and once."""
    folder, words = chat_tokenizer(tmp_path / "model")
    name, content = CHATS[kind]
    segments = load(write(tmp_path / name, content), folder, begun=begun)
    rendered = " ".join(f"{role} {content}" for role, content in CHAT * 20)
    text = load(write(tmp_path / "plain.txt", rendered.encode()), folder, begun=begun)
    assert torch.equal(segments, text)
    assert [words[index] for index in segments[0, :5]] == ["<s>", "system", "w1", "w2", "user"]
    assert (segments == 1).sum() == (4 if begun else 1)


def test_chats_follow_each_other_and_texts_are_separated_by_blank_lines(tmp_path):
    tokenizer = save_tokenizer(tmp_path, ["some text"])
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    sizes = {"num_samples": 1, "seq_len": 12, "vocab_size": 300}
    chats = write(tmp_path / "a.jsonl", json_lines([{"messages": [{"role": "user", "content": "hi"}]}] * 20))
    assert tokenizer.decode(load_segments(chats, tmp_path, **sizes)[0].tolist()) == "<hi>" * 3
    texts = write(tmp_path / "b.jsonl", json_lines([{"text": "<hi>"}] * 20))
    assert tokenizer.decode(load_segments(texts, tmp_path, **sizes)[0].tolist()) == "<hi>\n\n" * 2


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_template_that_writes_no_bos_is_rendered_as_it_is(tmp_path, adds_bos):
    folder, words = chat_tokenizer(tmp_path / "model", TEMPLATE.removeprefix("{{ bos_token }}"), adds_bos=adds_bos)
    segments = load(write(tmp_path / "a.jsonl", json_lines([STANDARD] * 20)), folder)
    assert [words[index] for index in segments[0, :2]] == (["<s>", "system"] if adds_bos else ["system", "w1"])
    assert (segments == 1).sum() == adds_bos


def test_the_current_date_in_a_chat_template_is_a_fixed_one(tmp_path):
    """A run that resumes on another day has the same tokens, so its identity is the same."""
    folder, words = chat_tokenizer(tmp_path / "model", "{{ strftime_now('%d%b%Y') }} " + TEMPLATE)
    segments = load(write(tmp_path / "a.jsonl", json_lines([STANDARD] * 20)), folder)
    assert words[segments[0, 1]] == "26Jul2024"


def test_fixing_the_date_changes_nothing_else_of_a_chat_template(tmp_path):
    for number, template in enumerate(
        (
            "\n\n{{ bos_token }}x",
            "  {%- for m in messages %}{{ m.content }}\n{% endfor %}",
            "\n{% for m in messages %}\n{{ m.role }}\n{% endfor %}\n",
            "{% macro f(x) %}[{{ x }}{{ bos_token }}]{% endmacro %}{{ f(messages[0].content) }}",
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        )
    ):
        folder, _ = chat_tokenizer(tmp_path / str(number), template, adds_bos=False)
        tokenizer = load_tokenizer(folder)
        expected = tokenizer.apply_chat_template(STANDARD["messages"], tokenize=False)
        assert render(tokenizer, folder, tmp_path, Chat(tuple(STANDARD["messages"]), "line 1")) == expected


def test_chats_need_a_chat_template_that_accepts_them(tmp_path, tokenizer_folder):
    path = write(tmp_path / "a.jsonl", json_lines([STANDARD]))
    with pytest.raises(
        InputError, match=r"line 1 is a chat, but the tokenizer of .* has no chat template. Add chat_templ"
    ):
        load(path, tokenizer_folder)
    folder, _ = chat_tokenizer(tmp_path / "strict", "{{ raise_exception('System role not supported') }}")
    with pytest.raises(InputError, match=r"line 1: .* refuses the chat \(TemplateError: System role not supported\)"):
        load(path, folder)
    folder, _ = chat_tokenizer(tmp_path / "endless", "{% for a in range(10**9) %}{% endfor %}")
    with pytest.raises(InputError, match=r"line 1: .* refuses the chat \(OverflowError: Range too big"):
        load(path, folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_blamed_instead_of_the_text(tmp_path):
    folder, words = chat_tokenizer(tmp_path / "model")
    path = write(tmp_path / "a.txt", " ".join(WORDS * 9).encode())
    with pytest.raises(InputError) as caught:
        load_segments(path, folder, num_samples=4, seq_len=16, vocab_size=50)
    assert str(caught.value) == (
        f"{folder}: the tokenizer has 56 tokens, but the model has 50: token {words.index('w44')} of the text is outside. "
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
