"""Commands that make a model: quantize, plan, resume."""

import gc
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cbqstream.cli.app import (
    AllowLinks,
    AllowNumericsChange,
    AllowPartial,
    AllowSharedRunDir,
    GroupedCommand,
    LogJson,
    Revision,
    StopAfterWindow,
    app,
    folder_of,
    say,
)
from cbqstream.cli.settings import config_of, with_settings
from cbqstream.config import QuantizeConfig
from cbqstream.errors import CbqstreamError, StoppedError
from cbqstream.runtime.interruption import Interrupted


def quantize(
    settings: Mapping[str, Any],
    *,
    revision: Revision = None,
    push_to: Annotated[
        str | None,
        typer.Option(
            help="OWNER/NAME on the Hub: upload the result after a check; a new one is private.",
            rich_help_panel="Model and output",
        ),
    ] = None,
    stop_after_window: StopAfterWindow = None,
    allow_numerics_change: AllowNumericsChange = False,
    allow_shared_run_dir: AllowSharedRunDir = False,
    allow_partial: AllowPartial = False,
    allow_links: AllowLinks = False,
    log_json: LogJson = None,
) -> None:
    """Quantize MODEL into OUT, or resume the run that was begun."""
    if push_to is not None:
        from cbqstream.hub import require_name

        require_name(push_to)
    config = config_of(settings)  # first, so that wrong settings are reported before a model is downloaded
    config = replace(config, model=str(folder_of(config.model, revision).absolute()))
    to_resume = "the same command" if push_to is not None else None
    _run(
        config,
        log_json,
        to_resume,
        stop_after_window=stop_after_window,
        allow_numerics_change=allow_numerics_change,
        allow_shared_run_dir=allow_shared_run_dir,
        allow_partial=allow_partial,
        allow_links=allow_links,
    )
    if push_to is not None:
        from cbqstream.commands.push import push as upload

        say(f"pushed: {upload(Path(config.out), push_to, blocks_path=config.blocks_path)}")


def plan(
    settings: Mapping[str, Any],
    *,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object.")] = False,
    without_time: Annotated[
        bool,
        typer.Option("--without-time", help="Do not measure this machine and its disks, which takes five seconds."),
    ] = False,
    allow_partial: AllowPartial = False,
    allow_links: AllowLinks = False,
) -> None:
    """Show the memory, disk space and time that `quantize` would need with the same flags, or why it would refuse.

    Leaves nothing behind. MODEL is a folder or a name on the Hub, of which only headers are read. OUT and --dataset may be left out.
    """
    from cbqstream.planning.plan import plan as make_plan
    from cbqstream.planning.plan_lines import plan_lines

    given = {name: value for name, value in settings.items() if value is not None}
    config = config_of({"out": "OUT", "dataset": "DATASET", **given})
    made = make_plan(
        config,
        with_time=not without_time,
        revision=revision,
        check_out="out" in given,
        check_dataset="dataset" in given,
        allow_partial=allow_partial,
        allow_links=allow_links,
    )
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=1))
        return
    for line in plan_lines(made):
        say(line)


app.command(cls=GroupedCommand)(with_settings(quantize))
app.command(cls=GroupedCommand)(with_settings(plan, optional=True))


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    stop_after_window: StopAfterWindow = None,
    allow_numerics_change: AllowNumericsChange = False,
    allow_shared_run_dir: AllowSharedRunDir = False,
    allow_links: AllowLinks = False,
    log_json: LogJson = None,
) -> None:
    """Resume a run; all settings come from its directory."""
    from cbqstream.rundir.chain import Chain

    chain = Chain.read(run)
    config = replace(chain.run.config, run_dir=str(run.absolute()), threads=chain.numerics.threads)
    _run(
        config,
        log_json,
        stop_after_window=stop_after_window,
        allow_numerics_change=allow_numerics_change,
        allow_shared_run_dir=allow_shared_run_dir,
        allow_links=allow_links,
    )


def _run(config: QuantizeConfig, log_json: Path | None, to_resume: str | None = None, **allowed: Any) -> None:
    """Run the pipeline with progress on the console.

    Args:
        config: settings of the run.
        log_json: file to which a JSON line per window is appended.
        to_resume: what to do to resume an interrupted run; by default, the command that resumes it.
        allowed: further arguments of the pipeline.
    """
    from cbqstream.report.progress import Progress
    from cbqstream.run.pipeline import quantize as run_pipeline

    gc.freeze()  # imported modules stay alive, so garbage collection need not visit them
    try:
        with Progress(Console(), log_json) as progress:
            out = run_pipeline(config, progress, **allowed)
    except (Interrupted, StoppedError) as stop:
        raise StoppedError(f"{stop} To resume: {to_resume or _to_resume(config, allowed)}") from stop
    finally:
        gc.unfreeze()  # nanobind reports objects that are not collected at exit as leaks
    say(f"done: {out}")


def _to_resume(config: QuantizeConfig, allowed: Mapping[str, Any]) -> str:
    """Command that resumes a run: `cbqstream resume` if it has the same effect as the command that was interrupted."""
    from cbqstream.rundir.chain import Chain

    try:
        begun = Chain.read(config.run_path).run.config
    except CbqstreamError:
        return "the same command"
    same = (begun.model, begun.out, begun.device) == (config.model, config.out, config.device)
    needed = [f"--{name.replace('_', '-')}" for name in ("allow_shared_run_dir", "allow_links") if allowed.get(name)]
    return " ".join(("cbqstream resume", str(config.run_path), *needed)) if same else "the same command"
