"""Check of a run directory or a finished model for missing, damaged or changed data. It changes nothing and takes no lock."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cbqstream.activations.store import StreamShape
from cbqstream.activations.zarr_store import ZarrStore, shape_beside
from cbqstream.checkpoint.folder import find_tensors, quantization_of, read_json, refuse_adapter
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import WeightSource, named_piece
from cbqstream.checkpoint.verified import VerifiedCheckpoint
from cbqstream.errors import CbqstreamError, DeviceMemoryError, InputError
from cbqstream.evaluation.loaded import load_beside_streamed
from cbqstream.evaluation.model import EvaluationOptions, open_model
from cbqstream.models.families import joined_with
from cbqstream.models.meta_model import MetaModel
from cbqstream.packed.format import faults_of, schemes_if_own
from cbqstream.packed.output import SUMS, require_sums
from cbqstream.packed.packed_checkpoint import CPU, PackedCheckpoint
from cbqstream.rundir.chain import QUANTIZED, REFERENCE, Chain, is_run, neither_run_nor_model


@dataclass(slots=True)
class Findings:
    """Result of a check."""

    facts: list[str] = field(default_factory=list)
    """Descriptions of the parts that were checked, one line each."""
    problems: list[str] = field(default_factory=list)
    """Problems that were found, one line each."""

    def attempt(self, check: Callable[..., object], *arguments: object) -> bool:
        """Run a check and record an expected error as a problem.

        Args:
            check: the check; it raises an error if it finds a problem.
            arguments: arguments of the check.

        Returns:
            Whether the check found no problem.
        """
        try:
            check(*arguments)
        except DeviceMemoryError:
            raise  # not a problem of the data
        except (CbqstreamError, OSError) as error:
            self.problems.append(str(error))
            return False
        return True


@dataclass(frozen=True, slots=True)
class _Options:
    """Arguments of `check`."""

    read_data: bool
    blocks_path: str | None
    load: bool
    allow_links: bool


def check(
    path: Path, *, read_data: bool, blocks_path: str | None = None, load: bool = False, allow_links: bool = False
) -> Findings:
    """Check a run directory or a model folder.

    Args:
        path: the folder.
        read_data: read all data and compare it with the committed checksums; otherwise only names, sizes, headers and records are
            compared.
        blocks_path: module path of the list of transformer blocks of a model; found by default. For a run, its settings have it.
        load: load a finished model with transformers, and compare its logits with those of the streamed evaluation.
        allow_links: read shards that are links to files outside the folder of the model, or of the source of a run.

    Raises:
        InputError: the records of a run are damaged, or the folder is neither a run nor a model.
        IdentityError: the run was made by another version.
    """
    options = _Options(read_data, blocks_path, load, allow_links)
    if is_run(path):
        while True:
            chain = Chain.read(path)
            found = _check_run(chain, options)
            if not found.problems or Chain.read(path).last == chain.last:
                return found  # otherwise another process committed during the check, which is repeated
    if (path / "config.json").exists():
        found = Findings()
        found.attempt(_check_model, path, options, {}, found)
        return found
    refuse_adapter(path)
    raise neither_run_nor_model(path)


def _check_run(chain: Chain, options: _Options) -> Findings:
    found, read_data = Findings(), options.read_data
    found.facts.append(f"records: {chain.next_window} of {chain.num_commits} commits, an unbroken chain")
    intact: list[Path] = []
    if found.attempt(chain.require_parts):
        files = list(chain.expected_parts())
        intact = [file for file in files if read_data and found.attempt(chain.require_intact, file)]
        found.facts.append(f"parts: {len(files)} files, {_how(len(intact), read_data=read_data)}")
    if not chain.is_complete and chain.commits:
        found.facts.append(_streams(chain, read_data=read_data))
    config = chain.run.config
    if read_data:
        found.attempt(_read_source_again, chain, options, found)
    out = Path(config.out)
    if chain.is_complete and chain.is_result(out):
        found.facts.append(f"result: {out}")
        expected = chain.expected_parts()
        sums = {file.name: expected[file].sha256 for file in intact if _is_one_file(out / file.name, file)}
        found.attempt(_check_model, out, replace(options, blocks_path=config.blocks_path), sums, found)
    elif options.load:
        found.facts.append("result: not finished yet, so nothing was loaded")
    return found


def _how(intact: int, *, read_data: bool) -> str:
    """Description of how files were compared with the commits."""
    return f"{intact} read and as committed" if read_data else "of the right size (--read-data compares their content)"


def _streams(chain: Chain, *, read_data: bool) -> str:
    """A line about the streams. Missing or damaged streams are not a problem, because they are recomputed."""
    folder, committed = chain.acts(chain.next_window), chain.committed_acts or {}
    shape = StreamShape(*chain.run.stream)
    try:
        for name, table in committed.items():
            of_stream = name in (REFERENCE, QUANTIZED)
            expected = shape if of_stream else shape_beside(name, shape.num_segments)
            ZarrStore.open(folder / name, expected).require(table, read=read_data)
    except InputError as error:
        if Chain.read(chain.path).last != chain.last:
            return "streams: not checked, because the run committed a window during the check"
        return f"streams: {error} They will be recomputed."
    return f"streams: {len(committed)} of {shape.num_segments} segments, {'read and ' if read_data else ''}as committed"


def _read_source_again(chain: Chain, options: _Options, found: Findings) -> None:
    folder = Path(chain.run.config.model)
    stored, names = find_tensors(folder, allow_links=options.allow_links), chain.source_digests
    source = VerifiedCheckpoint(stored)
    source.remember(names)
    same = [found.attempt(_require, source, folder, name) for name in names]
    if source.fingerprint() != chain.run.identity.source_weights:
        found.problems.append(f"{folder}: the weights changed since this run began. Restore them.")
    found.facts.append(f"source: {sum(same)} of {len(names)} tensors that were read are unchanged")


def _require(source: VerifiedCheckpoint, folder: Path, name: str) -> None:
    """Read a tensor of the source again, which compares its checksum.

    Raises:
        InputError: the tensor is missing or changed.
    """
    tensor = named_piece(source.stored, name)
    if tensor is None:
        raise InputError(folder, "missing. Restore the weights.", tensor=name)
    deque(source.raw(tensor), maxlen=0)


def _is_one_file(link: Path, file: Path) -> bool:
    return link.exists() and link.samefile(file)


def _check_model(folder: Path, options: _Options, intact: dict[str, str], found: Findings) -> None:
    config = read_json(folder, "config.json")
    checkpoint = Checkpoint.open(folder, allow_links=options.allow_links)
    quantization = quantization_of(folder, config)
    if quantization is not None and schemes_if_own(quantization) is not None:
        faults = list(faults_of(quantization, checkpoint))
        found.problems.extend(f"{folder}: {fault}" for fault in faults)
        if faults:
            return
    meta_model, source = open_model(folder, options.blocks_path, allow_links=options.allow_links)
    found.problems.extend(f"{folder}: {text}" for text in _joined_otherwise(meta_model, source))
    names, sums = sorted(source.infos), None
    if options.read_data:
        sums = require_sums(folder, {info.file for info in checkpoint.stored.values()}, intact)
        for name in names:
            found.attempt(_require_finite, folder, name, source)
    state = ", all finite" if options.read_data and not found.problems else ""
    state += "" if sums is None else f", {sums} shards with the checksums of {SUMS}"
    found.facts.append(f"model: {len(meta_model.blocks)} blocks, {len(names)} tensors{state}")
    if options.load and not found.problems:
        how: EvaluationOptions = {
            "blocks_path": options.blocks_path,
            "allow_links": options.allow_links,
            "device": "cpu",
            "threads": torch.get_num_threads(),
        }
        found.facts.append(str(load_beside_streamed(folder, **how)))


def _joined_otherwise(meta_model: MetaModel, source: WeightSource) -> Iterator[str]:
    """A line for each layer whose scheme differs from that of the layers with which inference engines compute it as one layer."""
    for spec in meta_model.blocks:
        first: dict[str, tuple[str, object]] = {}
        for name in spec.linears:
            scheme = source.layer_scheme(spec.stored(name)) if isinstance(source, PackedCheckpoint) else None
            other, known = first.setdefault(joined_with(name), (name, scheme))
            if known != scheme:
                yield f"{spec.prefix}: inference engines compute {other} and {name} as one layer, but their schemes differ."


def _require_finite(folder: Path, name: str, source: WeightSource) -> None:
    stored = source.checkpoint if isinstance(source, PackedCheckpoint) else source
    if isinstance(stored, Checkpoint) and name in stored.infos and stored.infos[name].torch_dtype is None:
        deque(stored.raw(stored.infos[name]), maxlen=0)  # it has no values to compute with, but must be there
        return
    values = source.read(name, device=CPU)
    if not values.is_floating_point() or not values.numel():
        return
    # not `torch.isfinite`, which would copy the tensor
    if not all(math.isfinite(extreme) for extreme in torch.aminmax(values)):
        raise InputError(folder, "holds values that are not finite. Copy the model again.", tensor=name)
