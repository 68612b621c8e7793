"""Memory that is not there, however an allocator says so, is one clear error."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import lorry
from lorry import cli, errors
from lorry.adapters.attach import attach
from lorry.adapters.spec import LoraSpec
from lorry.errors import DataError, OutOfMemoryError, allocation_failure, explain_out_of_memory
from tests.support.tiny import LLAMA, random_model

HUGE = 1 << 50  # a petabyte


def torch_refuses() -> None:
    torch.empty(HUGE, dtype=torch.uint8)


def numpy_refuses() -> None:
    np.empty(HUGE, dtype=np.uint8)


def python_refuses() -> None:
    bytearray(HUGE)


def no_number_for_it() -> None:
    torch.empty((1 << 62, 1 << 62))


@pytest.mark.parametrize("ask", [torch_refuses, numpy_refuses, python_refuses, no_number_for_it])
def test_real_allocators_are_understood(ask: object) -> None:
    assert callable(ask)
    wanted = pytest.raises(
        OutOfMemoryError, match=r"^out of memory: could not allocate .+\. Take less$"
    )
    with wanted, explain_out_of_memory("Take less"):
        ask()


@pytest.mark.parametrize(
    ("error", "large"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to "
                      "allocate 2147483648 bytes. Error code 12 (Cannot allocate memory)"), "2.00 GiB in one piece"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a"), "2.50 GiB in one piece"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "what the next step needs"),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)  # fmt: skip
def test_what_is_about_memory_and_what_is_not(error: Exception, large: str | None) -> None:
    assert allocation_failure(error) == large


def test_other_errors_pass() -> None:
    for error in (
        DataError("rows.jsonl:1: out of memory is a text here"),
        RuntimeError("shapes"),
        OSError(errno.EIO, "disk"),
    ):
        with pytest.raises(type(error)) as caught, explain_out_of_memory(""):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("rank", [1_000_000_000, 2**40])  # 10 TB and more even here
def test_an_adapter_that_cannot_fit_is_refused_before_it_is_made(rank: int) -> None:
    model = random_model(LLAMA)
    with pytest.raises(
        OutOfMemoryError, match=rf"r={rank} has [\d,]+ values, [\d,.]+ GiB with their gradients"
    ):
        attach(model, LoraSpec(r=rank))
    assert lorry.lora_parameters(model) == []


def test_the_command_line_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorry.verbs import doctor

    monkeypatch.setattr(doctor, "main", lambda settings: torch_refuses())
    assert cli.main(["doctor"]) == 71
    assert capsys.readouterr().err.startswith(
        "error: out of memory: could not allocate 1048576.00 GiB in one piece. Close other programs"
    )


def test_the_page_that_an_error_names_has_that_section() -> None:
    """Anchors as Markdown makes them of headings: small letters, words joined by hyphens."""
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.LorryError)
    ]
    named = {kind.docs for kind in kinds if kind.docs}
    assert "data.md" in named
    for link in named:
        page, _, section = link.partition("#")
        text = (Path(__file__).resolve().parent.parent / "docs" / page).read_text()
        headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
        anchors = {
            re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings
        }
        assert not section or section in anchors, link
