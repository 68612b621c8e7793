"""`lorry plan [MODEL]`: memory by component and time of a training run, from the config alone; with a budget, what fits it.

lorry plan model=smollm2-135m r=auto memory_budget=3GiB
lorry plan llama-3-70b backend=fsdp processes=8 max_length=4096 per_device_train_batch_size=1
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

from rich.table import Column, Table

from lorry.config.parsing.sizes import in_words, parse_size
from lorry.config.settings import PlanSettings
from lorry.console import Console
from lorry.disk.durable import DiskError
from lorry.errors import ConfigError
from lorry.plan import machine, rates
from lorry.plan.configs import ConfigFound, find_config
from lorry.plan.flops import efficiency, flops_of
from lorry.plan.memory import TRAINABLE, Device, Memory, Precision, Setup, path_of
from lorry.plan.parallel import Split, check, memory_per_gpu, slowdown
from lorry.plan.rates import Measurement, RunRate
from lorry.plan.report import Plan, Speed
from lorry.plan.search import Choice, Found
from lorry.plan.settle import Need, adapters_of, find, impossible, open_choices, setup_of
from lorry.plan.shapes import Shape, shape_of

DEFAULT_GPU = "h100"
SHOWN = 6  # choices of a search that are worth a line


def main(settings: PlanSettings, notes: list[str]) -> int:
    """Print the plan. Raises ConfigError where nothing fits the budget, ModelError where there is no such config."""
    found = find_config(settings.model.name, revision=settings.model.revision)
    plan = plan_of(settings, found)
    if settings.format == "json":
        print(json.dumps(plan.as_json(), indent=1))
        return 0
    show(plan, Console())
    return 0


def plan_of(settings: PlanSettings, found: ConfigFound) -> Plan:
    """The whole plan of a description whose model's config was found."""
    shape = shape_of(found.config, where=found.where, native=settings.model.native)
    device, gpu = _device(settings)
    split = _split(settings)
    check(split, shape)
    options = open_choices(settings, shape, [_precision(settings, device)], rank=found.adapter_rank)
    need = _need(settings, shape, device, split)
    search, choice = None, options[0]
    if settings.memory_budget is not None:
        search = find(settings, options, need)
        if search.best is None:
            raise _nothing_fits(settings, search, need)
        choice = search.best.choice
    setup, adapter = setup_of(settings, choice, device, machine.has_tiles()), adapters_of(settings, shape)(choice.rank)
    budget, budget_is = _budget(settings, gpu)
    instead = None
    if budget is not None and search is None:  # a GPU's own memory: say what would fit it, without choosing it unasked
        freed = settings.model_copy(update={"memory_budget": f"{budget}B"})
        instead = find(freed, open_choices(freed, shape, [choice.precision], rank=found.adapter_rank), need).best
    return Plan(
        model=settings.model.name, where=found.where, shape=shape, choice=choice, setup=setup, split=split,
        adapter_parameters=adapter.parameters, memory=need(choice), flops=flops_of(shape, adapter, setup),
        speed=_speed(settings, shape, choice, device, split, gpu), budget=budget, budget_is=budget_is,
        found=search, instead=instead, trainable=_trainable(settings), notes=_notes(settings, shape, found, choice),
    )  # fmt: skip


# --- what the description means


def _device(settings: PlanSettings) -> tuple[Device, str | None]:
    """cpu or cuda, and the GPU whose numbers count (None: this machine's own)."""
    asked, gpu = settings.model.device, settings.backend.gpu
    spread = settings.backend.name != "single"
    if asked in ("cpu", "mps"):
        if gpu or spread:
            raise ConfigError(f"model.device={asked} and backend.{'gpu' if gpu else 'name'} exclude each other; leave one out")
        return "cpu", None
    if gpu or spread:
        return "cuda", gpu or DEFAULT_GPU
    return ("cuda", None) if asked.startswith("cuda") or machine.has_cuda() else ("cpu", None)


def _split(settings: PlanSettings) -> Split:
    b = settings.backend
    return Split(
        backend=b.name, processes=b.processes, tensor=b.tensor_parallel, pipeline=b.pipeline_parallel, expert=b.expert_parallel
    )


def _precision(settings: PlanSettings, device: Device) -> Precision:
    """The base's format: quantised if asked, else the dtype; auto is bfloat16 where the device is fast in it."""
    if settings.model.quantize is not None:
        return settings.model.quantize
    if settings.model.dtype != "auto":
        return settings.model.dtype
    return machine.dtype_of_auto() or ("bfloat16" if device == "cuda" or machine.fast_bfloat16() else "float32")


def _need(settings: PlanSettings, shape: Shape, device: Device, split: Split) -> Need:
    adapter = adapters_of(settings, shape)

    def need(choice: Choice) -> Memory:
        setup = setup_of(settings, choice, device, machine.has_tiles())
        return memory_per_gpu(shape, adapter(choice.rank), setup, split, choice.accumulation)

    return need


def _nothing_fits(settings: PlanSettings, search: Found, need: Need) -> ConfigError:
    """The error, with what a quantised base would need if that is enough."""
    error, least = impossible(settings, search), search.least.choice
    for precision in ("int8", "nf4"):
        memory = need(replace(least, precision=precision))
        if settings.model.quantize is None and memory.total <= parse_size(settings.memory_budget or ""):
            return ConfigError(
                f"{error}. With model.quantize={precision} it would fit ({in_words(memory.total)}), not trainable here yet"
            )
    return error


def _budget(settings: PlanSettings, gpu: str | None) -> tuple[int | None, str]:
    if settings.memory_budget is not None:
        return parse_size(settings.memory_budget), f"memory_budget={settings.memory_budget}"
    return (machine.GPUS[gpu].memory, f"one {gpu}") if gpu else (None, "")


def _trainable(settings: PlanSettings) -> bool:
    return settings.model.quantize is None and settings.backend.name == "single"


def _speed(settings: PlanSettings, shape: Shape, choice: Choice, device: Device, split: Split, gpu: str | None) -> Speed | None:
    """Time of one optimizer step, on all devices together; None where no rate is known."""
    setup = setup_of(settings, choice, device, machine.has_tiles())
    share, measured = efficiency(shape, setup), None
    if gpu:
        rate, source = machine.GPUS[gpu].rate, f"{gpu}, maker's figure"
    else:
        measured, source = _measured(settings, shape, setup)
        if measured is None:
            return None
        rate = measured.rate
        share = 1.0 if isinstance(measured, RunRate) else share
    one = rate * share / flops_of(shape, adapters_of(settings, shape)(choice.rank), setup).step
    whole = one * split.processes / slowdown(split, choice.accumulation)
    tokens = setup.tokens * choice.accumulation * split.data
    return Speed(
        rate=rate, source=source, measured=measured, efficiency=share, tokens_per_second=whole, seconds_per_step=tokens / whole
    )


def _measured(settings: PlanSettings, shape: Shape, setup: Setup) -> tuple[Measurement | None, str]:
    """What is known best of this machine (plan/rates.py), and in words where it comes from: steps of
    runs of like size; else its matrix rate, measured now (a few seconds) where none is known or the
    known one is not to be trusted."""
    computed: Precision = setup.precision if setup.precision in TRAINABLE else "bfloat16"
    identity = machine.identity(setup.device, computed, settings.backend.threads)
    known, path = _known(identity), path_of(shape)
    quiet, fastest = (
        known.of_runs(shape.parameters, setup.tokens, path, quiet=only) for only in (True, False)
    )  # fmt: skip
    matrix, kept = known.matrix, ""
    if quiet is None and not known.trusted(setup.device):
        matrix, kept = _matrix(identity, setup.device, computed, settings.backend.threads, known)
    usual = 0.0 if matrix is None else matrix.rate * efficiency(shape, setup)
    if fastest is not None and (quiet is not None or fastest.rate > usual):
        return fastest, f"reached here by {fastest.words(f'steps of a run of {fastest.model}')}"
    return (None, "") if matrix is None else (matrix, f"measured here, the best of {matrix.words('products')}{kept}")


def _known(identity: rates.Identity) -> rates.Known:
    """What is known of this machine; nothing, for this plan alone, where it cannot be read now."""
    try:
        return rates.known(identity)
    except DiskError:
        return rates.Known()  # `keep_matrix` meets the same disk, and the plan then says that nothing was kept


def _matrix(
    identity: rates.Identity, device: Device, precision: Precision, threads: int | None, known: rates.Known
) -> tuple[Measurement | None, str]:
    """The matrix rate measured now and kept, in place of one that a run contradicts; and, if it could
    not be kept, why."""
    from lorry.train.resources.rate import matrix_rate

    measured = matrix_rate(device, precision, threads)
    if measured is None:
        return None, ""
    wrong = known.matrix is not None and any(rates.contradicts(run, known.matrix, device) for run in known.runs)
    try:
        return rates.keep_matrix(identity, measured, instead=wrong), ""
    except DiskError as error:
        return measured, f"; not kept: {error}"


def _notes(settings: PlanSettings, shape: Shape, found: ConfigFound, choice: Choice) -> list[str]:
    notes = []
    if not shape.native:
        notes.append(f"{shape.why}; it runs through transformers, more slowly, and these numbers are a rougher estimate")
    if shape.estimate:
        notes.append("this architecture is read as a Llama-like one")
    if shape.experts is not None:
        notes.append("experts are counted in the base; adapters sit on attention only, as the engine has it today")
    if settings.model.quantize is not None:
        notes.append(f"model.quantize={settings.model.quantize} is not trainable here yet")
    if settings.backend.name != "single":
        notes.append(f"backend={settings.backend.name} is not built yet: a plan that no run here has checked")
    if settings.data.max_length > shape.geometry.context:
        notes.append(f"max_length={settings.data.max_length} is beyond the model's context of {shape.geometry.context}")
    if found.adapter_rank is not None:
        notes.append(f"{settings.model.name} is an adapter of rank {choice.rank}; it would be trained further")
    return notes


# --- what a person sees


def show(plan: Plan, console: Console) -> None:
    """The table by component, the search if there was one, one line of verdict."""
    where = f"{plan.split.processes} GPUs ({plan.split.backend}), each" if plan.split.processes > 1 else plan.setup.device
    size = f"{plan.shape.parameters / 1e9:.2f}B" if plan.shape.parameters >= 1e9 else f"{plan.shape.parameters / 1e6:.0f}M"
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"{plan.model} ({size} parameters) on {where}: {plan.choice.words()}, up to {plan.setup.length} tokens a row")
    console.print(_memory_table(plan.memory))
    if plan.found is not None:
        console.print(_search_table(plan.found))
    for note in plan.notes:
        say(f"note: {note}")
    say(verdict(plan))


def _memory_table(memory: Memory) -> Table:
    table = Table("component", Column("bytes", justify="right"), "what")
    for c in memory.components:
        table.add_row(c.name, in_words(c.bytes), c.what)
    table.add_section()
    table.add_row("peak", in_words(memory.total), "")
    return table


def _search_table(found: Found) -> Table:
    """The choice made, and those that were preferred to it, the nearest last."""
    table = Table("choice, preferred first", Column("peak", justify="right"), "passes the budget at")
    if len(found.tried) > SHOWN:
        table.add_row(f"... {len(found.tried) - SHOWN} more do not fit", "", "")
    for tried in found.tried[-SHOWN:]:
        table.add_row(tried.choice.words(), in_words(tried.memory.total), tried.broke or "fits")
    return table


def verdict(plan: Plan) -> str:
    """One line: does it fit, and how fast it would run."""
    need = in_words(plan.memory.total)
    parts = [f"needs {need}"]
    if plan.budget is not None:
        parts = [f"{'fits' if plan.fits else 'does not fit'} {plan.budget_is}: {need} of {in_words(plan.budget)}"]
    if not plan.fits and plan.instead is not None:
        parts.append(f"would fit with {plan.instead.choice.words()}: {in_words(plan.instead.memory.total)}")
    if plan.speed is not None:
        s = plan.speed
        parts.append(
            f"about {s.tokens_per_second:,.0f} tokens/s, {_seconds(s.seconds_per_step)} a step "
            f"({plan.flops.step / 1e9:.2f} GFLOP/token at {_rate(s)}, {s.source})"
        )
    return "; ".join(parts)


def _rate(speed: Speed) -> str:
    """FLOP/s in words, with the share that a step is expected to reach unless steps reached it."""
    rate = f"{speed.rate / 1e12:.2f} TFLOP/s" if speed.rate >= 1e12 else f"{speed.rate / 1e9:.3g} GFLOP/s"
    return rate if speed.efficiency == 1 else f"{speed.efficiency:.0%} of {rate}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
