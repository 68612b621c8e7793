"""A record's file names what was measured where: no machine writes over another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import measure
import pytest
import records

from lorry import processor

AMD = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
flags\t\t: avx avx2 avx512f avx512_bf16
"""
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
# Studies of what models learn, whose pages and settings quote them by name.
STUDIES = {
    "instruct-cpu",
    "experts-small-cpu",
    "tofu-small-cpu",
    "variants-study-small-cpu",
}


@pytest.mark.parametrize(
    ("cpu", "slug"),
    [
        ("AMD EPYC, family 26, model 2 (avx512_bf16, avx512f, avx2)", "amd-26-2"),
        ("Intel(R) Xeon(R) Processor, family 6, model 207 (avx2)", "intel-6-207"),
        ("Intel(R) Xeon(R) Processor, model 207 (avx2)", "intel-6-207"),
        ("AMD EPYC, model 1 (avx2)", "amd-1"),
        ("aarch64, implementer 0x41, part 0xd40 (no flags known)", "aarch64-0x41-0xd40"),
        ("arm64 (no flags known)", "arm64"),
    ],
)
def test_a_processor_is_named_by_vendor_family_and_model(cpu: str, slug: str) -> None:
    assert records.processor_slug(cpu) == slug


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "name"),
    [
        (AMD, "x86_64", "AMD EPYC, family 26, model 2 (avx512_bf16, avx512f, avx2)"),
        (GRAVITON, "aarch64", "aarch64, implementer 0x41, part 0xd40 (no flags known)"),
    ],
)
def test_a_processor_is_named_as_linux_tells(
    cpuinfo: str, machine: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    monkeypatch.setattr(measure, "CPUINFO", file)
    monkeypatch.setattr(measure.platform, "machine", lambda: machine)
    assert measure.cpu_name() == name


def test_processors_and_sets_keep_records_beside_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    said = {"name": "avx2", "held": True, "bfloat16": False, "libraries": {}}
    monkeypatch.setattr(records, "described", lambda: said)
    places = [
        ("Intel(R) Xeon(R) Processor, family 6, model 207 (avx2)", "avx512_bf16"),
        ("AMD EPYC, family 26, model 2 (avx2)", "avx512_bf16"),
        ("AMD EPYC, family 26, model 2 (avx2)", "avx2"),
    ]
    kept = list[Path]()
    for cpu, isa in places:
        monkeypatch.setattr(records, "cpu_name", lambda cpu=cpu: cpu)
        monkeypatch.setattr(records, "isa_in_words", lambda isa=isa: isa)
        record = {"machine": {"cpu": cpu}, "isa": {**said, "name": isa}}
        kept.append(records.keep(record, "sft", "T512-r16-t1"))
        assert records.place_of(record) in kept[-1].stem
    assert [path.stem for path in kept] == [
        "sft-cpu-intel-6-207-avx512_bf16-T512-r16-t1",
        "sft-cpu-amd-26-2-avx512_bf16-T512-r16-t1",
        "sft-cpu-amd-26-2-avx2-T512-r16-t1",
    ]
    assert [json.loads(path.read_text())["machine"]["cpu"] for path in kept] == [
        cpu for cpu, _ in places
    ]
    # one that does not say what it was held to is told
    assert json.loads(records.keep({}, "plan").read_text()) == {"isa": said}
    assert records.keep({}, "plan", path=tmp_path / "mine.json") == tmp_path / "mine.json"


def committed() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in records.RESULTS.glob("*.json")}


def test_every_record_that_is_kept_says_where_it_was_measured_as_its_name_does() -> None:
    found = committed()
    assert found.keys() > STUDIES
    for name, record in found.items():
        assert record["machine"]["cpu"], name
        if name not in STUDIES:
            benchmark, place, case = name.partition(records.place_of(record))
            assert place, f"{name} is of {records.place_of(record)}"
            assert benchmark.endswith("-")
            assert not case or case.startswith("-")


def test_the_slug_of_this_machine_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what this system tells, whatever it is."""
    monkeypatch.delenv("LORRY_ISA", raising=False)
    name = records.record_path("sft", "T8").name
    assert name.startswith("sft-cpu-")
    assert name.endswith(f"-{processor.isa_in_words()}-T8.json")
    assert all(c.isalnum() or c in "-_." for c in name)
