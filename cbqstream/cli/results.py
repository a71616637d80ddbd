"""Commands about a finished model: export, report, eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cbqstream.cli.app import AllowLinks, BlocksPath, Device, NumSamples, Revision, SeqLen, Threads, app, folder_of, say
from cbqstream.errors import UsageError

if TYPE_CHECKING:
    from cbqstream.evaluation.model import EvaluationOptions


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A result of quantize; for dense, any quantized model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    format_name: Annotated[str, typer.Option("--format", help="gptq, gptq_v2, awq, gguf or dense.")],
    allow_links: AllowLinks = False,
) -> None:
    """Write a finished model in another format, with the same codes and scales."""
    from cbqstream.commands.export import export as write

    say(f"done: {write(model, out, format_name, allow_links=allow_links)}")
    if format_name == "dense":
        say("warning: dense weights are rounded to the dtype of the source, and inputs are not quantized.")


@app.command()
def push(
    out: Annotated[Path, typer.Argument(help="A model folder.")],
    name: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; created if it does not exist.")],
    public: Annotated[bool, typer.Option("--public", help="Create a public repository.")] = False,
    blocks_path: BlocksPath = None,
    allow_links: AllowLinks = False,
) -> None:
    """Check a result as `check --read-data` does, and upload it to the Hugging Face Hub."""
    from cbqstream.commands.push import push as upload

    address = upload(out, name, private=not public, blocks_path=blocks_path, allow_links=allow_links)
    say(f"pushed: {address}")


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A run directory, finished or not, or a quantized model.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write report.html and its figures into.")],
    text: Annotated[
        Path | None, typer.Option(help="Text, or token ids: measure the perplexity of the source and of the result.")
    ] = None,
    num_samples: NumSamples = 64,
    seq_len: SeqLen = 512,
    blocks_path: BlocksPath = None,
    allow_links: AllowLinks = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Write a report: losses, quantization noise, outliers, bits, time and memory, as a self-contained HTML page and PNGs."""
    from cbqstream.commands.report import report as write
    from cbqstream.report.progress import Progress

    with Progress(Console(stderr=True)) as progress:
        options: EvaluationOptions = {
            "blocks_path": blocks_path,
            "allow_links": allow_links,
            "device": device,
            "threads": threads,
            "listener": progress,
        }
        page = write(path, out, text, num_samples=num_samples, seq_len=seq_len, **options)
    say(f"done: {page}")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model, quantized or not: a folder, or OWNER/NAME on the Hub.")],
    revision: Revision = None,
    text: Annotated[Path | None, typer.Option(help="Text, or token ids: measure perplexity.")] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Model with which the predictions on the text are compared: a folder, or OWNER/NAME."),
    ] = None,
    choices: Annotated[
        Path | None, typer.Option(help="Questions in jsonl (prompt, choices, answer): measure accuracy.")
    ] = None,
    sample: Annotated[
        str | None, typer.Option(help="Prompt to continue. Slow: every token reads the whole model.")
    ] = None,
    num_tokens: Annotated[int, typer.Option(help="Largest number of tokens to write, for --sample.")] = 16,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval that generate no text, such as piqa,arc_easy.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question, for --tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="Number of documents of each task; all by default.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with further tasks.")] = None,
    num_samples: NumSamples = 64,
    seq_len: SeqLen = 512,
    bos: Annotated[
        bool,
        typer.Option("--bos", help="Start every segment with BOS, which Gemma needs; otherwise only the first one."),
    ] = False,
    num_questions: Annotated[int | None, typer.Option(help="Number of questions; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Segments in a batch.")] = 4,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder for hidden states; the system's temporary folder by default.")
    ] = None,
    blocks_path: BlocksPath = None,
    allow_links: AllowLinks = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Evaluate MODEL with one block in memory at a time: perplexity, divergence, accuracy, tasks of lm-eval, or a sample."""
    from cbqstream.report.progress import Progress

    asked = [mode for mode in (text, choices, tasks, sample) if mode is not None]
    if len(asked) != 1 or (against is not None and text is None):
        raise UsageError("eval needs --text, with or without --against, or one of --choices, --tasks and --sample.")
    for flag, value, mode, other in (
        ("--limit", limit, "--tasks", tasks),
        ("--num-fewshot", num_fewshot, "--tasks", tasks),
        ("--include-path", include_path, "--tasks", tasks),
        ("--num-questions", num_questions, "--choices", choices),
        ("--bos", bos or None, "--text", text),
    ):
        if value is not None and other is None:
            raise UsageError(f"{flag} is for {mode}. Leave it out.")
    folder, reference = folder_of(model, revision), None if against is None else folder_of(against, None)
    with Progress(Console(stderr=True)) as progress:
        options: EvaluationOptions = {
            "batch_size": batch_size,
            "scratch": scratch,
            "device": device,
            "threads": threads,
            "blocks_path": blocks_path,
            "allow_links": allow_links,
            "listener": progress,
        }
        if text is not None:
            answer = _of_text(
                folder, text, reference, {"num_samples": num_samples, "seq_len": seq_len, "bos": bos}, options
            )
        elif choices is not None:
            answer = _of_choices(folder, choices, num_questions, options)
        elif tasks is not None:
            answer = _of_tasks(
                folder, tasks, {"num_fewshot": num_fewshot, "limit": limit, "include_path": include_path}, options
            )
        else:
            answer = _of_sample(folder, sample or "", num_tokens, options)
    say(answer)
    from cbqstream.checkpoint.folder import read_json
    from cbqstream.packed.sources import has_unread_input_quantizers

    for model_folder in (folder, reference):
        if model_folder is not None and has_unread_input_quantizers(
            model_folder, read_json(model_folder, "config.json")
        ):
            say(
                f"warning: {model_folder}: inference engines also quantize the inputs of its layers; only its weights were evaluated."
            )


def _of_text(
    folder: Path, text: Path, against: Path | None, segments: dict[str, Any], options: "EvaluationOptions"
) -> str:
    from cbqstream.evaluation.against import compare
    from cbqstream.evaluation.perplexity import evaluate as measure

    if against is None:
        found = measure(folder, text, **segments, **options)
        return f"{text.name}: perplexity {found.perplexity:.4f} ({found.num_segments} x {segments['seq_len']} tokens)"
    distance = compare(folder, against, text, **segments, **options)
    same = f"same next token {distance.top1:.2%} ({distance.num_segments} x {segments['seq_len']} tokens)"
    return f"{text.name}: divergence {distance.divergence:.5f}, {same}"


def _of_choices(folder: Path, choices: Path, num_questions: int | None, options: "EvaluationOptions") -> str:
    from cbqstream.evaluation.choices import evaluate_choices

    found = evaluate_choices(folder, choices, num_questions=num_questions, **options)
    both = f"accuracy {found.by_sum:.4f}, by character {found.by_character:.4f}"
    return f"{choices.name}: {both} ({len(found.answers)} questions)"


def _of_tasks(folder: Path, tasks: str, task_options: dict[str, Any], options: "EvaluationOptions") -> str:
    from cbqstream.evaluation.harness import evaluate_tasks, table

    return table(evaluate_tasks(folder, tasks.split(","), **task_options, **options))


def _of_sample(folder: Path, prompt: str, num_tokens: int, options: "EvaluationOptions") -> str:
    from cbqstream.evaluation.sample import sample as write

    written = write(folder, prompt, num_tokens=num_tokens, **options)
    shown = [mark if mark.isprintable() or mark == "\n" else "\N{REPLACEMENT CHARACTER}" for mark in written]
    return prompt + "".join(shown)
