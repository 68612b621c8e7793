"""docs/scaling.md is what its command makes, and sending times are bytes over the rates it states.
Plans of GPUs: nothing hangs on this machine.
"""

from __future__ import annotations

import pytest
import scaling

from lorry.plan.parallel.communication import Collective


def test_the_page_is_what_the_command_makes() -> None:
    page, tables = scaling.PAGE.read_text(), scaling.made()
    assert scaling.with_tables(page, tables) == page
    changed = page.replace("| 8 | `backend=ddp` | 8 | 1", "| 8 | `backend=ddp` | 8 | 2")
    assert changed != page
    assert scaling.with_tables(changed, tables) == page


@pytest.mark.parametrize(
    ("ranks", "span", "rate"),
    [
        (8, 8, 450e9),  # in a machine
        (64, 64, 400e9),  # all eight GPUs of each: eight network adapters
        (16, 128, 50e9),  # one GPU of each, beside seven groups like it
        (32, 64, 200e9),  # every second
        (4, 64, 50e9),  # one in every second machine
    ],
)
def test_a_group_has_a_network_adapter_for_each_gpu_in_a_machine(
    ranks: int, span: int, rate: float
) -> None:
    assert scaling.rate_of(Collective("", "all-gather", ranks, span, 1, 1)) == rate
