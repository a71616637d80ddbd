"""The application, the flags that several commands have, and how anything is said."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

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
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a MODEL that is a name on the Hub.")]
StopAfterWindow = Annotated[int | None, typer.Option(help="Leave after this window, with exit code 75.")]
AllowNumericsChange = Annotated[
    bool, typer.Option("--allow-numerics-change", help="Go on with other threads, versions or device.")
]
AllowSharedRunDir = Annotated[
    bool, typer.Option("--allow-shared-run-dir", help="Use a run directory that others can change.")
]
LogJson = Annotated[Path | None, typer.Option(help="Append a JSON line per window to this file.")]


def folder_of(model: str, revision: str | None) -> Path:
    """Where a model is; one on the Hub is downloaded into the local cache."""
    from cbqstream.hub import fetch

    return fetch(model, revision)


def say(line: str) -> None:
    Console().print(line, highlight=False, soft_wrap=True, markup=False, emoji=False)


def fail(message: str, code: int) -> NoReturn:
    complain(message)
    sys.exit(code)


def complain(message: str) -> None:
    Console(stderr=True).print(
        f"cbqstream: error: {message}", highlight=False, soft_wrap=True, markup=False, emoji=False
    )


def dashed(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value
