"""Rows of the benchmarks of unlearning by name: where ``tofu:forget10`` lies, here or on the hub.

    locate_split("tofu:retain95", {"tofu": "data/tofu"})    # the first 3,800 rows of full.json

| name | local.SUITE=FOLDER | without it, on the hub |
|---|---|---|
| tofu:SPLIT | SPLIT.json, or a part of a split that is there | locuslab/TOFU, holdouts too |
| muse:CORPUS/KIND/SPLIT | CORPUS/KIND/SPLIT.json, as muse_bench writes | muse-bench/MUSE-CORPUS |
| wmdp:NAME | NAME.jsonl | nothing: the corpora are given out on request |

**A split that is not on disk is derived from one that is**, since TOFU's are parts of each other:
retainNN is the beginning of full, forgetNN the end of full or of a larger forget split. What it is
derived from must have as many rows as the published one, or rows to forget would be among those to
retain without a word. A holdout (rows that were never trained on) is not part of full: where there
is none, the rows of forget10 just before forgetNN stand in, with a note, since they are a holdout of
a start that was trained on retain90 and forgetNN alone and of no other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lorry.data.reading.rows import DataRow, FileRemark, RowFault, RowStream
from lorry.errors import ConfigError, DataError, suggest_nearest

TOFU, MUSE, WMDP = "tofu", "muse", "wmdp"
SPLIT_NAME = re.compile(rf"({TOFU}|{MUSE}|{WMDP}):(.+)", re.DOTALL)
TOFU_HUB = "locuslab/TOFU"
# 200 authors of 20 rows; the forget splits are ends of full, the retain splits what is before them
FULL_ROWS = {"full": 4000}
FORGET_ROWS = {"forget01": 40, "forget05": 200, "forget10": 400}
RETAIN_ROWS = {"retain99": 3960, "retain95": 3800, "retain90": 3600}
PERTURBED = "_perturbed"
FILE_KINDS = (".json", ".jsonl", ".parquet", "")  # the last: a folder
MUSE_CORPORA = ("News", "Books")
MUSE_KINDS = ("raw", "knowmem", "verbmem", "privleak", "scal", "sust", "train")
# what open-unlearning reads as one text (data/encoding/joined.py); the other kinds are asked one by one
JOINED_NAME = re.compile(rf"{MUSE}:[^/]+/(raw|scal|sust|train)/.+|{WMDP}:.+-corpus", re.DOTALL)
MUSE_TRAIN_HUB = "tamarsonha/MUSE-{}-Train"  # what the published targets were trained on


@dataclass(frozen=True)
class SplitLocation:
    """Where the rows of a split are: a file, a folder or a hub data set (``path``, ``config`` and
    ``split``); ``rows`` of it, where the split is a part of what lies there, which must then have
    ``whole`` rows; ``note``: what to know of them, or ""; ``joined``: whether its rows are texts that
    are read as one.
    """

    path: str
    config: str | None = None
    split: str = "train"
    rows: slice | None = None
    whole: int = 0
    note: str = ""
    joined: bool = False


def is_split_name(text: str) -> bool:
    """Whether a source is named as ``SUITE:SPLIT``."""
    return SPLIT_NAME.fullmatch(text) is not None


def locate_split(text: str, local: Mapping[str, str]) -> SplitLocation:
    """Where the rows of ``SUITE:SPLIT`` are. ``local``: {SUITE: folder, SUITE.SPLIT: file}. Raises
    ConfigError for a split that neither is there nor can be derived.
    """
    match = SPLIT_NAME.fullmatch(text)
    assert match is not None
    suite, name = match.groups()
    if suite == TOFU:
        return _locate_tofu(name, local)
    place = _locate_muse(name, local) if suite == MUSE else _locate_wmdp(name, local)
    return replace(place, joined=JOINED_NAME.fullmatch(text) is not None)


def local_split_path(suite: str, name: str, local: Mapping[str, str]) -> str | None:
    """Where a split lies as a file or folder of its own; None where it does not. Raises ConfigError
    for a folder that is not there.
    """
    if f"{suite}.{name}" in local:
        return local[f"{suite}.{name}"]
    if suite not in local:
        return None
    folder = Path(local[suite]).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"local.{suite}={local[suite]} is not a folder; give the one that holds "
            f"the splits of {suite.upper()}"
        )
    candidates = (folder / f"{name}{kind}" for kind in FILE_KINDS)
    return next((str(path) for path in candidates if path.exists()), None)


def part_of_stream(stream: RowStream, location: SplitLocation, name: str) -> RowStream:
    """The rows of a split that is a part of ``stream``, by their number (a row that cannot be read
    has one, too). Raises DataError where the whole has another number of rows than it should.
    """
    assert location.rows is not None
    numbered = list[DataRow | RowFault]()
    for item in stream:
        if isinstance(item, FileRemark):
            yield item
        else:
            numbered.append(item)
    if len(numbered) != location.whole:
        raise DataError(
            f"{location.path}: has {len(numbered):,} rows and the published split "
            f"{location.whole:,}, so {name} is not a part of it; give "
            f"local.{name.replace(':', '.')}=FILE"
        )
    if location.note:
        yield FileRemark(location.note)
    yield from numbered[location.rows]


def _locate_tofu(name: str, local: Mapping[str, str]) -> SplitLocation:
    if (path := local_split_path(TOFU, name, local)) is not None:
        return SplitLocation(path)
    if TOFU not in local and not name.startswith("holdout"):
        return SplitLocation(TOFU_HUB, name)
    if (derived := _derive_tofu(name, local)) is not None:
        return derived
    # a holdout is published, too, but a file that is here (local.tofu.forget10=FILE) goes before
    if TOFU not in local:
        return SplitLocation(TOFU_HUB, name)
    if name.startswith("holdout"):
        raise ConfigError(
            f"no {name}: membership (mia_*, privleak) needs holdout rows, which "
            f"were never trained on; give local.tofu.{name}=FILE, or choose other "
            "metrics"
        )
    known = [*FULL_ROWS, *FORGET_ROWS, *RETAIN_ROWS]
    raise ConfigError(
        f"local.tofu={local[TOFU]} has no {name}.json, and no file to derive it "
        f"from{suggest_nearest(name, known)}; give local.tofu.{name}=FILE"
    )


def _derive_tofu(name: str, local: Mapping[str, str]) -> SplitLocation | None:
    """A part of a split that is there; None where there is none."""
    stem, kind = name.removesuffix(PERTURBED), PERTURBED if name.endswith(PERTURBED) else ""
    if stem in FORGET_ROWS:
        rows = FORGET_ROWS[stem]
        larger = {split: count for split, count in FORGET_ROWS.items() if count > rows}
        for whole, count in (FULL_ROWS | dict(reversed(larger.items()))).items():
            if (path := local_split_path(TOFU, whole + kind, local)) is not None:
                return SplitLocation(path, rows=slice(-rows, None), whole=count)
    full = local_split_path(TOFU, "full", local)
    if stem in RETAIN_ROWS and not kind and full is not None:
        return SplitLocation(full, rows=slice(RETAIN_ROWS[stem]), whole=FULL_ROWS["full"])
    if stem not in ("holdout01", "holdout05"):  # forget10 has nothing beside itself
        return None
    if (path := local_split_path(TOFU, "forget10", local)) is None:
        return None
    forget = stem.replace("holdout", "forget")
    rows = FORGET_ROWS[forget]
    note = (
        f"no {stem} on disk: the {rows} rows of forget10 before {forget} are used "
        "instead; they are a holdout set only for a model that was not trained on "
        "them (TOFU's own full models were)"
    )
    return SplitLocation(
        path, rows=slice(-2 * rows, -rows), whole=FORGET_ROWS["forget10"], note=note
    )


def _locate_muse(name: str, local: Mapping[str, str]) -> SplitLocation:
    corpus, _, rest = name.partition("/")
    kind, _, split = rest.partition("/")
    if corpus not in MUSE_CORPORA or kind not in MUSE_KINDS or not split or "/" in split:
        raise ConfigError(
            f"muse:{name}: MUSE's rows are named muse:CORPUS/KIND/SPLIT, such as muse:News/raw/forget; CORPUS is "
            f"{' or '.join(MUSE_CORPORA)}, KIND one of {', '.join(MUSE_KINDS)}"
        )
    for place in (name, f"{corpus.lower()}/{rest}"):  # as the hub has it; as muse_bench writes it
        if (path := local_split_path(MUSE, place, local)) is not None:
            return SplitLocation(path)
    if MUSE in local:
        raise ConfigError(
            f"local.muse={local[MUSE]} has no {name}.json; muse_bench writes CORPUS/KIND/SPLIT.json"
        )
    if kind == "train":
        return SplitLocation(MUSE_TRAIN_HUB.format(corpus), split=split)
    return SplitLocation(f"muse-bench/MUSE-{corpus}", kind, split)


def _locate_wmdp(name: str, local: Mapping[str, str]) -> SplitLocation:
    if (path := local_split_path(WMDP, name, local)) is not None:
        return SplitLocation(path)
    where = f"local.wmdp={local[WMDP]} has no {name}.jsonl" if WMDP in local else f"no wmdp:{name}"
    raise ConfigError(
        f"{where}: WMDP's corpora are available on request, not on the open hub; "
        "give local.wmdp=FOLDER that holds cyber-forget-corpus.jsonl and the others"
    )
