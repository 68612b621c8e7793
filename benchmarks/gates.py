"""Gates: nothing is said of an engine's speed unless it computed what it was asked to.

The reference is PEFT in float32, given exactly the rows an engine had in its first step, one row at
a time, so that neither padding nor packing can hide anything. An engine passes when its first loss
is within LOSS_GAP of the reference's, the cosine of its whole first adapter gradient with the
reference's is above COSINE, their lengths agree within LENGTH_GAP, and no tensor's gradient is
zero. Rounding to bf16 alone brings the cosine close to COSINE, on some texts below it. So PEFT at
its default runs on the same rows as a control, an engine may be twice as far off as it, and one
that passed on that account only is said to have. Anchors train no adapter and are held to the loss
of the base alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from case import Row
from engines import clean, count, padded

if TYPE_CHECKING:
    from torch import Tensor

LOSS_GAP, COSINE, LENGTH_GAP = 0.005, 0.999, 0.03
REFERENCE = "reference"


def reference(
    folder: Path, rows: Sequence[Row], sets: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """For each set of row numbers: the loss with the adapter and without, in float32, and the
    control's cosine. The gradient goes to reference-N.safetensors."""
    import torch
    from safetensors.torch import save_file

    model, control = opened(folder, torch.float32), opened(folder, torch.bfloat16)
    found = []
    for number, chosen in enumerate(sets):
        mine = [rows[n] for n in chosen]
        loss, grads = one_by_one(model, mine)
        with torch.no_grad(), model.disable_adapter():
            base_loss = (
                sum(float(model(**padded([row])).loss) * count([row])[1] for row in mine)
                / count(mine)[1]
            )
        save_file(grads, folder / f"{REFERENCE}-{number}.safetensors")
        rounded = compare(one_by_one(control, mine)[1], grads)[0]["cosine"]
        found.append(
            {"rows": list(chosen), "loss": loss, "base_loss": base_loss, "control_cosine": rounded}
        )
    return found


def opened(folder: Path, dtype: Any) -> Any:
    """The base in this format with PEFT's adapter, which stays in fp32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    return PeftModel.from_pretrained(base, folder / "init", is_trainable=True)


def one_by_one(model: Any, rows: Sequence[Row]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss per supervised token and its gradient, a row at a time."""
    model.zero_grad()
    params = {clean(n): p for n, p in model.named_parameters() if p.requires_grad}
    total, sum_of_losses = count(rows)[1], 0.0
    for row in rows:
        loss = model(**padded([row])).loss * (count([row])[1] / total)
        loss.backward()
        sum_of_losses += loss.item()
    return sum_of_losses, {n: p.grad.float().clone() for n, p in params.items()}


def judge(
    run: Mapping[str, Any],
    truth: Mapping[str, Any],
    grads: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None,
) -> dict[str, Any]:
    """One engine's first step against the reference's. ``grads``: (theirs, the reference's), None
    for an anchor.

    Returns what was found, with ``refused``: why no speed may be shown, or None.
    """
    expected = truth["base_loss" if grads is None else "loss"]
    gap = abs(run["losses"][0] - expected) / expected
    found: dict[str, Any] = {"loss": run["losses"][0], "reference_loss": expected, "loss_gap": gap}
    found["control_cosine"] = truth["control_cosine"]
    reasons = (
        []
        if gap < LOSS_GAP
        else [
            f"the first loss is {run['losses'][0]:.4f}, {gap:.1%} off the reference's {expected:.4f}"
        ]
    )
    if not all(math.isfinite(loss) for loss in run["losses"]):
        reasons.append("a loss is not finite")
    if grads is not None:
        more, why = compare(*grads, least=allowed(truth["control_cosine"]))
        found |= more
        reasons += why
    return {**found, "refused": "; ".join(reasons) or None}


def allowed(control: float) -> float:
    """The cosine asked for, given what PEFT's default reaches in bf16 on the same rows."""
    return min(COSINE, 1 - 2 * (1 - control))


def let_through(verdicts: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The engines that passed although their cosine is not above COSINE, because the control's is
    close to it too.
    """
    return {
        e: v for e, v in verdicts.items() if not v["refused"] and v.get("cosine", 1.0) <= COSINE
    }


def compare(
    theirs: Mapping[str, Tensor], truth: Mapping[str, Tensor], least: float = COSINE
) -> tuple[dict[str, float], list[str]]:
    """Two gradients, name by name: how alike they are, and what is wrong with the first."""
    import torch

    if odd := sorted(set(truth) ^ set(theirs)):
        return {}, [
            f"{len(odd)} adapter tensors have a gradient on one side only, such as {odd[0]}"
        ]
    if dead := [n for n, g in theirs.items() if not g.any()]:
        return {}, [f"{len(dead)} adapter tensors have a gradient of zero, such as {dead[0]}"]
    a, b = (
        torch.cat([side[n].flatten().double() for n in sorted(truth)]) for side in (theirs, truth)
    )
    cosine, length = (
        float(torch.nn.functional.cosine_similarity(a, b, 0)),
        float(a.norm() / b.norm()),
    )
    worst = min(
        float(torch.nn.functional.cosine_similarity(theirs[n].flatten(), truth[n].flatten(), 0))
        for n in truth
    )
    reasons = (
        []
        if cosine > least
        else [
            f"the gradient's cosine with the reference's is {cosine:.5f}, {least:.5f} is asked for"
        ]
    )
    if not abs(length - 1) < LENGTH_GAP:
        reasons.append(f"the gradient is {length:.3f} times as long as the reference's")
    return {"cosine": cosine, "gradient_length": length, "worst_tensor_cosine": worst}, reasons


def judge_all(
    folder: Path,
    firsts: Mapping[str, Mapping[str, Any]],
    truths: Sequence[Mapping[str, Any]],
    anchors: set[str],
) -> dict[str, Any]:
    """The verdict on each engine's first run. ``truths``: what `reference` found, each for one set
    of rows.
    """
    from safetensors.torch import load_file

    verdicts = {}
    for engine, run in firsts.items():
        number = next(n for n, truth in enumerate(truths) if truth["rows"] == run["first_rows"])
        grads = None
        if engine not in anchors:
            grads = (
                load_file(folder / f"{engine}.safetensors"),
                load_file(folder / f"{REFERENCE}-{number}.safetensors"),
            )
        verdicts[engine] = judge(run, truths[number], grads)
    return verdicts


def first_sets(runs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The different sets of rows that engines had in their first step."""
    sets: list[list[int]] = []
    for run in runs:
        if run["first_rows"] not in sets:
            sets.append(run["first_rows"])
    return sets
