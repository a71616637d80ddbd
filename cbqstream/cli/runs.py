"""Commands about a run directory: status, check, rollback, clean."""

from pathlib import Path
from typing import Annotated

import typer

from cbqstream.cli.app import AllowLinks, AllowSharedRunDir, BlocksPath, app, complain, say
from cbqstream.errors import InputError, UsageError


@app.command()
def status(run: Annotated[Path, typer.Argument(help="The run directory.")]) -> None:
    """Show the progress of a run without changing it."""
    from cbqstream.report.status import obstacles_to_resume, status_lines
    from cbqstream.rundir.chain import Chain

    chain = Chain.read(run)
    has_result = chain.is_complete and chain.is_result(Path(chain.run.config.out), read=False)
    for line in status_lines(chain, has_result=has_result, obstacles=obstacles_to_resume(chain)):
        say(line)


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A run directory, or a quantized model.")],
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Read every byte; otherwise only sizes and records.")
    ] = False,
    load: Annotated[
        bool,
        typer.Option("--load", help="Load the result with transformers, and compare it with the streamed evaluation."),
    ] = False,
    blocks_path: BlocksPath = None,
    allow_links: AllowLinks = False,
) -> None:
    """Verify a run or a finished model without changing it. If problems are found, they are listed and the exit code is 65."""
    from cbqstream.commands.check import check as look

    found = look(path, read_data=read_data, blocks_path=blocks_path, load=load, allow_links=allow_links)
    for line in found.facts:
        say(line)
    for problem in found.problems:
        complain(problem)
    if found.problems:
        raise typer.Exit(InputError.exit_code)
    say("ok")


@app.command()
def rollback(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    to: Annotated[int, typer.Option(help="Number of windows to keep; 0 starts again.")],
    allow_shared_run_dir: AllowSharedRunDir = False,
) -> None:
    """Delete the newest windows of a run: the last one, or all."""
    from cbqstream.disk import Disk, is_occupied
    from cbqstream.rundir.journal import open_journal

    with open_journal(run, Disk(), shared=allow_shared_run_dir, whole=False) as journal:
        journal.roll_back(to)
        out = Path(journal.chain.run.config.out)
    first = f"move {out} away, then " if is_occupied(out) else ""
    say(f"{to} of {journal.chain.num_windows} windows are kept. To resume: {first}cbqstream resume {run}")


@app.command()
def clean(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Delete a run that is not finished, too.")] = False,
    allow_shared_run_dir: AllowSharedRunDir = False,
) -> None:
    """Delete the directory of a finished run. The model stays."""
    from cbqstream.disk import Disk
    from cbqstream.rundir.chain import Chain
    from cbqstream.rundir.journal import discard

    chain = Chain.read(run)
    out = chain.run.config.out
    if not unfinished and not (chain.is_complete and chain.is_result(Path(out))):
        done = f"{chain.next_window} of {chain.num_commits} commits are done"
        state = f"{done}, and its result is not at {out}" if chain.is_complete else done
        raise UsageError(f"{run}: {state}. Run cbqstream resume {run}, or delete it with --unfinished.")
    discard(run, Disk(), shared=allow_shared_run_dir)
    say(f"deleted: {run}")
