"""The application, the flags that several commands share, and output."""

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperArgument, TyperCommand

app = typer.Typer(
    name="cbqstream",
    help="Quantize language models that are far larger than memory.\n\n"
    "Start with `cbqstream quantize MODEL OUT --scheme W4A16 --dataset TEXT`."
    " An interrupted run resumes with the same command, or with `cbqstream resume OUT.run`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # tables of rich cut off long names of flags in a terminal of 80 columns
)

NumSamples = Annotated[int, typer.Option(help="Number of segments, spread evenly over the text.")]
SeqLen = Annotated[int, typer.Option(help="Tokens in a segment.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; the physical cores by default.")]
BlocksPath = Annotated[
    str | None, typer.Option(help="Module path of the list of transformer blocks, if it is not found.")
]
Revision = Annotated[
    str | None,
    typer.Option(
        help="Branch, tag or commit of a MODEL that is a name on the Hub.", rich_help_panel="Model and output"
    ),
]
StopAfterWindow = Annotated[
    int | None, typer.Option(help="Stop after this window, with exit code 75.", rich_help_panel="Run")
]
AllowNumericsChange = Annotated[
    bool,
    typer.Option(
        "--allow-numerics-change",
        help="Continue with other threads, versions or another device.",
        rich_help_panel="Run",
    ),
]
AllowSharedRunDir = Annotated[
    bool,
    typer.Option(
        "--allow-shared-run-dir", help="Use a run directory that other users can change.", rich_help_panel="Run"
    ),
]
AllowPartial = Annotated[
    bool,
    typer.Option(
        "--allow-partial",
        help="Accept a model with less than 80 % of its block weights in linear layers.",
        rich_help_panel="Run",
    ),
]
AllowLinks = Annotated[
    bool,
    typer.Option(
        "--allow-links",
        help="Read weights through links to files outside the model folder, such as on a network disk.",
        rich_help_panel="Run",
    ),
]
LogJson = Annotated[
    Path | None, typer.Option(help="Append a JSON line per window to this file.", rich_help_panel="Run")
]


class GroupedCommand(TyperCommand):
    """A command whose help shows the flags in groups, one for each panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the groups in the order of their first flags."""
        groups: dict[str, list[Any]] = {}
        for parameter in self.get_params(ctx):
            title = "Arguments" if isinstance(parameter, TyperArgument) else "Options"
            rows = groups.setdefault(getattr(parameter, "rich_help_panel", None) or title, [])
            rows.append(parameter.get_help_record(ctx))
        for title, rows in groups.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def folder_of(model: str, revision: str | None) -> Path:
    """Folder of a model, which is downloaded into the local cache if it is a name on the Hub.

    Args:
        model: a folder, or `owner/name` on the Hub.
        revision: branch, tag or commit of a model on the Hub.
    """
    from cbqstream.checkpoint.folder import refuse_adapter
    from cbqstream.hub import fetch

    return fetch(model, revision, refuse_adapter)


def say(line: str) -> None:
    """Print a line to standard output."""
    Console().print(line, highlight=False, soft_wrap=True, markup=False, emoji=False)


def fail(message: str, code: int) -> NoReturn:
    """Print an error to standard error, and exit with an exit code."""
    complain(message)
    sys.exit(code)


def complain(message: str) -> None:
    """Print an error to standard error."""
    Console(stderr=True).print(
        f"cbqstream: error: {message}", highlight=False, soft_wrap=True, markup=False, emoji=False
    )


def dashed(argument: str) -> str:
    """Command-line argument with `-` instead of `_` in the name of its flag; its value is not changed."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value
