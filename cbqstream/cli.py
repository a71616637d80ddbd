"""The command line: arguments to settings, settings to a run. torch is imported only by the commands that compute."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from cbqstream.config import QuantizeConfig
from cbqstream.errors import CbqstreamError, DeviceMemoryError, InputError, StoppedError, StorageError, UsageError
from cbqstream.flags import config_of
from cbqstream.interruption import Interrupted, interrupt_on_signals
from cbqstream.recipe import read_recipe

if TYPE_CHECKING:
    from cbqstream.evaluation.model import Running

app = typer.Typer(
    name="cbqstream",
    help="Quantize language models that are far larger than the machine.\n\n"
    "    cbqstream quantize MODEL OUT --scheme W4A16 --dataset TEXT\n\n"
    "An interrupted run goes on with the same command, or with `cbqstream resume OUT.run`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

NumSamples = Annotated[int, typer.Option(help="Segments, spread evenly over the text.")]
SeqLen = Annotated[int, typer.Option(help="Tokens in a segment.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; the physical cores by default.")]
BlocksPath = Annotated[
    str | None, typer.Option(help="Module path of the list of blocks, where it is not found by itself.")
]
StopAfterWindow = Annotated[int | None, typer.Option(help="Leave after this window, with exit code 75.")]
AllowNumericsChange = Annotated[
    bool, typer.Option("--allow-numerics-change", help="Go on with other threads, versions or device.")
]
AllowSharedRunDir = Annotated[
    bool, typer.Option("--allow-shared-run-dir", help="Use a run directory that others can change.")
]
LogJson = Annotated[Path | None, typer.Option(help="Append a JSON line per window to this file.")]


def _take_recipe(context: typer.Context, recipe: Path | None) -> None:
    """What a recipe says is the default of the flag of that name."""
    if recipe is not None:
        flags = [parameter.name or "" for parameter in context.command.params if parameter.param_type_name == "option"]
        context.default_map = {**(context.default_map or {}), **read_recipe(recipe, flags)}


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Folder with config.json and safetensors.")],
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
    scheme: Annotated[str, typer.Option(help="W2 to W8 with A16, A8 or A4, such as W4A8.")] = "W4A16",
    group_size: Annotated[int, typer.Option(help="Columns that share a scale; -1 is one scale per channel.")] = 128,
    symmetric: Annotated[
        bool, typer.Option(help="Without zero points. Current transformers loads only these plainly.")
    ] = True,
    activation_strategy: Annotated[
        str, typer.Option(help="A8, A4: token (dynamic scales) or tensor (one learned step size a layer).")
    ] = "token",
    num_samples: Annotated[int, typer.Option(help="Calibration segments.")] = 128,
    seq_len: SeqLen = 2048,
    run_dir: Annotated[str | None, typer.Option(help="Where the run keeps its state; OUT.run by default.")] = None,
    profile: Annotated[
        str, typer.Option(help="paper, fast, default or accurate; the flags after it change parts of it.")
    ] = "default",
    window_size: Annotated[int | None, typer.Option(help="Blocks optimised together.")] = None,
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
    rounding_travel: Annotated[float | None, typer.Option(help="full: how far a rounding value can move.")] = None,
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
    _run(config_of(locals()), log_json, stop_after_window, allow_numerics_change, allow_shared_run_dir)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder with config.json and safetensors.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    without_time: Annotated[
        bool, typer.Option("--without-time", help="Do not measure this machine, which takes five seconds.")
    ] = False,
) -> None:
    """What `quantize MODEL OUT` with the same flags would need: memory, disk, time. Reads headers, writes nothing."""
    from cbqstream.report.plan import plan_lines
    from cbqstream.run.plan import plan as make_plan

    command = typer.main.get_command(app).commands["quantize"]  # type: ignore[attr-defined]
    flags = [_dashed(argument) for argument in context.args]
    parsed = command.make_context("plan", [model, "OUT", *flags], default_map={"dataset": "DATASET"})
    made = make_plan(config_of(parsed.params), with_time=not without_time)
    if as_json:
        typer.echo(json.dumps(made, indent=1))
        return
    for line in plan_lines(made):
        _say(line)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    stop_after_window: StopAfterWindow = None,
    allow_numerics_change: AllowNumericsChange = False,
    allow_shared_run_dir: AllowSharedRunDir = False,
    log_json: LogJson = None,
) -> None:
    """Go on with a run; all settings come from its directory."""
    from cbqstream.run.chain import Chain

    chain = Chain.read(run)
    same = {"run_dir": str(run.absolute()), "threads": chain.numerics["threads"]}
    config = QuantizeConfig.from_dict({**chain.run["config"], **same})
    _run(config, log_json, stop_after_window, allow_numerics_change, allow_shared_run_dir)


@app.command()
def status(run: Annotated[Path, typer.Argument(help="The run directory.")]) -> None:
    """Say how far a run is. Reads only."""
    from cbqstream.report.status import status_lines
    from cbqstream.run.chain import Chain

    chain = Chain.read(run)
    for line in status_lines(run, chain.run, chain.commits):
        _say(line)


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A run directory, or a model that was quantized.")],
    read_data: Annotated[bool, typer.Option("--read-data", help="Read every byte; else sizes and records.")] = False,
    blocks_path: BlocksPath = None,
) -> None:
    """Verify a run or a finished model. Reads only; says what is wrong, and then leaves with exit code 65."""
    from cbqstream.run.check import check as look

    found = look(path, read_data=read_data, blocks_path=blocks_path)
    for line in found.facts:
        _say(line)
    for problem in found.problems:
        _complain(problem)
    if found.problems:
        raise typer.Exit(InputError.exit_code)
    _say("ok")


@app.command()
def rollback(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    to: Annotated[int, typer.Option(help="How many windows are kept; 0 starts over.")],
    allow_shared_run_dir: AllowSharedRunDir = False,
) -> None:
    """Give up the newest windows of a run: the last one, or all."""
    from cbqstream.disk import Disk
    from cbqstream.run.journal import open_journal

    with open_journal(run, Disk(), shared=allow_shared_run_dir, whole=False) as journal:
        journal.roll_back(to)
    _say(f"{to} windows are left; go on with: cbqstream resume {run}")


@app.command()
def clean(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Give up a run that is not finished too.")] = False,
    allow_shared_run_dir: AllowSharedRunDir = False,
) -> None:
    """Delete a run directory whose model is finished. The model stays."""
    from cbqstream.disk import Disk
    from cbqstream.run.chain import Chain
    from cbqstream.run.journal import discard

    chain = Chain.read(run)
    if not unfinished and not (chain.is_complete and chain.is_result(Path(chain.run["config"]["out"]))):
        done = f"{chain.next_window} of {chain.num_commits} commits"
        raise UsageError(f"{run}: not finished ({done}). Run cbqstream resume {run}, or give it up with --unfinished.")
    discard(run, Disk(), shared=allow_shared_run_dir)
    _say(f"deleted: {run}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A result of quantize.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    format_name: Annotated[str, typer.Option("--format", help="gptq, gptq_v2, awq, gguf or dense.")],
) -> None:
    """Write a finished model in another format, code for code."""
    from cbqstream.run.export import export as write

    _say(f"done: {write(model, out, format_name)}")
    if format_name == "dense":
        _say("note: dense weights are rounded to the dtype of the source, and no inputs are quantized.")


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A run directory, finished or not, or a model that was quantized.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write report.html and its pictures into.")],
    text: Annotated[
        Path | None, typer.Option(help="Text, or token ids: the perplexity of the source and of the result, streamed.")
    ] = None,
    num_samples: NumSamples = 64,
    seq_len: SeqLen = 512,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """A page to look at: losses, noise, outliers, bits, time and memory. One HTML file that needs nothing else, and PNGs."""
    from cbqstream.report.progress import Progress
    from cbqstream.run.report import report as write

    with Progress(Console(stderr=True)) as progress:
        how: Running = {"device": device, "threads": threads, "listener": progress}
        page = write(path, out, text, num_samples=num_samples, seq_len=seq_len, **how)
    _say(f"done: {page}")


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model, quantized by cbqstream or not.")],
    text: Annotated[Path | None, typer.Option(help="Text, or token ids: perplexity.")] = None,
    against: Annotated[Path | None, typer.Option(help="A model to compare the predictions on the text with.")] = None,
    choices: Annotated[
        Path | None, typer.Option(help="Questions in jsonl (prompt, choices, answer): accuracy.")
    ] = None,
    sample: Annotated[
        str | None, typer.Option(help="How a text begins: the model goes on. Slow: a token reads the whole model.")
    ] = None,
    num_tokens: Annotated[int, typer.Option(help="How many it writes at most.")] = 16,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval that generate nothing, such as piqa,arc_easy.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before a question, for tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many documents of a task; all by default.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with tasks of your own.")] = None,
    num_samples: NumSamples = 64,
    seq_len: SeqLen = 512,
    num_questions: Annotated[int | None, typer.Option(help="The first so many questions; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Segments at once.")] = 4,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder for hidden states; the temporary folder by default.")
    ] = None,
    blocks_path: BlocksPath = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Perplexity, distance from another model, or accuracy of MODEL, one block in memory at a time."""
    from cbqstream.evaluation.against import compare
    from cbqstream.evaluation.choices import evaluate_choices
    from cbqstream.evaluation.perplexity import evaluate as measure
    from cbqstream.report.progress import Progress

    if sum(what is not None for what in (text, choices, tasks, sample)) != 1 or (against is not None and text is None):
        raise UsageError("eval needs --text, with or without --against, or one of --choices, --tasks and --sample.")
    with Progress(Console(stderr=True)) as progress:
        how: Running = {
            "batch_size": batch_size,
            "scratch": scratch,
            "device": device,
            "threads": threads,
            "blocks_path": blocks_path,
            "listener": progress,
        }
        if sample is not None:
            from cbqstream.evaluation.sample import sample as write

            _say(sample + write(model, sample, num_tokens=num_tokens, **how))
            return
        if tasks is not None:
            from cbqstream.evaluation.harness import evaluate_tasks, table

            options: dict[str, Any] = {"num_fewshot": num_fewshot, "limit": limit, "include_path": include_path}
            _say(table(evaluate_tasks(model, tasks.split(","), **options, **how)))
            return
        if choices is not None:
            found = evaluate_choices(model, choices, num_questions=num_questions, **how)
            line = (
                f"accuracy {found.by_sum:.4f}, by character {found.by_character:.4f} ({len(found.answers)} questions)"
            )
        elif text is not None and against is not None:
            distance = compare(model, against, text, num_samples=num_samples, seq_len=seq_len, **how)
            line = f"divergence {distance.divergence:.5f}, same next token {distance.top1:.2%} ({distance.num_segments} x {seq_len} tokens)"
        elif text is not None:
            result = measure(model, text, num_samples=num_samples, seq_len=seq_len, **how)
            line = f"perplexity {result.perplexity:.4f} ({result.num_segments} x {seq_len} tokens)"
    _say(f"{(choices or text or model).name}: {line}")


def _say(line: str) -> None:
    Console().print(line, highlight=False, soft_wrap=True, markup=False)


def _run(
    config: QuantizeConfig,
    log_json: Path | None,
    stop_after_window: int | None,
    allow_numerics_change: bool,
    allow_shared_run_dir: bool,
) -> None:
    from cbqstream.report.progress import Progress
    from cbqstream.run.pipeline import quantize as run_pipeline

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
        raise StoppedError(f"{stop} To go on: {_how_to_go_on(config)}") from stop
    _say(f"done: {out}")


def _how_to_go_on(config: QuantizeConfig) -> str:
    """`resume` where it would do the same as the command that was given."""
    from cbqstream.run.chain import Chain

    try:
        begun = Chain.read(config.run_path).run["config"]
    except CbqstreamError:
        return "the same command"
    now = config.to_dict()
    same = all(begun[key] == now[key] for key in ("model", "out", "device"))
    return f"cbqstream resume {config.run_path}" if same else "the same command"


def main() -> NoReturn:
    """Entry point: flags may be written with - or _, and an expected error is one line and an exit code."""
    try:
        interrupt_on_signals()  # here: one may strike before both are set, or where an error is being told
        _answer([_dashed(argument) for argument in sys.argv[1:]])
    except Interrupted as stop:
        _fail(str(stop), StoppedError.exit_code)
    sys.exit(0)


def _answer(arguments: list[str]) -> None:
    try:
        app(arguments)
    except CbqstreamError as error:
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail("out of memory. Close other programs, or use fewer --num-samples.", DeviceMemoryError.exit_code)
    except OSError as error:
        _fail(
            f"{'' if error.filename is None else f'{error.filename}: '}{error.strerror or error}.",
            StorageError.exit_code,
        )


def _fail(message: str, code: int) -> NoReturn:
    _complain(message)
    sys.exit(code)


def _complain(message: str) -> None:
    Console(stderr=True).print(f"cbqstream: error: {message}", highlight=False, soft_wrap=True, markup=False)


def _dashed(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value
