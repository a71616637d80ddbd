"""The plan of a run: the memory, disk space and time that it will need.

A plan is computed from headers, config.json and settings, and no weight is read. Sizes are those of the largest block, and the counts
follow the steps of a window (`run/pipeline.py`). `benchmarks/plan_check.py` compares plans with real runs. The time is computed from rates
that are measured on this machine, on layers with the shapes of the model and on files of bounded size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from cbqstream.config import QuantizeConfig
from cbqstream.errors import DeviceMemoryError, InputError, StorageError, UsageError
from cbqstream.hub import is_name
from cbqstream.planning.advice import advice
from cbqstream.planning.alternatives import smaller_settings
from cbqstream.planning.closed_form import closed_form_flop
from cbqstream.planning.disk_rates import measure_disks
from cbqstream.planning.engines import engine_warnings
from cbqstream.planning.experts import expert_memory, expert_work, inputs_beside_experts, inputs_beside_window
from cbqstream.planning.layer_schemes import quantized_share
from cbqstream.planning.memory import CONTEXT, device_bytes, host_bytes, rounding_cost
from cbqstream.planning.planned import Plan, name_of_mode
from cbqstream.planning.rates import STEP_FLOP, Rates, measure_rates
from cbqstream.planning.requirements import (
    checked_model,
    load_calibration,
    read_headers,
    require_paths,
    source_warnings,
)
from cbqstream.planning.sizes import ModelSizes
from cbqstream.planning.traffic import OffloadFile, Traffic, disk_bytes
from cbqstream.planning.work import START, Extent, Work, attention_weights, seconds_of
from cbqstream.records import MemoryMode
from cbqstream.rounding.registry import method_of
from cbqstream.runtime.device import choose_device, compute_dtype, fixed_numerics
from cbqstream.runtime.memory import GIB, available_bytes

_MODES = (
    MemoryMode(),
    MemoryMode(activation_checkpointing=True),
    MemoryMode(activation_checkpointing=True, offload=True),
)
"""Memory modes in the order in which they are tried. None takes less time than the one before it."""


def memory_modes(config: QuantizeConfig, sizes: ModelSizes) -> Sequence[MemoryMode]:
    """Memory modes of a run in the order in which they are tried.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
    """
    modes: Sequence[MemoryMode] = _MODES if method_of(config.reconstruction).learns else (_MODES[0], _MODES[-1])
    if sizes.experts_alone(config) is not None:
        # offloading comes last, because it usually moves more than the inputs of experts
        on_disk = [replace(mode, expert_inputs_on_disk=True) for mode in modes]
        modes = (*modes[:-1], *on_disk[:-1], modes[-1], on_disk[-1])
    return [each for mode in modes for each in (mode, replace(mode, streams_on_disk=True))]


def make_plan(
    config: QuantizeConfig,
    sizes: ModelSizes,
    device: str,
    rates: Rates | None = None,
    memory_mode: MemoryMode = _MODES[0],
) -> Plan:
    """Make the plan of a run in a given memory mode.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        device: `cpu` or `cuda`.
        rates: rates of the machine, from which the time is computed; None gives a plan without time.
        memory_mode: memory mode of the run.

    Raises:
        UsageError: the settings leave no block to quantize.
    """
    if config.keep_first + config.keep_last >= sizes.num_blocks:
        raise UsageError(
            f"keep_first and keep_last leave none of the {sizes.num_blocks} blocks to quantize. Use smaller values."
        )
    held, extent = sizes.in_windows(config), Extent.of(config, sizes.num_blocks)
    host, experts = host_bytes(config, sizes, memory_mode, device), expert_memory(config, sizes, device)
    of_window = inputs_beside_window(config, sizes, memory_mode)
    of_experts = inputs_beside_experts(config, sizes, memory_mode)
    if device == "cuda":
        host, of_window, of_experts = host | of_experts, {}, {}
    computing = device_bytes(config, sizes, memory_mode, extent.in_window, device, of_window, experts | of_experts)
    work = Work.of(config, held, extent, activation_checkpointing=memory_mode.activation_checkpointing)
    offloaded = OffloadFile.of(config, held, extent, work) if memory_mode.offload else OffloadFile()
    traffic = Traffic.of(config, sizes, extent, work, memory_mode, offloaded, device)
    parts = [(held, work, attention_weights(config, sizes))]
    routed = sizes.experts_alone(config)
    if routed is not None:
        parts.append((routed, expert_work(config, sizes, extent), 0))
    costs = [rounding_cost(config, part) for part, _, _ in parts]
    step_bytes = [cost.step_bytes_on(device, config.reconstruction.kernels) for cost in costs]
    closed_form = [
        done.blocks * closed_form_flop(config, part) if method_of(config.reconstruction).closed_form else 0.0
        for part, done, _ in parts
    ]
    seq_len = config.calibration.seq_len
    products = sum(2 * seq_len * done.passes * (part.active + attention) for part, done, attention in parts)
    made = Plan(
        windows=extent.windows,
        ram=host | ({} if device == "cuda" else computing),
        vram={"context": CONTEXT} | computing if device == "cuda" else {},
        disk=disk_bytes(config, sizes, extent, memory_mode, offloaded, device),
        source=sizes.source_bytes,
        read=traffic.read,
        written=traffic.written,
        bus=traffic.bus,
        flop=products
        + sum(done.steps * cost.step_flop for (_, done, _), cost in zip(parts, costs, strict=True))
        + sum(closed_form),
        rounding_bytes=int(sum(done.steps * moved for (_, done, _), moved in zip(parts, step_bytes, strict=True))),
        seconds={},
        memory_mode=memory_mode,
    )
    made = replace(made, exceeded=_exceeded(config, made))
    if rates is None:
        return made
    times = [seconds_of(config, part, done, rates, attention, device) for part, done, attention in parts]
    seconds = {name: sum(each[name] for each in times) for name in times[0]} | {"starting": START}
    if any(closed_form):
        seconds["codes in closed form"] = sum(closed_form) * rates.product / STEP_FLOP
    if rates.disks is None:
        return replace(made, seconds=seconds)
    memory = min(rates.disks.memory, config.max_ram or rates.disks.memory)
    moved = traffic.seconds(rates.disks, sum(seconds.values()), spare=memory - made.largest("ram"))
    return replace(made, seconds=seconds | dict(moved), disks=rates.disks)


def fitting_plan(config: QuantizeConfig, sizes: ModelSizes, device: str, rates: Rates | None = None) -> Plan:
    """Make the plan of the first memory mode that stays within the memory limits of the settings.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        device: `cpu` or `cuda`.
        rates: rates of the machine, from which the time is computed; None gives a plan without time.

    Raises:
        DeviceMemoryError: no memory mode stays within the limits; the message names smaller settings that do.
    """
    made = _fitting_or_smallest(config, sizes, device, rates)
    over = _over(config, made)
    if over is None:
        return made
    name, limit = over
    needs = [f"{part} {size / GIB:.2f}" for part, size in getattr(made, name).items() if size > GIB / 100]
    fits = [
        f"{flags} ({smaller.largest(name) / GIB:.2f})"
        for flags, other in smaller_settings(config, sizes).items()
        if (smaller := _fitting_or_smallest(other, sizes, device, None)).exceeded is None
    ]
    remedy = f"These settings fit: {', '.join(fits)}" if fits else "No smaller setting fits; use a higher limit"
    raise DeviceMemoryError(
        f"--max-{name} {limit / GIB:.2f} GiB: this run needs {made.largest(name) / GIB:.2f} ({', '.join(needs)}). {remedy}."
    )


def _fitting_or_smallest(config: QuantizeConfig, sizes: ModelSizes, device: str, rates: Rates | None) -> Plan:
    """The plan of the first memory mode that stays within the limits, or of the last mode if none does."""
    *others, last = memory_modes(config, sizes)
    plans = (make_plan(config, sizes, device, rates, mode) for mode in others)
    fitting = next((made for made in plans if made.exceeded is None), None)
    return fitting or make_plan(config, sizes, device, rates, last)


def _exceeded(config: QuantizeConfig, made: Plan) -> str | None:
    """The limit that a plan exceeds, as text; None if there is none.

    Without --max-ram, a run with streams in memory may take half of the memory that is free.
    """
    over = _over(config, made)
    if over is not None:
        return f"--max-{over[0]} {over[1] / GIB:.2f} GiB"
    unlimited = config.max_ram is None and not made.memory_mode.streams_on_disk
    return "half of the free memory" if unlimited and 2 * made.largest("ram") > available_bytes() else None


def _over(config: QuantizeConfig, made: Plan) -> tuple[Literal["ram", "vram"], int] | None:
    """Name and size in bytes of a memory limit that a plan exceeds, or None."""
    if config.max_vram is not None and made.largest("vram") > config.max_vram:
        return "vram", config.max_vram
    if config.max_ram is not None and made.largest("ram") > config.max_ram:
        return "ram", config.max_ram
    return None


def plan(
    config: QuantizeConfig,
    *,
    with_time: bool = True,
    revision: str | None = None,
    check_out: bool = True,
    check_dataset: bool = True,
    allow_partial: bool = False,
    allow_links: bool = False,
) -> Plan:
    """Make the plan of a run, after the same checks that `quantize` makes before it writes anything.

    Args:
        config: settings of the run. If the model is a name on the Hub, only headers are fetched, and the dataset is not read.
        with_time: measure the speed of this machine and of its disks, which takes five seconds.
        revision: branch, tag or commit of a model on the Hub.
        check_out: check OUT and the run directory of the settings.
        check_dataset: read the dataset of the settings.
        allow_partial: accept a model most of whose block weights stay in full precision.
        allow_links: read shards that are links to files outside the model folder.

    Returns:
        The plan, with plans of all memory modes and of smaller settings, and with warnings.

    Raises:
        InputError: the model or the dataset cannot be used.
        UsageError: the settings do not fit the model.
        DeviceMemoryError: the run does not fit the memory limits of the settings.
    """
    model, infos = read_headers(config.model, revision, allow_links=allow_links)
    if check_out:
        require_paths(config)
    device, rates = choose_device(config.device), None
    meta_model = checked_model(config, model, infos, device, allow_partial=allow_partial)
    if check_dataset and not is_name(config.model, revision):
        load_calibration(config, meta_model)
    sizes, warnings = ModelSizes.of(meta_model), list[str]()
    if with_time:
        with fixed_numerics(device, config.threads):
            rates = measure_rates(config, list(sizes.layers.values()), device, compute_dtype(device))
        local = (
            []
            if is_name(config.model, revision)
            else sorted({part.file for info in infos.values() for part in info.stored})
        )
        try:
            rates = replace(rates, disks=measure_disks(config.run_path, local, device))
        except (StorageError, InputError) as error:
            warnings.append(f"the time of the disk is not counted. {error}")
    made = compared(config, sizes, device.type, fitting_plan(config, sizes, device.type, rates), rates)
    warnings += [*source_warnings(config.model, meta_model), *engine_warnings(config, meta_model)]
    return replace(
        made, quantized=quantized_share(config, meta_model), warnings=[*warnings, *advice(made, made.smaller)]
    )


def compared(config: QuantizeConfig, sizes: ModelSizes, device: str, made: Plan, rates: Rates | None) -> Plan:
    """The plan of a run, with the plans of all ways to run it.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        device: `cpu` or `cuda`.
        made: the plan, from `fitting_plan`.
        rates: rates of the machine; None leaves out the time.
    """
    modes = {name_of_mode(mode): make_plan(config, sizes, device, rates, mode) for mode in memory_modes(config, sizes)}
    smaller = smaller_plans(config, sizes, device, rates)
    return replace(made, modes=modes, smaller=smaller, reason=_reason(config, modes, made))


def smaller_plans(
    config: QuantizeConfig, sizes: ModelSizes, device: str, rates: Rates | None = None
) -> dict[str, Plan]:
    """Plans of runs with smaller settings, by the flags that select them, each in the memory mode that such a run takes.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        device: `cpu` or `cuda`.
        rates: rates of the machine; None leaves out the time.
    """
    others = smaller_settings(config, sizes)
    return {flags: _fitting_or_smallest(other, sizes, device, rates) for flags, other in others.items()}


def _reason(config: QuantizeConfig, modes: Mapping[str, Plan], made: Plan) -> str:
    """The reason for the memory mode of a plan."""
    before = [*modes][: [*modes].index(made.way)]
    failed = dict[str, list[str]]()
    for name in before:  # without a limit, memory may have become free since
        failed.setdefault(modes[name].exceeded or "half of the free memory", []).append(f'"{name}"')
    if failed:
        reasons = (f"{', '.join(names)} would exceed {limit}" for limit, names in failed.items())
        return f"the first that fits: {'; '.join(reasons)}"
    limited = config.max_ram is not None or config.max_vram is not None
    return f"the fastest, and {'it stays within the limits' if limited else 'no limit is set'}"
