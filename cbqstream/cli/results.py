"""Commands about a finished model: export, report, eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cbqstream.cli.app import BlocksPath, Device, NumSamples, Revision, SeqLen, Threads, app, folder_of, say
from cbqstream.errors import UsageError

if TYPE_CHECKING:
    from cbqstream.evaluation.model import EvaluationOptions


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A result of quantize.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    format_name: Annotated[str, typer.Option("--format", help="gptq, gptq_v2, awq, gguf or dense.")],
) -> None:
    """Write a finished model in another format, code for code."""
    from cbqstream.commands.export import export as write

    say(f"done: {write(model, out, format_name)}")
    if format_name == "dense":
        say("note: dense weights are rounded to the dtype of the source, and no inputs are quantized.")


@app.command()
def push(
    out: Annotated[Path, typer.Argument(help="A model folder.")],
    name: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made where it does not exist.")],
    public: Annotated[bool, typer.Option("--public", help="Everybody sees it, where it is made.")] = False,
    blocks_path: BlocksPath = None,
) -> None:
    """Upload a result to the Hugging Face Hub, once `check --read-data` found nothing."""
    from cbqstream.commands.push import push as upload

    say(f"pushed: {upload(out, name, private=not public, blocks_path=blocks_path)}")


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A run directory, finished or not, or a model that was quantized.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write report.html and its pictures into.")],
    text: Annotated[
        Path | None, typer.Option(help="Text, or token ids: the perplexity of the source and of the result, streamed.")
    ] = None,
    num_samples: NumSamples = 64,
    seq_len: SeqLen = 512,
    blocks_path: BlocksPath = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """A page to look at: losses, noise, outliers, bits, time and memory. One HTML file that needs nothing else, and PNGs."""
    from cbqstream.commands.report import report as write
    from cbqstream.report.progress import Progress

    with Progress(Console(stderr=True)) as progress:
        how: EvaluationOptions = {
            "blocks_path": blocks_path,
            "device": device,
            "threads": threads,
            "listener": progress,
        }
        page = write(path, out, text, num_samples=num_samples, seq_len=seq_len, **how)
    say(f"done: {page}")


@app.command("eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A model, quantized by cbqstream or not: a folder, or a name on the Hub.")
    ],
    revision: Revision = None,
    text: Annotated[Path | None, typer.Option(help="Text, or token ids: perplexity.")] = None,
    against: Annotated[
        str | None, typer.Option(help="A model to compare the predictions on the text with: a folder, or a name.")
    ] = None,
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
    bos: Annotated[
        bool, typer.Option("--bos", help="Begin every segment of a text with BOS, which Gemma needs; else the first.")
    ] = False,
    num_questions: Annotated[int | None, typer.Option(help="The first so many questions; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Segments at once.")] = 4,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder for hidden states; the temporary folder by default.")
    ] = None,
    blocks_path: BlocksPath = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Perplexity, distance from another model, accuracy, tasks of lm-eval or a sample of MODEL, one block in memory at a time."""
    from cbqstream.report.progress import Progress

    asked = [what for what in (text, choices, tasks, sample) if what is not None]
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
            raise UsageError(f"{flag} is for {mode}.")
    folder, reference = folder_of(model, revision), None if against is None else folder_of(against, None)
    with Progress(Console(stderr=True)) as progress:
        how: EvaluationOptions = {
            "batch_size": batch_size,
            "scratch": scratch,
            "device": device,
            "threads": threads,
            "blocks_path": blocks_path,
            "listener": progress,
        }
        if text is not None:
            answer = _of_text(
                folder, text, reference, {"num_samples": num_samples, "seq_len": seq_len, "bos": bos}, how
            )
        elif choices is not None:
            answer = _of_choices(folder, choices, num_questions, how)
        elif tasks is not None:
            answer = _of_tasks(
                folder, tasks, {"num_fewshot": num_fewshot, "limit": limit, "include_path": include_path}, how
            )
        else:
            answer = _of_sample(folder, sample or "", num_tokens, how)
    say(answer)


def _of_text(folder: Path, text: Path, against: Path | None, segments: dict[str, Any], how: "EvaluationOptions") -> str:
    from cbqstream.evaluation.against import compare
    from cbqstream.evaluation.perplexity import evaluate as measure

    if against is None:
        found = measure(folder, text, **segments, **how)
        return f"{text.name}: perplexity {found.perplexity:.4f} ({found.num_segments} x {segments['seq_len']} tokens)"
    distance = compare(folder, against, text, **segments, **how)
    same = f"same next token {distance.top1:.2%} ({distance.num_segments} x {segments['seq_len']} tokens)"
    return f"{text.name}: divergence {distance.divergence:.5f}, {same}"


def _of_choices(folder: Path, choices: Path, num_questions: int | None, how: "EvaluationOptions") -> str:
    from cbqstream.evaluation.choices import evaluate_choices

    found = evaluate_choices(folder, choices, num_questions=num_questions, **how)
    both = f"accuracy {found.by_sum:.4f}, by character {found.by_character:.4f}"
    return f"{choices.name}: {both} ({len(found.answers)} questions)"


def _of_tasks(folder: Path, tasks: str, options: dict[str, Any], how: "EvaluationOptions") -> str:
    from cbqstream.evaluation.harness import evaluate_tasks, table

    return table(evaluate_tasks(folder, tasks.split(","), **options, **how))


def _of_sample(folder: Path, prompt: str, num_tokens: int, how: "EvaluationOptions") -> str:
    from cbqstream.evaluation.sample import sample as write

    written = write(folder, prompt, num_tokens=num_tokens, **how)
    shown = [mark if mark.isprintable() or mark == "\n" else "\N{REPLACEMENT CHARACTER}" for mark in written]
    return prompt + "".join(shown)
