"""Download from the Hub and upload to it, tested with a local server that answers as the Hub does."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pytest
import torch

from cbqstream import hub as hub_module
from cbqstream.checkpoint.folder import find_tensors
from cbqstream.errors import InputError, StorageError
from cbqstream.evaluation.perplexity import evaluate
from quantized import modelopt_nvfp4, store
from tiny import SEQ_LEN, files_of, save_model

COMMITS = {"main": "a" * 40, "old": "b" * 40}
NAME = "owner/tiny-llama"


class Hub(ThreadingHTTPServer):
    """A local server that answers as the Hub does.

    Args:
        models: folder of each commit of each repository, by name and commit.
    """

    def __init__(self, models):
        super().__init__(("127.0.0.1", 0), Answers)
        self.models = models
        self.pushed = {}
        """Content of each uploaded file, by path."""
        self.created = []
        """Requests to create a repository."""
        self.requests = []
        """Method and path of every request."""
        self.downloads = []
        """Names of the files that were downloaded as a whole."""
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    """The routes of the Hub that huggingface_hub uses for downloads and uploads."""

    def log_message(self, *_):
        pass

    def answer(self, content, code=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, kind):
        self.answer({"error": f"{kind} not found"}, 404, X_Error_Code=kind, X_Error_Message=f"{kind} not found")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        self.server.requests.append((self.command, path))
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if name not in self.server.models:
            self.missing("RepoNotFound")
            return
        rest = path.partition(name)[2].strip("/").split("/")
        if rest[0] == "revision":
            commit = COMMITS.get(rest[1], rest[1])
            if commit not in COMMITS.values():
                self.missing("RevisionNotFound")
                return
            self.answer({"id": name, "sha": commit, "siblings": []})
        elif rest[0] == "tree":
            folder = self.server.models[name][rest[1]]
            self.answer([self.entry(file, folder) for file in sorted(folder.rglob("*")) if file.is_file()])
        elif rest[0] == "resolve":
            commit = COMMITS.get(rest[1], rest[1])
            file = self.server.models[name].get(commit, Path()) / "/".join(rest[2:])
            if not file.is_file():
                self.missing("EntryNotFound")
                return
            content = file.read_bytes()
            given = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": commit}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked is None:
                if self.command == "GET":
                    self.server.downloads.append(file.name)
                self.answer(content, **given)
            else:
                first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
                self.answer(content[first : last + 1], 206, **given)

    @staticmethod
    def entry(file, folder):
        content = file.read_bytes()
        found = {"type": "file", "path": str(file.relative_to(folder)), "size": len(content)}
        return {**found, "oid": hashlib.sha1(content).hexdigest()}

    def do_POST(self):
        path = urlparse(self.path).path
        self.server.requests.append(("POST", path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.server.created.append(asked)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.answer({"url": f"{self.server.address}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self.answer(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.pushed[line["value"]["path"]] = content
            where = path.removeprefix("/api/models/").split("/commit/")[0]
            self.answer(
                {
                    "success": True,
                    "commitOid": "c" * 40,
                    "commitUrl": f"{self.server.address}/{where}/commit/{'c' * 40}",
                }
            )
        else:
            self.answer({"error": parse_qs(path)}, 500)


@pytest.fixture
def hub(tmp_path):
    """A running server with one model of two commits, which also hold weights in formats that are never downloaded."""
    folders = {}
    for index, commit in enumerate(COMMITS.values()):
        folder = save_model(tmp_path / commit[:2], seed=index, dtype=torch.float32)
        (folder / "pytorch_model.bin").write_bytes(b"never read")
        (folder / "original").mkdir()
        (folder / "original" / "weights.safetensors").write_bytes(b"never read")
        folders[commit] = folder
    server = Hub({NAME: folders})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def python(hub, tmp_path):
    """A function that runs Python with the server as the Hub. Its keyword arguments are environment variables."""

    def call(*arguments, **environment):
        settings = {
            **os.environ,
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_secret",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **environment,
        }
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)

    return call


@pytest.fixture
def run(python):
    """A function that runs the command line with the server as the Hub. Its keyword arguments are environment variables."""
    return lambda *arguments, **environment: python("-m", "cbqstream", *arguments, **environment)


@pytest.fixture
def fetch(python):
    """A function that downloads the model, or its headers, and returns what `cbqstream.hub` returns."""

    def call(function="fetch", **environment):
        code = f"from cbqstream.hub import {function}; print({function}({NAME!r}))"
        made = python("-c", code, **environment)
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    return call


def options(tokens):
    """Options of a small, fast run."""
    lengths = ["--num-samples", 4, "--seq-len", SEQ_LEN, "--group-size", 32, "--rounding", "nearest"]
    return ["--dataset", tokens, *lengths, "--device", "cpu", "--threads", 1]


def test_quantize_downloads_a_model_from_the_hub_and_uploads_the_result(run, hub, tokens, tmp_path):
    """The result is that of a local copy of the model. A finished run can be resumed without requests to the Hub."""
    out = tmp_path / "out"
    made = run("quantize", NAME, out, *options(tokens), "--push-to", "me/tiny-w4")
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-1].startswith("pushed: ")
    requested = [path for _, path in hub.requests]
    assert not any("pytorch_model.bin" in path or "original" in path for path in requested)
    assert {name: content for name, content in hub.pushed.items() if name != ".gitattributes"} == files_of(out)
    assert [(repository["name"], repository["visibility"]) for repository in hub.created] == [("tiny-w4", "private")]

    local = run("quantize", hub.models[NAME][COMMITS["main"]], tmp_path / "local", *options(tokens))
    assert local.returncode == 0, local.stderr
    assert files_of(tmp_path / "local") == files_of(out)

    hub.requests.clear()
    again = run("resume", f"{out}.run", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert hub.requests == []


def test_eval_measures_the_requested_revision(run, hub, tokens):
    found = {}
    for revision, commit in COMMITS.items():
        lengths = ["--seq-len", SEQ_LEN, "--device", "cpu", "--threads", 1]
        made = run("eval", NAME, "--revision", revision, "--text", tokens, *lengths)
        assert made.returncode == 0, made.stderr
        expected = evaluate(hub.models[NAME][commit], tokens, seq_len=SEQ_LEN, device="cpu", threads=1)
        assert f"perplexity {expected.perplexity:.4f}" in made.stdout
        found[revision] = made.stdout
    assert found["main"] != found["old"]


def test_plan_of_a_model_on_the_hub_reads_only_headers(run, hub, tmp_path):
    """For each revision, the plan is that of the same model in a folder. Missing models and damaged headers are errors of one line."""
    for revision, commit in COMMITS.items():
        flags = ["--json", "--without-time", "--group-size", 32]
        made = run("plan", NAME, "--revision", revision, *flags)
        assert made.returncode == 0, made.stderr
        assert json.loads(made.stdout) == json.loads(run("plan", hub.models[NAME][commit], *flags).stdout)
    assert not any(name.endswith(".safetensors") for name in hub.downloads)
    hub.models[NAME][COMMITS["old"]] = tmp_path / "cache"
    for arguments, message in (
        (("owner/nothing",), "owner/nothing: no such folder, and the download from the Hub failed ("),
        ((NAME, "--revision", "old"), f"{NAME}: no such folder, and "),
    ):
        refused = run("plan", *arguments)
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (65, "", 1), refused.stderr
        assert message in refused.stderr
    damaged = hub.models[NAME][COMMITS["main"]]
    index = json.loads((damaged / "model.safetensors.index.json").read_text())["weight_map"]
    shard = damaged / index["model.layers.1.mlp.up_proj.weight"]
    for header in (
        "[]",
        '{"a": "x"}',
        '{"a": {"dtype": "BF16", "shape": [4], "data_offsets": 5}}',
        '{"model.layers.1.w": {"dtype": "BF16", "shape": [1, 549755813888], "data_offsets": [0, 1099511627776]}}',
        '{"model.layers.1.w": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [0, 0]}}',
    ):
        shard.write_bytes(len(header).to_bytes(8, "little") + header.encode())
        refused = run("plan", NAME, "--without-time")
        assert (refused.returncode, refused.stderr.count("\n")) == (65, 1), (header, refused.stderr)
    offline = run("plan", NAME, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "nothing"))
    assert (offline.returncode, offline.stderr.count("\n")) == (65, 1)
    assert f"Download it first: hf download {NAME}." in offline.stderr


def test_shards_and_small_files_in_subfolders_are_downloaded_and_other_weights_are_not(fetch, hub):
    folder = hub.models[NAME][COMMITS["main"]]
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    moved = index["model.norm.weight"]
    (folder / "part[1]").mkdir()
    (folder / moved).rename(folder / "part[1]" / "x.safetensors")
    new = {name: "part[1]/x.safetensors" if shard == moved else shard for name, shard in index.items()}
    path.write_text(json.dumps({"weight_map": new}))
    others = "1_Pooling/config.json", "onnx/model.onnx_data", ".cache/x", "a/.b/y"
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    assert "part[1]/x.safetensors" in fetch("fetch_headers")
    for offline in ("0", "1"):
        assert find_tensors(Path(fetch(HF_HUB_OFFLINE=offline))).keys() == index.keys()
    assert hub.downloads.count("x.safetensors") == 1
    assert "weights.safetensors" not in hub.downloads
    assert [name for name in others if (Path(fetch()) / name).exists()] == ["1_Pooling/config.json"]


def test_adapters_and_quantized_models_are_refused_before_its_weights_are_downloaded(
    run, python, hub, tokens, tmp_path
):
    """A repository without config.json is refused by its name."""
    folder = hub.models[NAME][COMMITS["main"]]
    (folder / "adapter_config.json").write_text("{}")
    for command in (("quantize", NAME, tmp_path / "out", *options(tokens)), ("plan", NAME, "--without-time")):
        refused = run(*command, HF_HOME=str(tmp_path / command[0]))
        assert (refused.returncode, refused.stderr.count("\n")) == (65, 1), refused.stderr
        assert ": holds a LoRA adapter (adapter_config.json), whose weights would be left out. " in refused.stderr
    (folder / "adapter_config.json").rename(folder / "hf_quant_config.json")
    refused = run("plan", NAME, "--without-time")
    assert (refused.returncode, refused.stderr.count("\n")) == (65, 1), refused.stderr
    assert (
        "/hf_quant_config.json: the model is already quantized (modelopt), and its quant_algo None is not one of FP8, "
        in refused.stderr
    )
    assert not any(name.endswith(".safetensors") for name in hub.downloads)
    for name in ("hf_quant_config.json", "config.json"):
        (folder / name).unlink()
    (folder / ".gitattributes").write_text("")
    refused = python("-c", f"from cbqstream.hub import fetch; fetch({NAME!r})", HF_HOME=str(tmp_path / "other"))
    message = f"InputError: {NAME}: has no config.json. Give a model in safetensors that transformers can load.\n"
    assert refused.stderr.endswith(message)


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
def test_a_quantized_model_is_planned_from_its_headers(run, hub, tmp_path, where):
    """The plan on the Hub is that of a local copy, and no weight is downloaded."""
    folder = store(
        hub.models[NAME][COMMITS["main"]], modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    )
    if where != "config.json":
        config = json.loads((folder / "config.json").read_text())
        described = {"quantization": config.pop("quantization_config")}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / where).write_text(json.dumps(described))
    plans = [run("plan", model, "--without-time", "--group-size", 32, "--json") for model in (NAME, folder)]
    assert [made.returncode for made in plans] == [0, 0], plans
    on_hub, local = (json.loads(made.stdout) for made in plans)
    assert "28 of its 39 tensors are quantized already" in on_hub["warnings"][0]
    assert {**on_hub, "warnings": []} == {**local, "warnings": []}
    assert not any(name.endswith(".safetensors") for name in hub.downloads)


def test_models_that_cannot_be_downloaded_are_errors_of_one_line(run, tokens, tmp_path):
    cases = {
        ("owner/nothing",): "owner/nothing: no such folder, and the download from the Hub failed (",
        (NAME, "--revision", "nowhere"): f"{NAME}: no such folder, and the download from the Hub failed (",
        ("nothing/here/at-all",): "nothing/here/at-all",
    }
    for arguments, message in cases.items():
        refused = run("quantize", arguments[0], tmp_path / "out", *options(tokens), *arguments[1:])
        assert (refused.returncode, refused.stdout) == (65, ""), refused.stderr
        assert refused.stderr.count("\n") == 1
        assert message in refused.stderr
    offline = run("quantize", NAME, tmp_path / "out", *options(tokens), HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stderr) == (
        65,
        f"cbqstream: error: {NAME}: no such folder, and the Hub was not reached or is turned off (HF_HUB_OFFLINE)."
        f" Download it first: hf download {NAME}.\n",
    )
    assert not list(tmp_path.glob("out*"))


def test_invalid_settings_are_refused_before_the_model_is_downloaded(run, hub, tokens, tmp_path):
    refused = run("quantize", NAME, tmp_path / "out", *options(tokens), "--scheme", "W9A16")
    assert (refused.returncode, hub.requests) == (2, [])


@pytest.mark.parametrize("error", [RuntimeError("upload failed"), TimeoutError(), ValueError("no such\nthing")])
def test_every_failure_of_a_download_or_an_upload_is_an_error_of_one_line(monkeypatch, tmp_path, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(hub_module, "snapshot_download", fail)
    monkeypatch.setattr(hub_module.HfApi, "create_repo", fail)
    for call, kind in (
        (lambda: hub_module.fetch("a/b"), InputError),
        (lambda: hub_module.push(tmp_path, "a/b", private=True), StorageError),
    ):
        with pytest.raises(kind) as raised:
            call()
        assert str(raised.value).count("\n") == 0


def test_push_refuses_bad_names_run_directories_and_damaged_results(run, hub, tokens, tmp_path):
    """A failed upload is an error of one line too."""
    nameless = run("quantize", NAME, tmp_path / "out", *options(tokens), "--push-to", "no name")
    assert (nameless.returncode, "no name is not a name on the Hub" in nameless.stderr) == (2, True)
    assert not list(tmp_path.glob("out*"))
    made = run("quantize", NAME, tmp_path / "out", *options(tokens))
    assert made.returncode == 0, made.stderr
    run_itself = run("push", f"{tmp_path / 'out'}.run", "me/tiny-w4")
    assert (run_itself.returncode, run_itself.stderr.count("\n")) == (65, 1)
    assert "a run directory, which cannot be uploaded" in run_itself.stderr
    (shard,) = sorted(Path(tmp_path / "out").glob("block-00001*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    refused = run("push", tmp_path / "out", "me/tiny-w4")
    assert (refused.returncode, refused.stderr.count("\n")) == (65, 1)
    assert "not pushed: " in refused.stderr
    assert hub.pushed == {}
    shard.write_bytes(whole)
    hub.models.clear()
    hub.shutdown()
    hub.server_close()
    failed = run("push", tmp_path / "out", "me/tiny-w4")
    assert (failed.returncode, failed.stderr.count("\n")) == (74, 1)
    assert re.search(r"me/tiny-w4: the upload of \S+/out to the Hub failed \(", failed.stderr)
