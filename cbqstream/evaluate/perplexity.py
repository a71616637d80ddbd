"""Streamed perplexity: the hidden states of all segments lie on disk, and one block at a time is in memory."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from cbqstream.activations.read_ahead import in_batches, read_batches
from cbqstream.activations.store import StreamShape
from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.calibration.segments import load_segments
from cbqstream.checkpoint.folder import read_json
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.disk import Disk
from cbqstream.errors import UsageError
from cbqstream.models.block import BlockArguments, build_block, run_block
from cbqstream.models.compute import choose_device, compute_dtype, make_deterministic
from cbqstream.models.ends import model_ends
from cbqstream.models.skeleton import ModelSkeleton
from cbqstream.packed.format import schemes_of
from cbqstream.packed.source import PackedSource
from cbqstream.records import Compute, WeightSource


def open_model(folder: Path) -> tuple[ModelSkeleton, WeightSource]:
    """A model folder to run, quantized by this project or not.

    Raises:
        InputError: it cannot be read.
        UsageError: it is quantized in another form.
    """
    config = read_json(folder, "config.json")
    source: WeightSource = Checkpoint.open(folder)
    if config.get("quantization_config"):
        source = PackedSource(Checkpoint.open(folder), schemes_of(config["quantization_config"]))
    return ModelSkeleton(folder, config, source.tensors()), source


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity over `num_segments` segments."""

    perplexity: float
    num_segments: int


def evaluate(
    model: Path,
    text: Path,
    *,
    num_samples: int = 64,
    seq_len: int = 512,
    batch_size: int = 4,
    scratch: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    listener: Callable[[str], None] = lambda text: None,
) -> Perplexity:
    """Perplexity of a model on `num_samples` segments spread evenly over a text, in bounded memory.

    Args:
        model: folder of a model, quantized by this project or not.
        text: text or token ids.
        num_samples: segments; all of them if the text has fewer.
        seq_len: tokens in a segment.
        batch_size: segments at once.
        scratch: folder for hidden states.
        device: auto, cpu, cuda or cuda:N.
        threads: CPU threads; the physical cores by default.
        listener: told of progress.

    Raises:
        InputError: the model or the text cannot be read.
        UsageError: a number or folder that cannot work, or a device that is not there.
    """
    skeleton, source = open_model(model)
    skeleton.check_length(seq_len)
    if num_samples < 1 or batch_size < 1:
        raise UsageError(f"num_samples is {num_samples} and batch_size is {batch_size}. Both must be at least 1.")
    if scratch is not None and not scratch.is_dir():
        raise UsageError(f"{scratch}: no such folder.")
    where = choose_device(device)
    make_deterministic(threads)
    tokens_NS = load_segments(
        text, model, num_samples=num_samples, seq_len=seq_len, vocab_size=skeleton.vocab_size, choice="spread"
    )
    compute = Compute(where, compute_dtype(where), batch_size)
    return Perplexity(
        perplexity(skeleton, source, tokens_NS, compute, scratch=scratch, listener=listener), len(tokens_NS)
    )


def perplexity(
    skeleton: ModelSkeleton,
    source: WeightSource,
    tokens_NS: Tensor,
    compute: Compute,
    *,
    scratch: Path | None = None,
    listener: Callable[[str], None] = lambda text: None,
) -> float:
    """exp of the mean negative log-likelihood of tokens 2..S of every segment.

    Args:
        skeleton: the model.
        source: its weights.
        tokens_NS: int64 [N, S].
        compute: where and how; hidden states are kept on disk in its dtype.
        scratch: folder for them, deleted afterwards; the system's temporary folder by default.
        listener: told of progress.
    """
    shape = StreamShape(len(tokens_NS), tokens_NS.shape[1], skeleton.hidden_size, compute.dtype)
    with tempfile.TemporaryDirectory(prefix="cbqstream-eval-", dir=scratch) as work:
        listener("embedding")
        with model_ends(skeleton, source, device=compute.device, dtype=compute.dtype, only="embed") as ends:
            arguments = ends.block_arguments(tokens_NS[0])
            stream = ZarrStore.create(Path(work) / "stream", shape, Disk(), durable=False)
            for segment, ids_S in enumerate(tokens_NS):
                stream.write(segment, ends.embed(ids_S))
        for index in range(len(skeleton.blocks)):
            listener(f"block {index + 1}/{len(skeleton.blocks)}")
            _advance(skeleton, source, index, arguments[index], stream, compute)
        listener("head")
        with model_ends(skeleton, source, device=compute.device, dtype=compute.dtype, only="head") as ends:
            total = 0.0
            for segment, ids_S in enumerate(tokens_NS):
                start = 0
                for logits_TV in ends.logits(stream.read(segment)):
                    next_T = ids_S[start + 1 : start + 1 + len(logits_TV)].to(compute.device)
                    start += len(logits_TV)
                    total += functional.cross_entropy(logits_TV[: len(next_T)], next_T, reduction="sum").double().item()
    return math.exp(total / (tokens_NS.shape[0] * (tokens_NS.shape[1] - 1)))


@torch.no_grad()
def _advance(
    skeleton: ModelSkeleton,
    source: WeightSource,
    index: int,
    arguments: BlockArguments,
    stream: ZarrStore,
    compute: Compute,
) -> None:
    """Replace every segment by what block `index` makes of it."""
    block = build_block(skeleton, index, source, device=compute.device, dtype=compute.dtype, linear_dtype=compute.dtype)
    batches = in_batches(range(stream.shape.num_segments), compute.batch_size)
    for batch, (x_BSD,) in zip(batches, read_batches([stream], batches), strict=True):
        y_BSD = run_block(block, x_BSD.to(compute.device), arguments)
        for segment, y_SD in zip(batch, y_BSD, strict=True):
            stream.write(segment, y_SD)
