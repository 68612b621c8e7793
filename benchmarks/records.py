"""What benchmarks keep: one JSON per benchmark, processor, instruction set and case, in
benchmarks/results/, so that no machine writes over what another one measured.

    sft-cpu-amd-26-2-avx512_bf16-T512-r16-t1.json      # AMD, family 26, model 2

Studies of what models learn keep theirs under a name of their own (study_page.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isa import LIBRARY_NAMES, described
from measure import cpu_name

from lorry.processor import isa_in_words

RESULTS = Path(__file__).parent / "results"
# What records that do not name their instruction set say of the processor, the best first.
SETS_BY_FLAG = {
    "amx_bf16": "amx",
    "avx512_bf16": "avx512_bf16",
    "avx512f": "avx512",
    "avx2": "avx2",
}
VENDORS = ("intel", "amd")
# Older records give a model and no family; Intel's processors of those years are all of one.
FAMILY_UNSAID = {"intel": "6"}
Record = Mapping[str, Any]


def keep(record: Record, benchmark: str, case: str = "", path: Path | None = None) -> Path:
    """Write a record, with the instruction set that it is of, under `record_path` or where it is asked
    to go; where that was.
    """
    path = path or record_path(benchmark, case)
    path.parent.mkdir(exist_ok=True)
    kept = record if "isa" in record else {**record, "isa": described()}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return path


def record_path(benchmark: str, case: str = "") -> Path:
    """Where this processor's record of a benchmark lies, with the instruction set of this process."""
    place = f"cpu-{processor_slug(cpu_name())}-{isa_in_words()}"
    return RESULTS / ("-".join(filter(None, (benchmark, place, case))) + ".json")


def place_of(record: Record) -> str:
    """What names a record's processor and instruction set in its file's name."""
    return f"cpu-{processor_slug(record['machine']['cpu'])}-{isa_of(record)}"


def place_in_words(record: Record) -> str:
    """The same in a title: ``avx512_bf16 on amd-26-2``."""
    return f"{isa_of(record)} on {processor_slug(record['machine']['cpu'])}"


def processor_slug(cpu: str) -> str:
    """Vendor, family and model of what `measure.cpu_name` says: ``amd-26-2``."""
    name = re.split(r", | \(", cpu.lower())[0]
    vendor = next((v for v in VENDORS if v in name), re.sub(r"[^a-z0-9_]+", "-", name))
    numbers = dict(re.findall(r", (family|model|implementer|part) (\w+)", cpu))
    if "model" in numbers and vendor in FAMILY_UNSAID:
        numbers = {"family": FAMILY_UNSAID[vendor], **numbers}
    return "-".join((vendor, *numbers.values()))


def isa_of(record: Record) -> str:
    """The instruction set that a record is of; one that does not name it had all of its processor."""
    if "isa" in record:
        return str(record["isa"]["name"])
    named = (name for flag, name in SETS_BY_FLAG.items() if flag in record["machine"]["cpu"])
    return next(named, "native")


def by_processor(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of one instruction set on one processor, by `place_of`, the best set first."""
    order = list(LIBRARY_NAMES)
    found = dict[str, list[Record]]()
    for record in sorted(
        records, key=lambda r: order.index(isa_of(r)) if isa_of(r) in order else -1
    ):
        found.setdefault(place_of(record), []).append(record)
    return found
