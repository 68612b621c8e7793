"""Unlearning methods by the name a user types, and one made for the adapters of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorry.tasks.unlearn.methods.ascent import KL, WGA, GradAscent, GradDiff, SatImp
from lorry.tasks.unlearn.methods.distribution import CEU, IHL, ME, UNDIAL, JensUn
from lorry.tasks.unlearn.methods.method import StartModel, UnlearnMethod
from lorry.tasks.unlearn.methods.preference import DPO, NPO, IdkAP, SimNPO
from lorry.tasks.unlearn.methods.primal_dual import PDU
from lorry.tasks.unlearn.methods.steering import RMU
from lorry.tasks.unlearn.settings import resolve_settings

METHOD_CLASSES: Mapping[str, type[UnlearnMethod]] = {
    "GradAscent": GradAscent,
    "GradDiff": GradDiff,
    "KL": KL,
    "NPO": NPO,
    "SimNPO": SimNPO,
    "DPO": DPO,
    "IdkDPO": DPO,
    "AltPO": DPO,
    "RMU": RMU,
    "UNDIAL": UNDIAL,
    "CEU": CEU,
    "WGA": WGA,
    "SatImp": SatImp,
    "PDU": PDU,
    "IHL": IHL,
    "ME": ME,
    "IdkAP": IdkAP,
    "JensUn": JensUn,
}


def make_method(
    name: str,
    job_settings: Sequence[Mapping[str, Any]],
    start: StartModel,
    *,
    direction_only: bool = False,
) -> UnlearnMethod:
    """A method for K adapters, ``job_settings`` those that each has of its own; ``direction_only``:
    see `UnlearnMethod`. Raises ConfigError: see `resolve_settings`.
    """
    settings = [resolve_settings(name, own) for own in job_settings]
    method = METHOD_CLASSES[name](settings, start)
    method.direction_only = direction_only
    return method
