"""How long a step takes on this machine or GPU, as far as its speed is known."""

from __future__ import annotations

from lorry.disk.durable import DiskError
from lorry.plan import machine, rates
from lorry.plan.flops import step_efficiencies, step_efficiency
from lorry.plan.memory import MemorySetup, layer_path
from lorry.plan.rates import RateMeasurement, RunRate
from lorry.plan.report import StepSpeed
from lorry.plan.shapes import ModelShape


def step_speed(
    threads: int | None,
    shape: ModelShape,
    setup: MemorySetup,
    tokens: int,
    flops: int,
    gpu: str | None,
    devices: float = 1.0,
) -> StepSpeed | None:
    """Time of one optimizer step of so many tokens and FLOPs in all, on ``devices`` together; None
    where no rate is known.
    """
    # a maker's or a matrix rate is what no step reaches; a run's own steps did reach theirs
    share, measured = step_efficiency(shape, setup), None
    if gpu:
        rate, source = machine.GPUS[gpu].rate, f"{gpu}, manufacturer's figure"
    else:
        measured, source = _best_measurement(threads, shape, setup)
        if measured is None:
            return None
        rate = measured.rate
        share = 1.0 if isinstance(measured, RunRate) else share
    seconds = flops / (rate * share * devices)
    return StepSpeed(
        rate=rate,
        source=source,
        measured=measured,
        efficiency=share,
        tokens_per_second=tokens / seconds,
        seconds_per_step=seconds,
    )


def _best_measurement(
    threads: int | None, shape: ModelShape, setup: MemorySetup
) -> tuple[RateMeasurement | None, str]:
    """What is known best of this machine (plan/rates.py), and in words where it comes from: steps
    of runs of like size; else its matrix rate, measured now (a few seconds) where none is known or
    the known one is not to be trusted."""
    identity = machine.machine_identity(setup.device, setup.dtype, threads)
    known, path = _known_rates(identity), layer_path(shape)
    # what a quiet machine reached is its speed; of a busy one the best is only a lower bound
    quiet, fastest = (
        known.of_runs(shape.parameters, setup.tokens, path, quiet=only) for only in (True, False)
    )  # fmt: skip
    matrix, not_kept = known.matrix, ""
    if quiet is None and not known.trusted(step_efficiencies(setup)):
        matrix, not_kept = _matrix_measurement(identity, setup, threads, known)
    usual = 0.0 if matrix is None else matrix.rate * step_efficiency(shape, setup)
    if fastest is not None and (quiet is not None or fastest.rate > usual):
        return fastest, f"measured here in {fastest.words(f'steps of a run of {fastest.model}')}"
    return (
        (None, "")
        if matrix is None
        else (matrix, f"measured here, the best of {matrix.words('products')}{not_kept}")
    )


def _known_rates(identity: rates.MachineIdentity) -> rates.KnownRates:
    """What is known of this machine; nothing, for this plan alone, where it cannot be read now."""
    try:
        return rates.read_known_rates(identity)
    except DiskError:
        # `keep_matrix_rate` meets the same disk, and the plan then says that nothing was kept
        return rates.KnownRates()


def _matrix_measurement(
    identity: rates.MachineIdentity,
    setup: MemorySetup,
    threads: int | None,
    known: rates.KnownRates,
) -> tuple[RateMeasurement | None, str]:
    """The matrix rate measured now and kept, in place of one that a run contradicts; and, if it
    could not be kept, why."""
    from lorry.train.resources.rate import measure_matrix_rate

    measured = measure_matrix_rate(setup.device, setup.dtype, threads)
    if measured is None:
        return None, ""
    wrong = known.matrix is not None and any(
        rates.contradicts_measurement(run, known.matrix, step_efficiencies(setup))
        for run in known.runs
    )
    try:
        return rates.keep_matrix_rate(identity, measured, instead=wrong), ""
    except DiskError as error:
        return measured, f"; not saved: {error}"
