"""Unlearning speed and memory, side by side: Lorry with its start asked live and remembered, PEFT
with a copied reference, PEFT with its adapter switched off for it, and full weights.

    make bench-unlearn                                  # every method, float32 and bfloat16
    python benchmarks/unlearn.py --methods NPO KL --dtypes float32 --rounds 3

4 + 4 TOFU rows a step (the questions that come with Lorry where there is no data folder), rank 16;
every engine in a fresh process, in turns, from the same adapter, whose B is not zero. Nothing is said
of an engine's speed unless its first loss and adapter gradient are those of PEFT in float64, a row at
a time: in float32 within EXACT of its length and TERM_EXACT of the weaker term's (or twice as far
off as PEFT in float32), in bfloat16 as
gates.py has it. `lorry-sft` trains on the rows of
the same step: unlearning is to take at most 1.1 times its memory. One JSON per format goes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gates
import measure
import records
import turns
from case import IGNORED, MODEL, Row, chat_pairs, data_folder, json_lines, write_chat, write_rows
from engines import fast_path
from unlearners import (
    ALTERNATE,
    DIRECTION,
    FORGET,
    METHODS,
    RETAIN,
    UnlearnCase,
    lorry,
    lorry_sft,
    loss_terms,
    opened,
    plain,
    read_roles,
    rows_of_step,
)

if TYPE_CHECKING:
    from torch import Tensor
    from unlearners import RoleRows, Run

OURS = {"lorry-live": partial(lorry, "live"), "lorry-cached": partial(lorry, "cached")}
PEERS = {
    "peft-copy": partial(plain, "copy"),
    "peft-off": partial(plain, "off"),
    "full": partial(plain, "full"),
}
ENGINES: dict[str, Callable[[], Run]] = {**OURS, **PEERS, "lorry-sft": lorry_sft}
SAYS = {
    "lorry-live": "Lorry, the start asked with every batch",
    "lorry-cached": "Lorry, the start asked of each row once, before training",
    "peft-copy": "PEFT, a copy of the base as reference",
    "peft-off": "PEFT, its adapter switched off for the reference",
    "full": "full weights, a copy as reference",
    "lorry-sft": "Lorry, fine-tuning on the rows of the same step",
}
# asked for: (speed at least, memory at most) of Lorry's to a peer's, and memory to fine-tuning's
TARGETS, SFT_MEMORY = {"peft-copy": (3.0, 0.42), "peft-off": (2.5, 0.45)}, 1.1
SMALL_B = 0.02  # of what a random B would be: the policy is near its start, as it is in training
EXACT = 1e-3  # in float32: of the first loss, and the gradient's error to its length
TERM_EXACT = 0.01  # that error to the length of the weaker term's gradient: it could hide there


# --- a case


def prepare(folder: Path, case: UnlearnCase) -> None:
    """case.json, base/ (bf16), init/, RMU's direction, and rows by role, as Lorry's own data path
    encodes them."""
    from lorry.adapters.attach import attach, get_bank
    from lorry.adapters.peft.files import save_adapter
    from lorry.adapters.spec import LoraSpec
    from lorry.models.loading.load import load_model
    from lorry.models.loading.store import save_model
    from lorry.notes import ignore_note

    loaded = load_model(case.model, dtype="bfloat16", add_note=ignore_note)
    save_model(loaded.model, folder / "base", tokenizer=loaded.tokenizer)
    # above the layer that RMU steers nothing would train
    layers = tuple(range(case.layer + 1)) if case.method == "RMU" else None
    spec = LoraSpec(
        r=case.rank, lora_alpha=case.alpha, init_lora_weights=False, layers_to_transform=layers
    )
    attach(loaded.model, spec, seed=0)
    for name, values in get_bank(loaded.model)["default"].tensors().items():
        if name.endswith("lora_B"):
            values.data.mul_(SMALL_B)
    save_adapter(loaded.model, folder / "init")
    write_direction(folder, loaded.model.config["hidden_size"])
    for role, pairs in role_pairs(case).items():
        (folder / role).mkdir()
        write_rows(folder / role, encoded(folder / role, pairs, loaded.tokenizer, case))
    case.save(folder)


def write_direction(folder: Path, width: int) -> None:
    """The vector that RMU drives to, as Lorry draws it for seed 0."""
    from safetensors.torch import save_file

    from lorry.tasks.unlearn.methods.steering import steering_direction

    save_file({"direction": steering_direction(width, 0)}, folder / DIRECTION)


def role_pairs(case: UnlearnCase) -> dict[str, list[tuple[str, str]]]:
    """(question, answer) of all steps by role; an alternate is a refusal of Lorry's own."""
    from lorry.tasks.unlearn.alternates import read_refusals

    wanted, tofu = case.rows_per_step * case.all_steps, tofu_folder()
    if tofu is None:
        own = chat_pairs()
        found = {FORGET: own[::2], RETAIN: own[1::2]}
    else:
        files = {FORGET: "forget05.json", RETAIN: "retain90.json"}
        found = {
            role: [(row["question"], row["answer"]) for row in json_lines(tofu / name)]
            for role, name in files.items()
        }
    if case.method == "DPO":
        refusals = read_refusals(None)
        found[ALTERNATE] = [
            (asked, refusals[n % len(refusals)]) for n, (asked, _) in enumerate(found[FORGET])
        ]
    # what is used up begins again: speed does not mind
    return {role: (pairs * (1 + wanted // len(pairs)))[:wanted] for role, pairs in found.items()}


def tofu_folder() -> Path | None:
    """TOFU on disk, or None."""
    folder = data_folder()
    return folder / "tofu" if folder and (folder / "tofu" / "forget05.json").is_file() else None


def encoded(
    folder: Path, pairs: Sequence[tuple[str, str]], tokenizer: Any, case: UnlearnCase
) -> list[Row]:
    """Token ids, and labels where the answer is."""
    from lorry.data.encoding.encode import ExampleEncoder
    from lorry.data.encoding.token_set import TokenSet
    from lorry.data.reading.sources import open_source

    write_chat(folder / "chat.jsonl", pairs)
    encoder = ExampleEncoder(tokenizer, max_length=case.length)
    tokens = TokenSet.build(open_source(str(folder / "chat.jsonl")), encoder)
    if len(tokens) != len(pairs):
        raise SystemExit(f"{len(pairs)} rows were written and {len(tokens)} can be used")
    examples = [tokens.example(number) for number in range(len(tokens))]
    return [
        (
            list(e.tokens),
            [t if w else IGNORED for t, w in zip(e.tokens, e.weights, strict=True)],
        )
        for e in examples
    ]


# --- gates


def truth(folder: Path, case: UnlearnCase) -> dict[str, Any]:
    """PEFT's first step a row at a time, in float64 (gradient: reference.safetensors): the loss, that
    of the start alone, each term's part of the gradient; and how far PEFT in the case's own format is off."""
    from safetensors.torch import save_file

    whole = rows_of_step(case, read_roles(folder), 0)
    losses, terms = one_by_one(folder, case, whole, "float64")
    gradient = added(terms)
    save_file(gradient, folder / f"{gates.REFERENCE}.safetensors")
    found = {
        "loss": sum(losses.values()),
        "parts": {term: length(own) / length(gradient) for term, own in terms.items()},
    }
    start = opened(folder, case, "full", "float64")
    import torch

    with torch.no_grad():
        found["base_loss"] = sum(
            float(part())
            for rows in row_by_row(whole)
            for part in loss_terms(start, rows, whole).values()
        )
    rounded = added(one_by_one(folder, case, whole, case.dtype)[1])
    found["control_cosine"] = gates.compare(rounded, gradient)[0]["cosine"]
    found["control_error"] = relative_error(rounded, gradient)
    return found


def row_by_row(whole: RoleRows) -> Iterator[RoleRows]:
    """A step's rows, one of each role at a time."""
    for place in range(len(whole[FORGET])):
        yield {role: [rows[place]] for role, rows in whole.items()}


def one_by_one(
    folder: Path, case: UnlearnCase, whole: RoleRows, dtype: str
) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
    """({term: loss}, {term: gradient by tensor}) of PEFT, without padding."""
    from engines import clean

    peer = opened(folder, case, "copy", dtype)
    params = {clean(n): p for n, p in peer.model.named_parameters() if p.requires_grad}
    losses: dict[str, float] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    for term in (FORGET, RETAIN):
        losses[term] = 0.0
        for rows in row_by_row(whole):
            loss = loss_terms(peer, rows, whole)[term]()
            loss.backward()
            losses[term] += loss.item()
        gradients[term] = {
            n: (p.new_zeros(p.shape) if p.grad is None else p.grad).float().clone()
            for n, p in params.items()
        }
        peer.model.zero_grad()
    return losses, gradients


def added(terms: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The gradient of the terms' sum."""
    first, second = terms.values()
    return {name: values + second[name] for name, values in first.items()}


def length(gradient: Mapping[str, Tensor]) -> float:
    """Of the whole gradient."""
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))


def relative_error(theirs: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Length of the difference over that of what is right."""
    return length({n: theirs[n] - right[n] for n in right}) / length(right)


def judge(
    folder: Path,
    case: UnlearnCase,
    engine: str,
    run: Mapping[str, Any],
    expected: Mapping[str, Any],
) -> dict[str, Any]:
    """What was found of an engine's first step, with ``refused``: why nothing may be said of its
    speed, or None. Full weights have no adapter and are held to the start's loss alone; fine-tuning
    computes something else and has gates of its own in sft.py."""
    from safetensors.torch import load_file

    loss = run["losses"][0]
    if engine == "lorry-sft":
        return {"loss": loss, "refused": None if math.isfinite(loss) else "a loss is not finite"}
    exact = case.dtype == "float32"
    wanted = expected["base_loss" if engine == "full" else "loss"]
    gap = abs(loss - wanted) / abs(wanted)
    found: dict[str, Any] = {"loss": loss, "reference_loss": wanted, "loss_gap": gap}
    reasons = []
    if not gap < (EXACT if exact else gates.LOSS_GAP):
        reasons.append(f"the first loss is {loss:.5f}, the reference's {wanted:.5f}")
    if not all(math.isfinite(each) for each in run["losses"]):
        reasons.append("a loss is not finite")
    if engine != "full":
        theirs = load_file(folder / f"{engine}.safetensors")
        right = load_file(folder / f"{gates.REFERENCE}.safetensors")
        least = gates.COSINE if exact else gates.allowed(expected["control_cosine"])
        more, why = gates.compare(theirs, right, least)
        found, reasons = found | more, reasons + why
        if more:
            error = relative_error(theirs, right)
            found["gradient_error"] = error
            weakest = min(expected["parts"], key=expected["parts"].get)
            # float32 itself may be further off: PEFT's is by 4e-4 on SmolLM2 with NPO
            least_bound = max(
                TERM_EXACT * expected["parts"][weakest], 2 * expected["control_error"]
            )
            most = min(EXACT, least_bound)
            if exact and not error < most:
                reasons.append(
                    f"the gradient is {error:.1e} of its length off the reference's; {most:.1e} is "
                    f"asked for, or a wrong {weakest} term would not show"
                )
    return {**found, "refused": "; ".join(reasons) or None}


# --- engines in turns


def work(engine: str, folder: Path) -> dict[str, Any]:
    """One engine in this process, from its imports on."""
    import torch

    case, rows = UnlearnCase.load(folder), read_roles(folder)
    torch.set_num_threads(case.threads)
    if engine == gates.REFERENCE:
        return truth(folder, case)
    run = ENGINES[engine]()
    every = [row for own in rows.values() for row in own]
    watch = measure.Watch(folder, engine, {tuple(ids): n for n, (ids, _) in enumerate(every)})
    imports = measure.rss()
    more = run(folder, case, rows, watch)
    peak = measure.peak_rss()
    timed = slice(case.warmup, None)
    return {
        "engine": engine,
        "losses": watch.losses,
        "first_rows": sorted(watch.first_rows),
        "wall": watch.wall[timed],
        "cpu": watch.cpu[timed],
        "tokens": watch.tokens[timed],
        "loaded_bytes": watch.loaded_bytes - imports,
        "memory_bytes": peak - imports,
        "threads": torch.get_num_threads(),
        **more,
    }


def contest(folder: Path, case: UnlearnCase, engines: Sequence[str], rounds: int) -> dict[str, Any]:
    """A method in one format: runs, gates, and what is left of both in a table."""
    runs, failed = list[dict[str, Any]](), dict[str, str]()
    expected = turns.in_fresh_process(gates.REFERENCE, folder, case, __file__)
    if "failed" in expected:
        raise SystemExit(f"the reference failed: {expected['failed']}")
    for number in range(rounds):
        for engine in (e for e in engines if e not in failed):
            run = turns.in_fresh_process(engine, folder, case, __file__)
            if "failed" in run:
                failed[engine] = run["failed"]
                continue
            runs.append({"round": number, **run})
            told = f"{case.method} {case.dtype}, round {number + 1} of {rounds}, {engine}"
            print(f"  {told}: {sum(run['wall']):.1f} s", file=sys.stderr, flush=True)
    firsts = {run["engine"]: run for run in runs if run["round"] == 0}
    verdicts = {e: judge(folder, case, e, run, expected) for e, run in firsts.items()}
    refused = failed | {e: v["refused"] for e, v in verdicts.items() if v["refused"]}
    return {
        "reference": expected,
        "gates": verdicts,
        "refused": refused,
        "table": table([run for run in runs if run["engine"] not in refused], case),
        "runs": runs,
    }


def table(runs: Sequence[Mapping[str, Any]], case: UnlearnCase) -> dict[str, dict[str, Any]]:
    """Per engine: speed, memory, and Lorry's over it, round by round, then the median round."""
    found = dict[str, dict[str, Any]]()
    for engine in dict.fromkeys(run["engine"] for run in runs):
        mine = [run for run in runs if run["engine"] == engine]
        found[engine] = {
            "seconds_per_step": statistics.median(s for run in mine for s in run["wall"]),
            "tokens_per_second": statistics.median(turns.speed(r, "wall", case.kind) for r in mine),
            "tokens_per_cpu_second": statistics.median(
                turns.speed(r, "cpu", case.kind) for r in mine
            ),
            "memory_bytes": statistics.median(run["memory_bytes"] for run in mine),
            **{our: turns.ratios(runs, our, engine, case.kind) for our in OURS},
        }
    return found


def record_of(
    methods: Mapping[str, Mapping[str, Any]], case: UnlearnCase, rounds: int
) -> dict[str, Any]:
    """All methods in one format, with the columns and rows that docs/results.md shows."""
    runs = [run for one in methods.values() for run in one["runs"]]
    highest = max((load for run in runs for load in run["load"]), default=0.0)
    machine, clean = measure.machine(), highest <= (os.cpu_count() or 1)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    hardware = any(flag in machine["cpu"] for flag in ("amx_bf16", "avx512_bf16"))
    text = [
        f"{case.rows_per_step} + {case.rows_per_step} rows a step "
        f"({'TOFU' if tofu_folder() else 'the questions that come with Lorry'}), {case.model}, "
        f"rank {case.rank}, {case.dtype}, {case.threads} thread{'s' if case.threads > 1 else ''}; "
        f"every engine in {rounds} fresh processes of {case.steps} timed steps. {machine['cpu']}, "
        f"{machine['cores']} cores. First gradients are those of PEFT in float64 "
        "(`benchmarks/unlearn.py`)."
    ]
    if case.dtype == "bfloat16" and not hardware:
        text.append("This machine has no bfloat16 arithmetic: speeds say nothing of one that has.")
    if not clean:
        text.append(
            f"**Not clean**: the load went up to {highest:.1f} on {machine['cores']} cores while "
            "this was measured; times are not those of a quiet machine."
        )
    text += [
        f"Refused: {name}, {SAYS[engine]}: {reason}."
        for name, one in methods.items()
        for engine, reason in one["refused"].items()
    ]
    return {
        "title": f"Unlearning, {case.dtype}",
        "text": "\n".join(text),
        "columns": [
            "method", "engine", "tokens/s", "s/step", "memory GiB", "Lorry's speed, live",
            "memory", "Lorry's speed, cached", "memory",
        ],
        "rows": [
            [name, SAYS[engine], *cells(row, engine)]
            for name, one in methods.items()
            for engine, row in one["table"].items()
        ],
        "case": vars(case),
        "rounds": rounds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine,
        "kernels": fast_path(),
        "highest_load": highest,
        "clean": clean,
        "targets": targets(methods),
        "methods": methods,
    }  # fmt: skip


def cells(row: Mapping[str, Any], engine: str) -> list[str]:
    """A line of the table after its method and engine. Fine-tuning is compared by memory alone."""
    shown = [f"{row['tokens_per_second']:.0f}", f"{row['seconds_per_step']:.2f}"]
    shown.append(f"{row['memory_bytes'] / 2**30:.2f}")
    for our in OURS:
        against = None if engine in OURS else row[our]
        speed = against and engine != "lorry-sft"
        shown.append(f"{against['speed']:.2f}x" if speed else "")
        shown.append(f"{against['memory']:.2f}x" if against else "")
    return shown


def targets(methods: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for and what came out, met or not."""
    found = []
    for name, one in methods.items():
        for our in (o for o in OURS if o in one["table"]):
            for peer, (fast, lean) in TARGETS.items() if name == "NPO" else ():
                if against := one["table"].get(peer, {}).get(our):
                    goal = {"method": name, "engine": our, "against": peer}
                    found.append({
                        **goal, "what": "speed", "at_least": fast, "measured": against["speed"],
                        "met": against["speed"] >= fast,
                    })  # fmt: skip
                    found.append({
                        **goal, "what": "memory", "at_most": lean, "measured": against["memory"],
                        "met": against["memory"] <= lean,
                    })  # fmt: skip
            if against := one["table"].get("lorry-sft", {}).get(our):
                found.append({
                    "method": name, "engine": our, "against": "lorry-sft", "what": "memory",
                    "at_most": SFT_MEMORY, "measured": against["memory"],
                    "met": against["memory"] <= SFT_MEMORY,
                })  # fmt: skip
    return found


def engines_of(method: str, wanted: Sequence[str]) -> list[str]:
    """Those of ``wanted`` that say something: an adapter that trains up to RMU's layer is not what
    fine-tuning trains, and EMBED is there for its memory."""
    left_out = {"RMU": {"lorry-sft"}, "EMBED": {"peft-off", "full"}}
    return [e for e in wanted if e not in left_out.get(method, set())]


def show(record: Mapping[str, Any]) -> None:
    """For a person."""
    print(f"{record['title']}: {record['text']}")
    for row in record["rows"]:
        method, engine, *rest = row
        print(f"  {method:6s} {engine:55s} " + "  ".join(f"{cell:>8s}" for cell in rest))
    for goal in record["targets"]:
        bound = f">= {goal['at_least']}" if "at_least" in goal else f"<= {goal['at_most']}"
        print(
            f"  {goal['method']} {goal['engine']}: {goal['what']} to {goal['against']} "
            f"{goal['measured']:.2f} ({bound}: {'met' if goal['met'] else 'NOT MET'})"
        )


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """What can be chosen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rows", type=int, default=4, help="rows to forget a step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--no-keep", action="store_true", help="print only")
    args = parser.parse_args(argv)
    if args.warmup < 1:
        parser.error("--warmup must be at least 1: the first step also writes gradients")
    return args


def main() -> int:
    args = arguments()
    fast_path()
    bad = False
    for dtype in args.dtypes:
        case = UnlearnCase(
            model=args.model, rank=args.rank, alpha=2 * args.rank, dtype=dtype,
            rows_per_step=args.rows, steps=args.steps, warmup=args.warmup, threads=args.threads,
        )  # fmt: skip
        methods = dict[str, dict[str, Any]]()
        for method in args.methods:
            own = replace(case, method=method)
            with tempfile.TemporaryDirectory() as name:
                turns.elsewhere(prepare, Path(name), own)
                engines = engines_of(method, args.engines)
                methods[method] = contest(Path(name), own, engines, args.rounds)
        record = record_of(methods, case, args.rounds)
        show(record)
        bad |= any(one["refused"] for one in methods.values())
        if not args.no_keep:
            # some methods alone are no successor of a record of all
            some = "" if set(args.methods) == set(METHODS) else "-".join(["", *args.methods])
            shape = f"{dtype}-r{args.rank}-t{args.threads}"
            print(f"  kept in {records.keep(record, f'unlearn{some}', shape)}")
    return int(bad)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in (*ENGINES, gates.REFERENCE):
        print(json.dumps(work(sys.argv[1], Path(sys.argv[2]))))
    else:
        sys.exit(main())
