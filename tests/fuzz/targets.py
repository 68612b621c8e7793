"""Everything of Lorry that reads what others wrote, as targets of fuzzing: sound inputs, and what
is done with a damaged one.

A target may read the input or refuse it with a LorryError. Anything else it raises, and a time
beyond `campaign.SECONDS`, is a finding.
"""

from __future__ import annotations

import io
import json
import shlex
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from safetensors.torch import save

from lorry.adapters.attach import detach
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.config import (
    DistillRunConfig,
    EvalSettings,
    PlanSettings,
    RunConfig,
    SweepSettings,
    parse_settings,
)
from lorry.config.parsing.sizes import parse_size
from lorry.data.encoding.chat_template.template import ChatTemplate, TemplateRefusedError
from lorry.data.reading.content import ChatMessage
from lorry.data.reading.sources import open_source
from lorry.errors import LorryError
from lorry.models.gguf.header import check_gguf
from lorry.models.loading.describe import describe_model
from lorry.models.loading.tensor_files import read_tensor_entries
from lorry.report.html import render_page
from lorry.runs.read import read_run
from lorry.runs.status import run_state_of
from lorry.train import checkpoint
from tests.support import runs
from tests.support.states import meta
from tests.support.tiny import LLAMA, random_model

ROWS = [
    {"question": "Where does Mara live?", "answer": "In Oslo.", "n": 3},
    {"question": 'A "quote", a comma', "answer": "über\nzwei Zeilen", "n": -1.5},
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello", "weight": 1},
        ]
    },
    {"text": "plain text", "meta": {"a": [1, 2, {"b": None}], "c": True}},
]


@dataclass(frozen=True)
class Target:
    """``seeds``: sound inputs; ``read``: what is done with one; ``refusals``: errors that are an
    answer.
    """

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], object]
    refusals: tuple[type[Exception], ...] = (LorryError,)


def _file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """A reader of one file, of that name, in an empty folder."""

    def run(data: bytes, folder: Path) -> object:
        path = folder / name
        path.write_bytes(data)
        return read(path)

    return run


# --- rows


def _rows(path: Path) -> int:
    return sum(1 for _ in open_source(path, on_bad_row="skip").read())


def _json_seeds() -> list[bytes]:
    return [
        json.dumps(ROWS).encode(),
        json.dumps({"data": ROWS}, indent=1).encode(),
        json.dumps(ROWS * 20, ensure_ascii=False).encode(),
    ]


def _jsonl_seeds() -> list[bytes]:
    return [
        "".join(json.dumps(row, ensure_ascii=plain) + "\n" for row in ROWS).encode()
        for plain in (True, False)
    ]


def _csv_seeds() -> list[bytes]:
    return [
        b'question,answer\nwhere,"here, there"\n"a\nb",c\n',
        b'\xef\xbb\xbfquestion,answer\r\n"say ""hi""",x\r\n',
        b"text\nplain\n",
    ]


def _parquet_seeds() -> list[bytes]:
    made = []
    for compression in ("snappy", "none"):
        table = pa.table(
            {"question": ["a", "b", None] * 5, "answer": ["x", "y", "z"] * 5, "n": list(range(15))}
        )
        table = table.append_column("messages", [[[{"role": "user", "content": "hi"}]]] * 15)
        sink = io.BytesIO()
        pyarrow.parquet.write_table(table, sink, compression=compression)
        made.append(sink.getvalue())
    return made


SAVED_FILES = ("state.json", "dataset_info.json", ".arrow")


@cache
def _saved_set() -> dict[str, bytes]:
    import datasets

    with tempfile.TemporaryDirectory() as folder:
        datasets.Dataset.from_list(ROWS[:2]).save_to_disk(folder)
        return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def _read_saved(name: str) -> Callable[[bytes, Path], object]:
    def run(data: bytes, folder: Path) -> object:
        place = folder / "saved"
        place.mkdir(exist_ok=True)
        for file, content in _saved_set().items():
            (place / file).write_bytes(data if file.endswith(name) else content)
        return _rows(place)

    return run


def _saved_seeds(name: str) -> Callable[[], list[bytes]]:
    return lambda: [content for file, content in _saved_set().items() if file.endswith(name)]


# --- descriptions


def _description_seeds() -> list[bytes]:
    plain = b"model: m\ndata: {path: d.jsonl, max_length: 64}\nlora:\n  r: 8\n  target_modules: [q_proj]\ntrain: {lr: 1e-3}\n"
    jobs = b"data: d\njobs:\n- {name: a, r: 4}\n- {name: b, data: {path: e, max_length: 9}, learning_rate: 2e-4}\n"
    return [plain, jobs, b"base: &a {r: 8}\ndata: d\nlora: *a\n"]


def _command_line(data: bytes, folder: Path) -> object:
    try:
        words = shlex.split(data.decode("utf-8", "replace").replace("\0", ""))
    except ValueError:
        return None
    words = [word for word in words if not word.endswith((".yaml", ".yml", ".json"))]
    return [
        _parsed(schema, words)
        for schema in (RunConfig, SweepSettings, EvalSettings, PlanSettings, DistillRunConfig)
    ]


def _parsed(schema: Any, words: list[str]) -> object:
    try:
        return parse_settings(schema, words, print)
    except LorryError as refusal:
        return refusal


def _size(data: bytes, folder: Path) -> object:
    return parse_size(data.decode("utf-8", "replace"))


# --- templates


TEMPLATES = [
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{ bos_token }}{% set ns = namespace(x=[]) %}{% for m in messages %}{% set ns.x = ns.x + [m.content[1:]] %}{{ m['role'] }}: "
    "{{ m['content'] | trim }}{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{{ ns.x | join(',') }}",
]


def _template(data: bytes, folder: Path) -> object:
    template = ChatTemplate(
        data.decode("utf-8", "replace"), {"bos_token": "<s>", "eos_token": "</s>"}, ["<s>", "</s>"]
    )
    return template.render(
        [
            ChatMessage("system", "be kind"),
            ChatMessage("user", "hello " * 50),
            ChatMessage("assistant", "yes"),
        ]
    ).text


# --- models and adapters


@cache
def _model() -> Any:
    return random_model(LLAMA)


@cache
def _adapter() -> dict[str, bytes]:
    from lorry.adapters.attach import attach

    with tempfile.TemporaryDirectory() as folder:
        attach(_model(), LoraSpec(r=2, target_modules=("q_proj", "down_proj")), "seed")
        save_adapter(_model(), folder, "seed")
        detach(_model(), "seed")
        return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def _read_adapter(name: str) -> Callable[[bytes, Path], object]:
    def run(data: bytes, folder: Path) -> None:
        for file, content in _adapter().items():
            (folder / file).write_bytes(data if file == name else content)
        load_adapter(_model(), folder, "fuzzed", other_base=True)
        detach(_model(), "fuzzed")

    return run


def _config_seeds() -> list[bytes]:
    return [
        json.dumps({**LLAMA, **more}).encode()
        for more in ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    ]


def _read_config(path: Path) -> object:
    return describe_model(path.parent, add_note=print)


def _shard() -> bytes:
    return save(
        {"model.a": torch.arange(6.0).view(2, 3), "model.b": torch.ones(4, dtype=torch.bfloat16)},
        {"format": "pt"},
    )


def _read_index(data: bytes, folder: Path) -> object:
    (folder / "model-00001-of-00001.safetensors").write_bytes(_shard())
    (folder / "model.safetensors.index.json").write_bytes(data)
    return read_tensor_entries(folder)


def _index_seeds() -> list[bytes]:
    shard = "model-00001-of-00001.safetensors"
    return [
        json.dumps(
            {"metadata": {"total_size": 32}, "weight_map": {"model.a": shard, "model.b": shard}}
        ).encode()
    ]


@cache
def _gguf_seed() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "m.gguf", "llama")
        writer.add_uint32("llama.block_count", 1)
        writer.add_string("tokenizer.ggml.model", "gpt2")
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
        writer.add_array("tokenizer.ggml.scores", [0.5, 1.5, 2.5])
        writer.add_tensor("token_embd.weight", np.ones((3, 32), dtype=np.float32))
        writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float16))
        for write in (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
        ):
            write()
        writer.close()
        return (Path(folder) / "m.gguf").read_bytes()


# --- runs and checkpoints


@cache
def _run_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        run = runs.full(Path(folder) / "run", steps=12)
        process = {
            "pid": 1, "born": 1.5, "host": "h", "folder": [1, 2], "command": ["lorry", "sft"],
            "started": "2026-01-01T00:00:00+00:00", "begun": None, "done": 0, "total_steps": 12,
            "ended": {"at": "2026-01-01T00:00:00+00:00", "exit_code": 1, "reason": "no"},
        }  # fmt: skip
        (run / "process.json").write_text(json.dumps(process))
        return {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}


def _read_run(name: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> object:
        for file, content in _run_files().items():
            (folder / file).write_bytes(data if file == name else content)
        if name != "metrics.jsonl":  # drawing takes most of the time, and says nothing of the file
            (folder / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n')
        run = read_run(folder)
        return run_state_of(run), render_page([run])

    return read


@cache
def _checkpoint() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save_checkpoint(
            Path(folder), 3, {"adapter/default/a.lora_A": torch.ones(2, 3)}, meta(0)
        )
        return {p.name: p.read_bytes() for p in path.iterdir()}


def _read_checkpoint(name: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> object:
        place = folder / "checkpoints" / "step-00000003"
        place.mkdir(parents=True, exist_ok=True)
        for file, content in _checkpoint().items():
            (place / file).write_bytes(data if file == name else content)
        return checkpoint.load_checkpoint(place)

    return read


def _of(
    files: Callable[[], dict[str, bytes]],
    read: Callable[[str], Callable[[bytes, Path], object]],
    kind: str,
) -> Iterable[Target]:
    """One target for every file of a directory, the others being sound."""
    for name in sorted(files()):
        yield Target(f"{kind}/{name}", lambda name=name: [files()[name]], read(name))  # type: ignore[misc]


def targets() -> dict[str, Target]:
    """All targets by name."""
    plain = [
        Target("rows/json", _json_seeds, _file("rows.json", _rows)),
        Target("rows/jsonl", _jsonl_seeds, _file("rows.jsonl", _rows)),
        Target("rows/csv", _csv_seeds, _file("rows.csv", _rows)),
        Target("rows/txt", _csv_seeds, _file("rows.txt", _rows)),
        Target("rows/parquet", _parquet_seeds, _file("rows.parquet", _rows)),
        *(
            Target(f"rows/saved-{name}", _saved_seeds(name), _read_saved(name))
            for name in SAVED_FILES
        ),
        Target(
            "config/yaml",
            _description_seeds,
            _file("run.yaml", lambda path: _parsed(RunConfig, [str(path)])),
        ),
        Target(
            "config/json",
            lambda: [b'{"data": "d", "lora": {"r": 8}, "jobs": [{"name": "a"}]}'],
            _file("run.json", lambda path: _parsed(RunConfig, [str(path)])),
        ),
        Target(
            "config/words",
            lambda: [
                b"data=d r=8 lora={r:8} --packing lr=1e-3",
                b"data=d r=8,16 jobs=[{name:a}] seed=1",
            ],
            _command_line,
        ),
        Target("config/size", lambda: [b"3GiB", b"800 MB", b"2.5gb"], _size, (ValueError,)),
        Target(
            "template",
            lambda: [t.encode() for t in TEMPLATES],
            _template,
            (LorryError, TemplateRefusedError),
        ),
        Target("model/config.json", _config_seeds, _file("config.json", _read_config)),
        Target(
            "model/safetensors",
            lambda: [_shard()],
            _file("model.safetensors", lambda path: read_tensor_entries(path.parent)),
        ),
        Target("model/index", _index_seeds, _read_index),
        Target("model/gguf", lambda: [_gguf_seed()], _file("m.gguf", check_gguf)),
    ]
    several = [
        *_of(_adapter, _read_adapter, "adapter"),
        *_of(_run_files, _read_run, "run"),
        *_of(_checkpoint, _read_checkpoint, "checkpoint"),
    ]
    return {target.name: target for target in (*plain, *several)}
