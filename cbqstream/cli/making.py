"""Commands that make a model: quantize, plan, resume."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperOption

from cbqstream.cli.app import (
    AllowNumericsChange,
    AllowSharedRunDir,
    BlocksPath,
    Device,
    LogJson,
    Revision,
    SeqLen,
    StopAfterWindow,
    Threads,
    app,
    dashed,
    folder_of,
    say,
)
from cbqstream.config import QuantizeConfig
from cbqstream.errors import CbqstreamError, StoppedError
from cbqstream.options import config_of, flags_of
from cbqstream.profiles import PROFILES
from cbqstream.recipe import read_recipe
from cbqstream.runtime.interruption import Interrupted


def _take_recipe(context: typer.Context, recipe: Path | None) -> None:
    """What a recipe says is the default of the flag of that name."""
    if recipe is not None:
        flags = {parameter.name or "": parameter for parameter in context.command.params}
        said = read_recipe(recipe, [name for name, flag in flags.items() if flag.param_type_name == "option"])
        repeated = [name for name in said if getattr(flags[name], "multiple", False)]
        lists = {name: [value] for name in repeated if isinstance(value := said[name], str)}
        context.default_map = {**(context.default_map or {}), **said, **lists}


class _OfProfile(TyperCommand):
    """A command whose help shows what the default profile sets."""

    def get_help(self, ctx: Any) -> str:
        told = flags_of(PROFILES["default"])
        for option in self.params:
            if isinstance(option, TyperOption) and option.name in told:
                option.show_default = str(told[option.name])
        return super().get_help(ctx)


@app.command(cls=_OfProfile)
def quantize(
    model: Annotated[str, typer.Argument(help="Folder with config.json and safetensors, or a name on the Hub.")],
    out: Annotated[str, typer.Argument(help="Folder to write.")],
    *,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file with flags, such as group-size = 64; those on the command line win.",
            is_eager=True,
            callback=_take_recipe,
        ),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="Calibration: .txt, .jsonl, .parquet, or token ids in .npy or .safetensors.")
    ],
    revision: Revision = None,
    push_to: Annotated[
        str | None, typer.Option(help="OWNER/NAME on the Hub, for the result once it was checked; made private.")
    ] = None,
    scheme: Annotated[str, typer.Option(help="W2 to W8 with A16, A8 or A4, such as W4A8.")] = "W4A16",
    group_size: Annotated[int, typer.Option(help="Columns that share a scale; -1 is one scale per channel.")] = 128,
    symmetric: Annotated[
        bool,
        typer.Option(help="Without zero points; transformers loads asymmetric weights only when asked to dequantize."),
    ] = True,
    activation_strategy: Annotated[
        str, typer.Option(help="A8, A4: token (dynamic scales) or tensor (one learned step size a layer).")
    ] = "token",
    num_samples: Annotated[int, typer.Option(help="Calibration segments.")] = 128,
    seq_len: SeqLen = 2048,
    run_dir: Annotated[str | None, typer.Option(help="Where the run keeps its state; OUT.run by default.")] = None,
    profile: Annotated[
        str,
        typer.Option(
            help="paper, fast, default or accurate. Flags change parts of it; their defaults in () are of `default`."
        ),
    ] = "default",
    window_size: Annotated[int | None, typer.Option(help="Blocks optimized together.")] = None,
    overlap: Annotated[int | None, typer.Option(help="Blocks that a window shares with the next.")] = None,
    cfp_weights: Annotated[bool | None, typer.Option(help="Truncate outliers of weights.")] = None,
    cfp_activations: Annotated[
        str | None, typer.Option(help="When channels are rescaled: never, quantized (A8, A4) or always.")
    ] = None,
    cfp_variant: Annotated[str | None, typer.Option(help="By which rule: paper, huawei or search.")] = None,
    cfp_lambda1: Annotated[float | None, typer.Option(help="Interquartile ranges to where candidates begin.")] = None,
    cfp_lambda2: Annotated[float | None, typer.Option(help="Weight of the variance beside the gap.")] = None,
    rounding: Annotated[str | None, typer.Option(help="full, lora or none (round to nearest).")] = None,
    init: Annotated[str | None, typer.Option(help="Where scales start: search or minmax.")] = None,
    schedule: Annotated[str | None, typer.Option(help="How rates fall: linear or cosine.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the calibration segments, per window.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Segments in a step.")] = None,
    max_shift: Annotated[float | None, typer.Option(help="full: how far a rounding value can move.")] = None,
    rounding_lr: Annotated[float | None, typer.Option(help="lora: learning rate.")] = None,
    rounding_rank: Annotated[int | None, typer.Option(help="lora: rank.")] = None,
    scale_lr: Annotated[float | None, typer.Option(help="Relative learning rate of the step sizes.")] = None,
    activation_scale_lr: Annotated[float | None, typer.Option(help="The same of activations' step sizes.")] = None,
    target_mix: Annotated[float | None, typer.Option(help="Share of the reference target, 0 to 1.")] = None,
    kl_weight: Annotated[float | None, typer.Option(help="Weight of the KL term.")] = None,
    head_weight: Annotated[
        float | None, typer.Option(help="Weight of the next-token divergence in the last window.")
    ] = None,
    head_stride: Annotated[int | None, typer.Option(help="Every how many tokens that is measured.")] = None,
    end_to_end_epochs: Annotated[
        int | None, typer.Option(help="Passes in which the step sizes of the whole model learn together at the end.")
    ] = None,
    end_to_end_lr: Annotated[float | None, typer.Option(help="Their relative learning rate in these.")] = None,
    penalty_weight: Annotated[float | None, typer.Option(help="lora: weight of the rounding penalty.")] = None,
    token_balance: Annotated[
        float | None, typer.Option(help="How far a token's error is relative to its size, 0 to 1.")
    ] = None,
    channel_balance: Annotated[
        float | None, typer.Option(help="How far a channel's error is relative to its size, 0 to 1.")
    ] = None,
    robust_tokens: Annotated[int | None, typer.Option(help="Largest tokens of a segment that are left out.")] = None,
    kernels: Annotated[
        str | None, typer.Option(help="auto (Triton on CUDA) or plain, which needs nothing but torch.")
    ] = None,
    calibrate_all_experts: Annotated[
        bool, typer.Option(help="Gather statistics with every token sent to every expert.")
    ] = False,
    blocks_path: BlocksPath = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layers left in full precision, such as down_proj or layers.3.mlp.*")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="Layers with weights of another width, such as down_proj=W8.")
    ] = None,
    quantize_lm_head: Annotated[
        bool, typer.Option(help="The head too, rounded to nearest; its width: --override lm_head=W8.")
    ] = False,
    keep_first: Annotated[int, typer.Option(help="Blocks at the start left in full precision.")] = 0,
    keep_last: Annotated[int, typer.Option(help="Blocks at the end left in full precision.")] = 0,
    seed: Annotated[int, typer.Option(help="Of all randomness.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
    max_ram: Annotated[str | None, typer.Option(help="Memory that it may take, such as 16GiB.")] = None,
    max_vram: Annotated[str | None, typer.Option(help="Device memory that it may take.")] = None,
    stop_after_window: StopAfterWindow = None,
    allow_numerics_change: AllowNumericsChange = False,
    allow_shared_run_dir: AllowSharedRunDir = False,
    log_json: LogJson = None,
) -> None:
    """Quantize MODEL into OUT, or go on with the run that was begun."""
    if push_to is not None:
        from cbqstream.hub import require_name

        require_name(push_to)
    config = config_of(locals())  # before a model is downloaded
    config = replace(config, model=str(folder_of(model, revision).absolute()))
    how_to_go_on = "the same command" if push_to is not None else None
    _run(config, log_json, stop_after_window, allow_numerics_change, allow_shared_run_dir, how_to_go_on)
    if push_to is not None:
        from cbqstream.commands.push import push as upload

        say(f"pushed: {upload(Path(out), push_to, blocks_path=blocks_path)}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="MODEL [OUT] [FLAGS OF quantize]",
)
def plan(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    without_time: Annotated[
        bool, typer.Option("--without-time", help="Do not measure this machine, which takes five seconds.")
    ] = False,
) -> None:
    """What `quantize MODEL OUT` with the same flags would need: memory, disk, time. Reads headers, writes nothing.

    MODEL is a folder or a name on the Hub, OUT may be left out; the flags are those of `cbqstream quantize --help`.
    """
    from cbqstream.planning.plan import plan as make_plan
    from cbqstream.report.plan_lines import plan_lines

    command = typer.main.get_command(app).commands["quantize"]  # type: ignore[attr-defined]
    flags = [dashed(argument) for argument in context.args]
    parsed = command.make_context("plan", flags, default_map={"out": "OUT", "dataset": "DATASET"})
    made = make_plan(config_of(parsed.params), with_time=not without_time, revision=parsed.params["revision"])
    if as_json:
        typer.echo(json.dumps(made, indent=1))
        return
    for line in plan_lines(made):
        say(line)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    stop_after_window: StopAfterWindow = None,
    allow_numerics_change: AllowNumericsChange = False,
    allow_shared_run_dir: AllowSharedRunDir = False,
    log_json: LogJson = None,
) -> None:
    """Go on with a run; all settings come from its directory."""
    from cbqstream.rundir.chain import Chain

    chain = Chain.read(run)
    same = {"run_dir": str(run.absolute()), "threads": chain.numerics["threads"]}
    config = QuantizeConfig.from_dict({**chain.run["config"], **same})
    _run(config, log_json, stop_after_window, allow_numerics_change, allow_shared_run_dir)


def _run(
    config: QuantizeConfig,
    log_json: Path | None,
    stop_after_window: int | None,
    allow_numerics_change: bool,
    allow_shared_run_dir: bool,
    how_to_go_on: str | None = None,
) -> None:
    from cbqstream.report.progress import Progress
    from cbqstream.run.pipeline import quantize as run_pipeline

    gc.freeze()  # what was imported stays: no window need look for garbage in it
    try:
        with Progress(Console(), log_json) as progress:
            out = run_pipeline(
                config,
                progress,
                stop_after_window=stop_after_window,
                allow_numerics_change=allow_numerics_change,
                allow_shared_run_dir=allow_shared_run_dir,
            )
    except (Interrupted, StoppedError) as stop:
        raise StoppedError(f"{stop} To go on: {how_to_go_on or _how_to_go_on(config)}") from stop
    finally:
        gc.unfreeze()  # what is not collected at the end is taken for a leak, aloud
    say(f"done: {out}")


def _how_to_go_on(config: QuantizeConfig) -> str:
    """`resume` where it would do the same as the command that was given."""
    from cbqstream.rundir.chain import Chain

    try:
        begun = Chain.read(config.run_path).run["config"]
    except CbqstreamError:
        return "the same command"
    now = config.to_dict()
    same = all(begun[key] == now[key] for key in ("model", "out", "device"))
    return f"cbqstream resume {config.run_path}" if same else "the same command"
