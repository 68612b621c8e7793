"""Does Lorry learn like PEFT? A few hundred losses against the band that three seeds of PEFT make.

A seed is an order of the rows and an initialisation of the adapter (B = 0, as training really
starts). Curves are running means over WINDOW steps. The band at a step runs from the lowest to the
highest of PEFT's three curves, widened on both sides by MARGIN of its mean width, since three seeds
seldom hold a fourth. Lorry, at the first seed, is inside if it is at every step. The paired
distance to PEFT's curve at the same seed is told too: it is the sharper test.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import measure
from case import Case, prepare_curve
from engines import fast_path
from turns import elsewhere, in_fresh_process

WINDOW, MARGIN, SEEDS, RATE = 20, 0.25, (1, 2, 3), 1e-3


def curve(model: str, length: int, steps: int, threads: int) -> dict[str, Any]:
    """Run it: three processes of PEFT, one of Lorry."""
    case = Case(
        kind="curve",
        model=model,
        length=length,
        threads=threads,
        learning_rate=RATE,
        warmup=1,
        steps=steps - 1,
    )
    kernels = fast_path()
    losses: dict[str, list[float]] = {}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as name:
            elsewhere(prepare_curve, Path(name), case, seed)
            for engine in ("peft", "lorry") if seed == SEEDS[0] else ("peft",):
                run = in_fresh_process(engine, Path(name), case)
                if "failed" in run:
                    raise SystemExit(f"{engine} failed: {run['failed']}")
                losses[f"{engine}-{seed}"] = run["losses"]
    found = judge(losses[f"lorry-{SEEDS[0]}"], [losses[f"peft-{seed}"] for seed in SEEDS])
    print(
        f"curve of {steps} steps of {length} tokens: {'inside' if found['inside'] else 'OUTSIDE'} PEFT's band; "
        f"at the same seed at most {found['paired']:.4f} apart, the band is {found['width']:.4f} wide"
    )
    return {
        "kind": "curve",
        "case": vars(case),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": measure.machine(),
        "kernels": kernels,
        "losses": losses,
        **found,
    }


def judge(ours: Sequence[float], theirs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """``theirs``: PEFT's losses per seed, the first at our seed. Mean width of the band, the
    largest paired distance, and whether we stay inside."""
    mine, *peers = (running_mean(losses) for losses in (ours, *theirs))
    bands = [(min(at), max(at)) for at in zip(*peers, strict=True)]
    width = sum(high - low for low, high in bands) / len(bands)
    slack = MARGIN * width
    inside = all(
        low - slack <= loss <= high + slack for loss, (low, high) in zip(mine, bands, strict=True)
    )
    paired = max(abs(a - b) for a, b in zip(mine, peers[0], strict=True))
    return {"inside": inside, "width": width, "paired": paired, "window": WINDOW, "margin": MARGIN}


def running_mean(losses: Sequence[float]) -> list[float]:
    """Means of the last WINDOW losses, from the first full window on."""
    window = min(WINDOW, len(losses))
    return [sum(losses[at - window : at]) / window for at in range(window, len(losses) + 1)]
