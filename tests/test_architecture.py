"""The house rules of the package: which layer may import which, caps, one home per dependency, and what may never appear."""

import ast
import itertools
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cbqstream"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"__main__"},
    {"cli"},
    {"commands", "run"},
    {"planning"},
    {"evaluation"},
    {"report"},
    {"windows"},
    {"packed"},
    {"rounding", "transforms"},
    {"calibration"},
    {"models"},
    {"checkpoint"},
    {"activations"},
    {"numerics"},
    {"rundir"},
    {"runtime"},
    {"records"},
    {"options"},
    {"profiles"},
    {"recipe"},
    {"config"},
    {"scheme"},
    {"setting"},
    {"hub"},
    {"disk"},
    {"digest"},
    {"errors"},
]
"""From the top down. A layer imports only from layers below it (and itself)."""

BESIDE = [
    {"commands", "run"},
    {"evaluation", "report"},
    {"windows", "packed"},
    {"rounding", "transforms"},
    {"packed", "rounding"},
    {"packed", "transforms"},
    {"calibration", "packed"},
    {"checkpoint", "activations"},
    {"recipe", "config", "hub", "disk"},
]
"""Layers that do not import each other."""

HOMES = {
    "zarr": {"activations"},
    "google_crc32c": {"activations"},
    "transformers": {"models", "calibration", "evaluation"},
    "accelerate": {"models", "calibration", "evaluation"},
    "safetensors": {"checkpoint", "packed"},
    "compressed_tensors": {"packed", "checkpoint"},  # writing results; decoding sources
    "gguf": {"packed"},
    "matplotlib": {"report"},
    "huggingface_hub": {"hub"},
    "lm_eval": {"evaluation"},
    "psutil": {"runtime"},
    "triton": {"rounding"},
    "filelock": {"rundir"},
    "typer": {"cli"},
    "rich": {"cli", "report"},
}

BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_MODULES = {"pickle", "yaml", "subprocess", "marshal", "shelve", "dill"}
BANNED_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def height(layer: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if layer in names)


def imports_of(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.append(node.module or "")
    return names


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def test_there_is_something_to_check():
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    layer = layer_of(path)
    if layer == "__init__":
        return  # the public names; nothing inside the package imports them
    for name in imports_of(parse(path)):
        parts = name.split(".")
        if parts[0] != "cbqstream":
            continue
        assert len(parts) > 1, f"{path.name} imports the package itself"
        other = parts[1]
        if other == layer:
            continue
        assert height(other) > height(layer), f"{path.name} ({layer}) imports {name}, which is above it"
        for group in BESIDE:
            assert not {layer, other} <= group, f"{path.name} ({layer}) imports {name}, which is beside it"


def test_no_cycles():
    graph = {}
    for path in FILES:
        module = ".".join(("cbqstream", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        graph[module] = {name for name in imports_of(parse(path)) if name.startswith("cbqstream.")}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_homes_of_dependencies(path):
    for name in imports_of(parse(path)):
        home = HOMES.get(name.split(".")[0])
        assert home is None or layer_of(path) in home, (
            f"{path.name} imports {name}, which lives in {sorted(home or ())}"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_caps(path):
    lines = path.read_text().count("\n")
    assert lines <= (60 if path.name == "__init__.py" else 400)
    assert path.name not in BANNED_NAMES
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
            length = (node.end_lineno or 0) - body[0].lineno + 1
            assert length <= 60, f"{path.name}:{node.lineno} {node.name} has a body of {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_never_appears(path):
    tree = parse(path)
    for name in imports_of(tree):
        assert name.split(".")[0] not in BANNED_MODULES, f"{path.name} imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in BANNED_CALLS, f"{path.name}:{node.lineno} calls {node.func.id}"
            if isinstance(node.func, ast.Attribute):
                assert node.func.attr != "from_pretrained" or path.name in ("tokenizer.py", "loaded.py"), (
                    f"{path.name}:{node.lineno}"
                )
                called = ast.unparse(node.func)
                assert called not in {
                    "torch.load",
                    "torch.rand",
                    "torch.randn",
                    "np.random",
                    "torch.manual_seed",
                } or any(keyword.arg == "generator" for keyword in node.keywords), (
                    f"{path.name}:{node.lineno} calls {called}"
                )
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno}: bare except"
            assert ast.unparse(node.type) not in {"Exception", "BaseException"} or path.name in BROAD, (
                f"{path.name}:{node.lineno}: broad except"
            )
        if isinstance(node, ast.FunctionDef) and layer_of(path) != "cli":
            local = [inner for inner in ast.walk(node) if isinstance(inner, ast.Import | ast.ImportFrom)]
            assert not local, f"{path.name}:{node.lineno}: import inside {node.name}"


BROAD = {
    *("kernels.py", "embedding_and_head.py", "tokenizer.py"),
    *("configuration.py", "meta_model.py", "probe.py", "loaded.py"),
}
"""Files that may catch every exception: of tokenizers, of the code of models, of transformers as it loads a model, and of a compiler."""

WRITING_CALLS = {
    "chmod",
    "hardlink_to",
    "link_to",
    "mkdir",
    "rename",
    "replace",
    "replace_file",
    "rmdir",
    "rmtree",
    "save",
    "save_file",
    "symlink_to",
    "touch",
    "truncate",
    "unlink",
    "write_bytes",
    "write_text",
}
WRITING_MODES = {kind + binary + plus for kind in "wax" for binary in ("", "b") for plus in ("", "+")} | {
    "r+",
    "rb+",
    "r+b",
}
OWN_OPERATIONS = {"disk", "_disk"}  # disk.py's operations may have such names


def is_replacing_values(call: ast.Call, owner: str) -> bool:
    """Whether a call is dataclasses.replace(value, ...) or str.replace(old, new); Path.replace has one argument."""
    if isinstance(call.func, ast.Name):
        return call.func.id == "replace"
    return call.func.attr == "replace" and len(call.args) >= 2 and owner != "os"


def test_only_disk_writes():
    """Every file that is opened for writing, renamed, linked or deleted is so in disk.py."""
    for path in FILES:
        if path.name == "disk.py":
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil"):
                assert not {alias.name for alias in node.names} & WRITING_CALLS, (
                    f"{path.name} imports from {node.module}"
                )
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            owner = ast.unparse(node.func.value).rpartition(".")[2] if isinstance(node.func, ast.Attribute) else ""
            place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
            if name in WRITING_CALLS and owner not in OWN_OPERATIONS and not is_replacing_values(node, owner):
                pytest.fail(f"{place} calls {ast.unparse(node.func)}")
            if name in ("open", "fdopen") and owner not in ("Checkpoint", "ZarrStore", "os"):
                values = [*node.args, *(keyword.value for keyword in node.keywords)]
                modes = [value.value for value in values if isinstance(value, ast.Constant)]
                assert not any(mode in WRITING_MODES for mode in modes), place
            if owner == "os" and name == "open":
                assert not {"O_WRONLY", "O_RDWR", "O_CREAT"} & set(ast.unparse(node).replace(".", " ").split()), place


ALONE = re.compile(r"(What|Of|Every|That|Which|Where|How|The same)\b")


def docstrings(tree: ast.Module) -> list[str]:
    """First lines of the docstrings of modules, classes, functions and assigned names."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            found.append(ast.get_docstring(node) or "")
            for assigned, text in itertools.pairwise(node.body):
                named = isinstance(assigned, ast.Assign | ast.AnnAssign)
                if named and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    found.append(str(text.value.value))
    return [text.split("\n")[0] for text in found if text]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_first_lines_of_docstrings_can_be_read_alone(path):
    for line in docstrings(parse(path)):
        assert not ALONE.match(line), f"{path.name}: {line}"


def test_the_readme_takes_a_minute():
    assert len((PACKAGE.parent / "README.md").read_text()) <= 6000
