"""Generation of one row, of a few and of 32, and the reading of a prompt: what share of the rate at which
memory is read it reaches, and beside llama.cpp.

    python benchmarks/generate.py --few-rows
    python benchmarks/generate.py --few-rows --rounds 5 --threads 2

Weights in bfloat16, float32, int8, NF4 and the GGUF file's own Q4_1; rows of one prompt, greedy, alike,
without an adapter; 8 and 32 rows also with eight adapters in turn; and a prompt of about 1,024 tokens. A step
is timed in CPU seconds: those of many tokens less those of reading the prompt. Beside it, in the same process,
what it takes to read once every byte that a step reads of the weights (`sum_words` of the kernels). llama.cpp
(xllamacpp, where it is installed) answers the same prompts, one and 32 at a time, from the same file, or one of
as many bits that is written here; engines take turns in fresh processes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measure
from generators import MODEL

PROMPT = "Tell me about the city of Kyoto and what to see there in two days, please, in detail."
LONG = PROMPT * 54
NEW, READS, ADAPTERS = 64, 5, 8
# in place of rows: the long prompt alone is read, for its first new token
PROMPT_ALONE = 0
# of ours: how the base is held, in what it computes, rows, adapters
CASES = [
    *(
        (held, rows, 0)
        for held in ("bf16", "float32", "int8", "nf4", "q4_1")
        for rows in (1, 4, 32, PROMPT_ALONE)
    ),
    *(
        (held, rows, count)
        for held in ("bf16", "float32")
        for rows, count in ((8, 0), (8, ADAPTERS))
    ),
    ("bf16", 32, ADAPTERS),
    ("float32", 32, ADAPTERS),
]
# what llama.cpp answers from, by how ours is held: as many bits
LLAMA = {"bf16": "bf16", "int8": "q8_0", "q4_1": "q4_1"}


def prepare(folder: Path) -> None:
    """Write what llama.cpp answers from."""
    from lorry.config.schema.model import ModelConfig
    from lorry.models.gguf.embedded import find_embedded_file
    from lorry.models.loading.open import open_model
    from lorry.notes import ignore_note
    from lorry.verbs.exports.gguf import export_gguf

    embedded = find_embedded_file(MODEL)
    assert embedded is not None
    (folder / "q4_1.gguf").symlink_to(embedded)
    for outtype in ("bf16", "q8_0"):
        opened = open_model(ModelConfig(name=MODEL, dtype="bfloat16"), add_note=ignore_note)
        file = export_gguf(opened, {}, folder / outtype, outtype)
        (folder / f"{outtype}.gguf").symlink_to(file)


def seconds_of(answer: Callable[[int], object], new: int) -> float:
    """CPU seconds of an answer of so many tokens."""
    start = time.process_time()
    answer(new)
    return time.process_time() - start


def seconds_a_token(answer: Callable[[int], object]) -> float:
    """CPU seconds of a step of generation, whatever its rows: of many new tokens less those of one."""
    return (seconds_of(answer, NEW) - seconds_of(answer, 1)) / (NEW - 1)


def lorry(held: str, rows: int, adapters: int) -> dict[str, Any]:
    """One case of ours."""
    import torch

    from lorry.adapters.attach import attach, get_bank
    from lorry.adapters.mix import Mix
    from lorry.adapters.spec import LoraSpec
    from lorry.generation.engine import generate_completions
    from lorry.generation.sampling import SamplingParams
    from lorry.models.loading.load import load_model
    from lorry.notes import ignore_note

    quantize = {"int8": "int8", "nf4": "nf4", "q4_1": "keep"}.get(held)
    loaded = load_model(
        MODEL,
        dtype="float32" if held == "float32" else "bfloat16",
        quantize=quantize,
        add_note=ignore_note,
    )
    model, tokenizer = loaded.model, loaded.tokenizer
    assert tokenizer is not None
    for i in range(adapters):
        attach(model, LoraSpec(r=16, init_lora_weights=False), f"a{i}", seed=i)
        with torch.no_grad():
            get_bank(model)[f"a{i}"].values.mul_(0.2)
    prompt = list(map(int, tokenizer(PROMPT if rows else LONG)["input_ids"]))
    alone, rows = not rows, rows or 1
    mixes = [Mix.one(f"a{i % adapters}") if adapters else Mix.none() for i in range(rows)]

    def answer(new: int) -> list[list[int]]:
        params = SamplingParams(max_new_tokens=new)
        return [
            c.tokens for c in generate_completions(model, [prompt] * rows, params, adapters=mixes)
        ]

    answer(2)
    if alone:
        return {"seconds": seconds_of(answer, 1), "tokens": len(prompt)}
    # a step reads a row of the embedding alone, unless the table is the head's too
    table = model.get_input_embeddings().weight
    tied = table.data_ptr() == model.head.weight.data_ptr()
    read = [p for p in model.parameters() if p is not table or tied]
    return {
        "seconds": seconds_a_token(answer),
        "read_seconds": seconds_of_reading(read),
        "bytes": sum(p.numel() * p.element_size() for p in read),
        "said": answer(NEW)[0],
    }


def seconds_of_reading(tensors: Sequence[Any]) -> float:
    """CPU seconds of reading every byte once, the best of some; 0 where there are no kernels."""
    import torch

    from lorry.kernels import call_kernel, load_library

    if load_library() is None:
        return 0.0
    total, best = torch.zeros(1, dtype=torch.int64), float("inf")
    for _ in range(READS):
        start = time.process_time()
        for t in tensors:
            call_kernel("sum_words", t.detach(), total, t.numel() * t.element_size() // 8)
        best = min(best, time.process_time() - start)
    return best


def llama_cpp(file: Path, rows: int, threads: int) -> dict[str, Any]:
    """The same prompts, so many rows at once, from a GGUF file."""
    import xllamacpp

    alone, rows = not rows, rows or 1

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = max(2048, 128 * rows), rows, 0
    params.warmup, params.fit_params, params.verbosity = True, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def answer_one(new: int) -> Any:
        return server.handle_completions(
            {
                "prompt": LONG if alone else PROMPT,
                "max_tokens": new,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )

    def answer(new: int) -> Any:
        with ThreadPoolExecutor(rows) as pool:
            return list(pool.map(answer_one, [new] * rows))

    answer(2)
    if alone:
        usage = answer_one(1)["usage"]
        return {"seconds": seconds_of(answer, 1), "tokens": usage["prompt_tokens"]}
    return {"seconds": seconds_a_token(answer)}


def run(
    engine: str, held: str, rows: int, adapters: int, folder: Path, threads: int
) -> dict[str, Any]:
    """One engine in a process of its own."""
    command = [sys.executable, __file__, engine, held, str(rows), str(adapters), str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    count = found.get("tokens", rows)
    print(
        f"  {engine} {held} {rows or 'prompt'} rows {adapters} adapters: {count / found['seconds']:.1f} tok/s",
        file=sys.stderr,
        flush=True,
    )
    return {
        "engine": engine,
        "held": held,
        "rows": rows,
        "adapters": adapters,
        "load": os.getloadavg()[0],
        **found,
    }


def contest(
    folder: Path, threads: int, rounds: int, cases: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    """Every case of ours and llama.cpp's in turns: after each round all that was measured."""
    judged = importlib.util.find_spec("xllamacpp") is not None
    if judged:
        prepare(folder)
    runs = list[dict[str, Any]]()
    for turn in range(rounds):
        for held, rows, adapters in CASES:
            if cases and held not in cases:
                continue
            runs.append({"round": turn, **run("lorry", held, rows, adapters, folder, threads)})
            if judged and rows in (1, 32, PROMPT_ALONE) and not adapters and held in LLAMA:
                runs.append({"round": turn, **run("llama.cpp", held, rows, 0, folder, threads)})
        yield runs


def record(runs: Sequence[Mapping[str, Any]], threads: int) -> dict[str, Any]:
    """What is kept, with a table for `make results`."""
    rounds = 1 + max(r["round"] for r in runs)
    by_case: dict[tuple[str, str, int, int], list[Mapping[str, Any]]] = {}
    for one in runs:
        key = (one["engine"], one["held"], one["rows"], one["adapters"])
        by_case.setdefault(key, []).append(one)

    def seconds(*key: Any) -> float | None:
        found = by_case.get(key)
        return None if found is None else statistics.median(r["seconds"] for r in found)

    def ratio(above: float | None, below: float | None) -> str:
        return "" if above is None or not below else f"{above / below:.2f}x"

    rows = []
    for (engine, held, count, adapters), found in by_case.items():
        mine = seconds(engine, held, count, adapters)
        assert mine is not None
        reads = [r["read_seconds"] / r["seconds"] for r in found if r.get("read_seconds")]
        rival = None if engine != "lorry" or adapters else seconds("llama.cpp", held, count, 0)
        tokens = found[0].get("tokens", count)
        rows.append(
            [
                f"{engine}, {held}",
                str(count) if count else f"prompt of {tokens}",
                str(adapters or ""),
                f"{1e3 * mine:.2f}",
                f"{tokens / mine:.1f}",
                f"{statistics.median(reads):.0%}" if reads else "",
                ratio(rival, mine),
                ratio(seconds(engine, held, count, 0), mine) if adapters else "",
            ]
        )
    machine = measure.machine()
    highest = max(r["load"] for r in runs)
    return {
        "title": "Generation of a row, a few and 32; a prompt",
        "columns": [
            "engine, weights",
            "rows",
            "adapters",
            "ms a step",
            "tokens/s",
            "of a plain read",
            "times llama.cpp",
            "of the base's rate",
        ],
        "rows": rows,
        "text": (
            f"{MODEL}, {threads} thread{'' if threads == 1 else 's'}, {machine['cpu']}, CPU seconds, medians of {rounds} rounds in "
            f"fresh processes; load up to {highest:.0f}. A plain read: all bytes of the weights, summed, in the same process. "
            "llama.cpp is xllamacpp, whose build has AVX2 and no more."
        ),
        "threads": threads,
        "rounds": rounds,
        "machine": machine,
        "highest_load": highest,
        "command": " ".join(["python", *sys.argv]),
        "clock": "CPU seconds of the process",
        "runs": list(runs),
    }


def main() -> None:
    engine, held, rows, adapters, folder = sys.argv[1:]
    threads = int(os.environ["OMP_NUM_THREADS"])
    if engine == "llama.cpp":
        found = llama_cpp(Path(folder) / f"{LLAMA[held]}.gguf", int(rows), threads)
    else:
        import torch

        torch.set_num_threads(threads)
        found = lorry(held, int(rows), int(adapters))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
