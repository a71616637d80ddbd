"""The report of a run or of a result: an HTML page and figures in a new folder."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Unpack

from cbqstream.checkpoint.folder import find_tensors, read_json
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.disk import Disk
from cbqstream.errors import InputError
from cbqstream.evaluation.model import EvaluationOptions
from cbqstream.evaluation.perplexity import evaluate
from cbqstream.options import recipe_of
from cbqstream.packed.format import schemes_of_result
from cbqstream.packed.output import filled_folder, require_free
from cbqstream.packed.pack_quantized import SHAPE
from cbqstream.packed.packed_checkpoint import PackedCheckpoint
from cbqstream.records import EpochReport, WindowReport, report_from_dict
from cbqstream.report.card import METRICS
from cbqstream.report.facts import Facts
from cbqstream.report.figures import as_png, as_svg, figures
from cbqstream.report.page import page
from cbqstream.rundir.chain import Chain, is_run, neither_run_nor_model


def report(
    path: Path,
    folder: Path,
    text: Path | None = None,
    *,
    num_samples: int = 64,
    seq_len: int = 512,
    **options: Unpack[EvaluationOptions],
) -> Path:
    """Write `report.html`, and a PNG of each figure, into a new folder.

    Args:
        path: a run directory, finished or not, or a result.
        folder: folder to write; it must not exist, or be empty.
        text: text on which the perplexity of the source and of the result is measured; None leaves perplexity out.
        num_samples: number of segments of the text, see `evaluate`.
        seq_len: tokens in a segment, see `evaluate`.
        options: see `EvaluationOptions`.

    Returns:
        Path of the page.

    Raises:
        InputError: `path` is neither a run directory nor a result, or is damaged.
        UsageError: `folder` is occupied, or a setting cannot work.
    """
    require_free(folder, "--out")
    folder, blocks_path = folder.absolute(), options.get("blocks_path")
    allow_links = options.get("allow_links", False)
    if is_run(path):
        chain = Chain.read(path)
        facts, models = _of_run(chain, allow_links=allow_links)
        blocks_path = blocks_path or chain.run.config.blocks_path
    else:
        facts, models = _of_result(path, allow_links=allow_links)
    options = {**options, "blocks_path": blocks_path}
    if text is not None:
        for name, model in models.items():
            found = evaluate(model, text, num_samples=num_samples, seq_len=seq_len, **options)
            facts.perplexities[name] = found.perplexity
    drawn, disk = list(figures(facts)), Disk()
    content = page(facts, [(title, as_svg(figure)) for _, title, figure in drawn])
    with filled_folder(disk, folder, "report") as building:
        for name, _, figure in drawn:
            disk.write(building / f"{name}.png", [as_png(figure)], mode=0o666)
        disk.write(building / "report.html", [content.encode()], mode=0o666)
        disk.publish(building, folder)
    return folder / "report.html"


def _of_run(chain: Chain, *, allow_links: bool) -> tuple[Facts, dict[str, Path]]:
    """Facts of a run, and the folders of the source and, if it is finished, of the result."""
    config = chain.run.config
    infos = {name: info for shard in chain.shards() for name, info in read_header(shard).items()}
    source = PackedCheckpoint(Checkpoint(infos), config.schemes)
    models = {"source": Path(config.model)}
    if chain.is_complete and chain.is_result(Path(config.out)):
        models["result"] = Path(config.out)
    weights, stored = _stored(source)
    facts = Facts(
        name=f"{Path(config.model).name} at {config.scheme.name}",
        scheme=config.scheme,
        num_windows=chain.num_windows,
        windows=chain.window_reports,
        epochs=chain.epoch_reports,
        sizes=_sizes(models, allow_links=allow_links),
        identity=chain.run.identity,
        recipe=recipe_of(config),
        weights=weights,
        stored=stored,
    )
    return facts, models


def _of_result(folder: Path, *, allow_links: bool) -> tuple[Facts, dict[str, Path]]:
    """Facts of a result without its run directory, and its folder."""
    if not (folder / "config.json").exists():
        raise neither_run_nor_model(folder)
    schemes, reports = schemes_of_result(folder, read_json(folder, "config.json")), _metrics(folder / METRICS)
    windows = [report for report in reports if isinstance(report, WindowReport)]
    weights, stored = _stored(PackedCheckpoint(Checkpoint.open(folder, allow_links=allow_links), schemes))
    models = {"result": folder}
    try:
        facts = Facts(
            name=folder.name,
            scheme=schemes.default,
            num_windows=len(windows),
            windows=windows,
            epochs=[report for report in reports if isinstance(report, EpochReport)],
            sizes=_sizes(models, allow_links=allow_links),
            weights=weights,
            stored=stored,
        )
    except ValueError as error:
        raise _not_metrics(folder / METRICS) from error
    return facts, models


def _metrics(path: Path) -> list[WindowReport | EpochReport]:
    """Reports in a file metrics.jsonl.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [report_from_dict(dict(line)) for line in lines]
    except FileNotFoundError as error:
        raise InputError(path, "missing. Give the run directory of the model.") from error
    except (ValueError, TypeError, OSError) as error:
        raise _not_metrics(path) from error


def _not_metrics(path: Path) -> InputError:
    return InputError(path, "not a file that quantize wrote. Give the run directory of the model.")


def _stored(source: PackedCheckpoint) -> tuple[int, int]:
    """Number of weights in the quantized layers, and size in bytes of their codes, scales and zero points."""
    parts = [info for name, info in source.checkpoint.stored.items() if name not in source.others]
    weights = sum(rows * columns for rows, columns in source.layers.values())
    return weights, sum(info.num_bytes for info in parts if not info.name.endswith(f".{SHAPE}"))


def _sizes(models: Mapping[str, Path], *, allow_links: bool) -> dict[str, int]:
    """Size in bytes of the tensors of each model. A model that cannot be read is left out, because the source of a run may be deleted."""
    sizes = {}
    for name, folder in models.items():
        with suppress(InputError):
            sizes[name] = sum(info.num_bytes for info in find_tensors(folder, allow_links=allow_links).values())
    return sizes
