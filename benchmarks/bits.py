"""Bit equality of whole runs before and after a change of the code: what ought to change nothing is
shown to change nothing.

    python benchmarks/bits.py --write before.json          # at the commit before
    python benchmarks/bits.py --against before.json        # after the change; exit code 1 on any difference
    python benchmarks/bits.py --against before.json --cases llama-float32-dropout,opt-bfloat16
    python benchmarks/bits.py --source ../before/src --write before.json    # another checkout's package, this very script

Each case is a training of a few steps on one CPU thread, of a random model of two layers and width
64 that is made here by transformers: every family with a native decoder and a model that runs
through transformers, in float32 and bfloat16, and on Llama each way to train. Only `lorry.sft`,
`lorry.distill`, `lorry.load`, `lorry.generate` and `python -m lorry` are called, so the same script
runs before and after a change of the package's layout. A case records, in this order:

    steps          loss, grad_norm, learning_rate and eval_* of each line of metrics.jsonl, every digit of them
    weights        SHA-256 of each tensor (dtype, shape, bytes) of the run's safetensors files: adapters, or the whole model
    checkpoint     the same of the last checkpoint's state: masters, moments, generators
    logits, texts  SHA-256 of logits, and what is said greedily and sampled, where a case reads its run again
    evaluation     every number and answer of results.json, where a case calls `lorry eval`

Metadata, run.yaml, receipts, times and memory are left out: they may differ between equal runs.
Bits hang on the processor and the versions of torch and its neighbours, so the file names them and
--against refuses another machine (exit code 2). What is built once (kernels, proofs) is kept in
build/bits beside this folder, not in the user's LORRY_HOME.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
# of the environment: each may change bits
SWITCHES = (
    "LORRY_KERNELS",
    "LORRY_PROOFS",
    "LORRY_DTYPE",
    "LORRY_MALLOC",
)
DTYPES = ("float32", "bfloat16")
VOCABULARY = 320
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "tie_word_embeddings": False,
}
NEOX = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": None, "head_dim": 32},
    "qwen2": {**LLAMA, "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "head_dim": 32},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 160},
    "gpt_neox": NEOX,
    "opt": {  # runs through transformers
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 160,
        "word_embed_proj_dim": 64,
    },
}
PROMPTS = ("What has Ada in room 1?", "Where is the lorry?", "Say nothing at all.")
SETTINGS: dict[str, Any] = {
    "r": 4,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "max_length": 96,
    "save_steps": 2,
    "threads": 1,
    "logging_steps": 100,
}
Record = dict[str, Any]


# --- what is trained on


def rows(n: int, *, start: int = 0) -> list[dict[str, str]]:
    """Questions and answers of uneven length, every one different."""
    who = ["Ada", "Bo", "Cleo", "Dov", "Eve", "Finn", "Gus"]
    what = [
        "a red lorry",
        "two old dogs",
        "bread and salt",
        "a house by the river",
        "nothing at all",
    ]
    picked = [(who[i % 7], what[(i * 3 + i // 7) % 5], i) for i in range(start, start + n)]
    return [
        {
            "question": f"What has {one} in room {i}?",
            "answer": f"{one} has {thing}" + ", again" * (i % 4),
        }
        for one, thing, i in picked
    ]


def tokenizer() -> Any:
    """A byte-level tokenizer of `VOCABULARY` entries, learnt from the rows, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([text for row in rows(50) for text in row.values()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )


def write_model(path: Path, model_type: str, **changes: Any) -> None:
    """A Hugging Face directory: a model whose every parameter is random, a function of its name,
    and the tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    words = tokenizer()
    ids = {
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": None,
    }
    config = CONFIG_MAPPING[model_type].from_dict(
        {"vocab_size": VOCABULARY, **ids, **MODELS[model_type], **changes}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = torch.Generator().manual_seed(zlib.crc32(path.name.encode()))
    with torch.no_grad():
        for p in model.parameters():
            around = 1.0 if p.dim() == 1 and bool((p == 1).all()) else 0.0
            p.copy_(around + 0.15 * torch.randn(p.shape, generator=draw))
    model.save_pretrained(path)
    words.save_pretrained(path)


class World:
    """The temporary folder of all cases; models and rows are made when a case first asks for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self, model_type: str, name: str = "", **changes: Any) -> str:
        """The directory of a model; ``name``: of another one of the type, with ``changes`` of its
        config.
        """
        path = self.folder / "models" / (name or model_type)
        if not path.exists():
            write_model(path, model_type, **changes)
        return str(path)

    def rows(self, name: str = "train", n: int = 24, *, start: int = 0) -> str:
        """A file of question and answer rows."""
        return self.write(name, rows(n, start=start))

    def write(self, name: str, made: Sequence[Mapping[str, Any]]) -> str:
        """A file of rows of any kind."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        return str(path)

    def held_out(self) -> str:
        """Rows that no case trains on."""
        return self.rows("held-out", 12, start=100)

    def run(self, name: str) -> Path:
        """A run directory that is not there yet."""
        path = self.folder / "runs" / name
        shutil.rmtree(path, ignore_errors=True)
        return path


# --- what is recorded


def tensors(path: Path) -> dict[str, str]:
    """{name: SHA-256 of dtype, shape and bytes} of a safetensors file, by name."""
    import torch
    from safetensors.torch import load_file

    return {
        name: digest(
            tensor.contiguous().view(torch.uint8)
            if tensor.dim()
            else tensor.reshape(1).view(torch.uint8),
            f"{tensor.dtype} {list(tensor.shape)}",
        )
        for name, tensor in sorted(load_file(path).items())
    }


def digest(raw: Any, kind: str) -> str:
    """SHA-256 of a tensor of bytes and a word on what they are."""
    return hashlib.sha256(kind.encode() + b"\n" + raw.numpy().tobytes()).hexdigest()


def numbers(line: Mapping[str, Any]) -> Record:
    """What of a line of metrics.jsonl is computed by the run rather than measured on it."""
    kept: Record = {}
    for key, value in line.items():
        if key == "adapters":
            kept[key] = {name: numbers(own) for name, own in value.items()}
        elif key in ("step", "learning_rate", "grad_norm") or key.startswith(("loss", "eval_")):
            kept[key] = value if isinstance(value, dict) else repr(value)
    return {
        key: value for key, value in kept.items() if not key.endswith(("seconds", "per_second"))
    }


def trained(run: Path) -> Record:
    """What a finished run left: its steps, the weights it saved, the state of its last checkpoint."""
    steps = [numbers(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = sorted(
        p
        for p in run.rglob("*.safetensors")
        if "checkpoints" not in p.parts and "previous" not in p.parts
    )
    last = max((run / "checkpoints").iterdir(), key=lambda path: path.name)
    if not files or not steps:
        raise SystemExit(f"{run} holds no weights or no steps")
    return {
        "steps": steps,
        "weights": {str(p.relative_to(run)): tensors(p) for p in files},
        "checkpoint": {last.name: tensors(last / "state.safetensors")},
    }


def read_again(path: Path, dtype: str, **model: Any) -> Record:
    """Logits of one sequence, and answers, of a run or model that is loaded from disk."""
    import torch

    import lorry

    loaded, words = lorry.load(path, dtype=dtype, **model)
    with torch.no_grad():
        logits = loaded(words(" ".join(PROMPTS), return_tensors="pt").input_ids).logits.contiguous()
    say = partial(lorry.generate, loaded, words, list(PROMPTS), max_new_tokens=12)
    return {
        "logits": digest(logits.view(torch.uint8), f"{logits.dtype} {list(logits.shape)}"),
        "texts": {"greedy": say(), "sampled": say(temperature=0.9, top_k=40, top_p=0.95, seed=3)},
    }


def without_places(value: Any) -> Any:
    """Results of `lorry eval` without its settings and the names of files and folders; floats with
    every digit.
    """
    if isinstance(value, dict):
        return {
            k: without_places(v)
            for k, v in value.items()
            if k not in ("asked", "model", "data", "where", "source")
        }
    if isinstance(value, list):
        return [without_places(v) for v in value]
    return repr(value) if isinstance(value, float) else value


def command(*words: str) -> None:
    """`python -m lorry WORDS`, in this process: a new one would import torch again. Raises
    RuntimeError unless it ends with 0.
    """
    before, interrupt = sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = ["lorry", *words]
    code: Any = 0
    try:
        runpy.run_module("lorry", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
        signal.signal(signal.SIGINT, interrupt)
    if code:
        raise RuntimeError(f"lorry {' '.join(words)} ended with {code}")


# --- the cases


@dataclass(frozen=True)
class Case:
    """A name and what makes its record."""

    name: str
    make: Callable[[World], Record]


@dataclass(frozen=True)
class Training:
    """One run by `lorry.sft`, or `lorry.distill` where a teacher is among the settings; ``again``:
    it is loaded and asked.
    """

    name: str
    dtype: str
    model: str = "llama"
    settings: Mapping[str, Any] = field(default_factory=dict)
    again: bool = False

    def start(self, world: World, run: Path, **more: Any) -> None:
        """Train in ``run``. A setting whose value is a function is made by it from the world."""
        import lorry

        own = {key: made(world) if callable(made) else made for key, made in self.settings.items()}
        given = {
            "model": world.model(self.model),
            "data": world.rows(),
            "dtype": self.dtype,
            "output_dir": run,
        }
        verb = lorry.distill if any(key.startswith("teacher") for key in own) else lorry.sft
        settings = {**SETTINGS, **given, **own, **more}
        if "lora" in own:
            del settings["r"]
        verb(**settings)

    def __call__(self, world: World) -> Record:
        run = world.run(self.name)
        self.start(world, run)
        native = {} if self.settings.get("native", True) else {"native": False}
        return trained(run) | (read_again(run, self.dtype, **native) if self.again else {})


def resumed(training: Training, world: World) -> Record:
    """Six steps in one go, and the same run gone on with from its checkpoint of step 4 in a copy;
    the two have to be equal.
    """
    run, copy = world.run(training.name), world.run(f"{training.name}-resumed")
    training.start(world, run, max_steps=6, save_total_limit=3)
    for name in ("checkpoints/step-00000002", "checkpoints/step-00000004"):
        shutil.copytree(run / name, copy / name)
    for name in ("run.yaml", "metrics.jsonl"):
        shutil.copy(run / name, copy / name)
    training.start(world, copy, max_steps=6, save_total_limit=3, resume_from_checkpoint="auto")
    whole, gone_on = trained(run), trained(copy)
    return {"whole run": whole, "differs when resumed": differences(whole, gone_on)[:1]}


def evaluated(dtype: str, world: World) -> Record:
    """`lorry eval` of a run: a file with answers, a named set whose options are ranked, one that is
    answered by sampling.
    """
    run = world.run(f"eval-{dtype}")
    Training("eval", dtype).start(world, run)
    facts = [
        {"question": f"is room {i} cold", "passage": f"Room {i} is a room.", "answer": i % 2 == 0}
        for i in range(12)
    ]
    words = [
        {
            "concepts": ["lorry", "road", f"room {i}"],
            "target": f"The lorry of room {i} is on the road.",
        }
        for i in range(3)
    ]
    ranked, said = world.write("facts", facts), world.write("words", words)
    found: Record = {}
    for name, asked in {
        "a file": (f"data={world.held_out()}", "max_new_tokens=12"),
        "ranked": ("tasks=[bool_q]", f"local.bool_q={ranked}", "task_split=train"),
        "sampled": (
            "tasks=[common_gen]", f"local.common_gen={said}", "task_split=train", "temperature=1", "seed=2", "max_new_tokens=12"
        ),
    }.items():  # fmt: skip
        results = world.folder / "results.json"
        results.unlink(missing_ok=True)
        command("eval", str(run), f"dtype={dtype}", "threads=1", *asked, f"output_dir={results}")
        found[name] = without_places(json.loads(results.read_text()))
    return {"evaluation": found}


def merged(model: str, dtype: str, world: World) -> Record:
    """`lorry merge` in the base's format and in bfloat16; the merged model loaded and asked."""
    run = world.run(f"merge-{model}-{dtype}")
    Training("merge", dtype, model).start(world, run)
    found: Record = {}
    for stored in ("auto", "bfloat16"):
        output = world.run(f"merged-{model}-{dtype}-{stored}")
        command("merge", str(run), f"output_dir={output}", f"dtype={stored}")
        weights = {"weights": {p.name: tensors(p) for p in sorted(output.glob("*.safetensors"))}}
        found[f"stored as {stored}"] = weights | read_again(output, dtype)
    return found


def jobs(world: World) -> list[dict[str, Any]]:
    """Three adapters that differ in rank, rate, dropout, data, targets and length."""
    return [
        {"name": "small", "r": 2},
        {"name": "wide", "r": 8, "learning_rate": 1e-3, "lora_dropout": 0.1, "seed": 7},
        {
            "name": "other",
            "data": world.rows("other", 10, start=40),
            "target_modules": ["q_proj", "down_proj"],
            "max_steps": 3,
        },
    ]


def teacher(world: World) -> str:
    """A model of three layers."""
    return world.model("llama", "teacher", num_hidden_layers=3)


def kept_scores(world: World) -> str:
    """A directory for a teacher's scores."""
    return str(world.run("scores"))


WAYS: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.2},
    "jobs": {"jobs": jobs},
    "full": {"lora": None, "learning_rate": 1e-3},
    "full-mlp": {"lora": None, "trainable": "mlp", "learning_rate": 1e-3},
    "checkpointing": {"gradient_checkpointing": True, "lora_dropout": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "packing": {"packing": True},
    "loraplus": {
        "loraplus_lr_ratio": 8.0,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
    },
    "patterns": {
        "rank_pattern": {"q_proj": 8, "down_proj": 2},
        "alpha_pattern": {"q_proj": 4},
        "use_rslora": True,
    },
    "all-linear": {"target_modules": "all-linear", "init_lora_weights": "gaussian"},
    "head": {"target_modules": ["q_proj", "v_proj", "up_proj", "lm_head"]},
    "text": {"completion_only_loss": False, "max_grad_norm": 0.1},
    "streaming": {"streaming": True},
    "evaluating": {"eval": World.held_out, "eval_steps": 2, "load_best_model_at_end": True},
    "distill": {"teacher": teacher, "temperature": 2.0},
    "distill-jsd": {"teacher": teacher, "loss": "jsd", "beta": 0.3, "alpha": 1.0},
    "distill-reverse-top-k": {"teacher": teacher, "loss": "reverse_kl", "top_k": 16},
    "distill-cache": {"teacher": teacher, "cache": kept_scores},
    "distill-full": {"teacher": teacher, "lora": None, "learning_rate": 1e-3},
    "not-native": {"native": False, "lora_dropout": 0.1},
}
RESUMED: dict[str, dict[str, Any]] = {
    "resume": {"lora_dropout": 0.1},
    "resume-packing": {
        "packing": True,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
    },
    "resume-jobs": {"jobs": jobs},
    "resume-full": {"lora": None, "learning_rate": 1e-3},
    "resume-streaming": {"streaming": True},
}
ON_EVERY_MODEL: dict[str, dict[str, Any]] = {  # on those but Llama, which has each of them alone
    "full-checkpointing": {"lora": None, "gradient_checkpointing": True, "learning_rate": 1e-3},
    "dropout-packing": {"lora_dropout": 0.2, "packing": True},
}


def cases() -> list[Case]:
    """Every case, by names such as llama-float32 (plain LoRA, asked afterwards),
    gpt2-bfloat16-full, llama-float32-resume.
    """
    found = list[Case]()
    for dtype in DTYPES:
        for model in MODELS:
            plain = f"{model}-{dtype}"
            found.append(Case(plain, Training(plain, dtype, model, again=True)))
            ways = WAYS if model == "llama" else ON_EVERY_MODEL
            for way, settings in ways.items():
                name = f"{plain}-{way}"
                found.append(
                    Case(name, Training(name, dtype, model, settings, again=way == "not-native"))
                )
        for way, settings in RESUMED.items():
            name = f"llama-{dtype}-{way}"
            found.append(Case(name, partial(resumed, Training(name, dtype, settings=settings))))
        found.append(Case(f"llama-{dtype}-eval", partial(evaluated, dtype)))
        found += [
            Case(f"{model}-{dtype}-merge", partial(merged, model, dtype))
            for model in ("llama", "gpt2")
        ]
    return found


# --- running and comparing


def machine() -> dict[str, str]:
    """What equal bits need besides equal code."""
    import torch

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(
        line.split("\t", 1)
        for line in text.splitlines()
        if line.startswith(("model name", "flags", "microcode"))
    )
    return {
        "cpu": lines.get("model name", platform.processor() or platform.machine()).strip("\t: "),
        "cpu flags": hashlib.sha256(lines.get("flags", "").encode()).hexdigest()[:16],
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "compiler": str(any(map(shutil.which, ("g++", "c++", "clang++")))),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        **{switch: os.environ.get(switch, "") for switch in SWITCHES},
    }


def flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """(place, plain value) of everything inside nested maps and lists, in their order."""
    parts: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, list):
        parts = list(enumerate(value))
    else:
        yield at, value
        return
    yield f"{at or 'parts'} (how many)", len(parts)
    for key, part in parts:
        yield from flat(part, f"{at} > {key}" if at else str(key))


def differences(before: Any, after: Any) -> list[str]:
    """Every place where two records differ, with both values, in the order of the first."""
    old, new = dict(flat(before)), dict(flat(after))
    missing = "nothing"
    return [
        f"{at}: {short(old.get(at, missing))} -> {short(new.get(at, missing))}"
        for at in dict.fromkeys([*old, *new])
        if old.get(at, missing) != new.get(at, missing)
    ]


def short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and " " not in text else text[:60]


@contextlib.contextmanager
def quiet(told: io.StringIO) -> Iterator[None]:
    """What the runs print goes into ``told``."""
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        yield


def record(case: Case, world: World) -> Record:
    """A case's record; of one that failed {"error": the last line of its traceback}, and the
    traceback on standard error.
    """
    told = io.StringIO()
    try:
        with quiet(told):
            return case.make(world)
    except Exception as error:  # noqa: BLE001 - one broken case must not hide what the others say
        print("".join(told.getvalue().splitlines(keepends=True)[-8:]), file=sys.stderr)
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def chosen(names: str) -> list[Case]:
    """The cases of a list of names, or all. Raises SystemExit for a name that is none."""
    every = {case.name: case for case in cases()}
    if odd := [name for name in names.split(",") if name and name not in every]:
        raise SystemExit(f"no case is called {odd[0]}; there are: {', '.join(every)}")
    return [every[name] for name in names.split(",") if name] or list(every.values())


def verdict(name: str, before: Mapping[str, Any], now: Record) -> str:
    """equal, or what differs first."""
    if "error" in now:
        return f"FAILED     {now['error'][:200]}"
    if name not in before:
        return "NOT KNOWN  the file has no such case; write it anew with the code before"
    found = differences(before[name], now)
    return f"DIFFERENT  {found[0]} (the first of {len(found)})" if found else "equal"


def code(source: Path) -> str:
    """SHA-256 of a package's source: whether two records are of the same code."""
    files = sorted(p for p in (source / "lorry").rglob("*") if p.suffix in (".py", ".cpp", ".h"))
    return hashlib.sha256(
        b"".join(f"{p.relative_to(source)}\n".encode() + p.read_bytes() for p in files)
    ).hexdigest()


def use(source: Path) -> None:
    """Import Lorry from this folder and no other. Raises SystemExit where there is none."""
    sys.path.insert(0, str(source))
    import lorry

    if not Path(str(lorry.__file__)).resolve().is_relative_to(source):
        raise SystemExit(
            f"{source} holds no lorry: {lorry.__file__} was imported; give --source the src folder of a checkout"
        )


def main() -> int:
    """Run the cases; 0 where all are equal or the file is written, 1 on any difference, 2 on
    another machine.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE", help="record what this code computes")
    what.add_argument(
        "--against", type=Path, metavar="FILE", help="compare what this code computes with a record"
    )
    what.add_argument("--list", action="store_true", help="the names of the cases")
    parser.add_argument("--cases", default="", help="names, separated by commas; left out: all")
    parser.add_argument(
        "--source", type=Path, default=ROOT / "src", help="the folder that holds the package lorry"
    )
    args = parser.parse_args()
    todo = chosen(args.cases)
    if args.list:
        print("\n".join(case.name for case in todo))
        return 0
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ["LORRY_HOME"] = str(ROOT / "build" / "bits")
    use(args.source.resolve())
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)
    here, before = (
        machine(),
        json.loads(args.against.read_text()) if args.against else {"cases": {}, "machine": {}},
    )
    if args.against and (other := differences(before["machine"], here)):
        print(
            f"{args.against} is of another machine, and bits are equal on one only; {'; '.join(other)}",
            file=sys.stderr,
        )
        return 2
    if before.get("code") == (now_code := code(args.source.resolve())):
        print(
            "note: the record is of this very code, so that only the machine can make a difference"
        )
    began, done, bad = time.perf_counter(), {}, 0
    wide = max(len(case.name) for case in todo)
    with tempfile.TemporaryDirectory(prefix="lorry-bits-") as folder:
        for case in todo:
            now = done[case.name] = record(case, World(Path(folder)))
            said = verdict(case.name, before["cases"] if args.against else done, now)
            if not args.against and said == "equal":
                said = "recorded"
            bad += said not in ("equal", "recorded")
            print(f"{case.name:{wide}}  {said}", flush=True)
    if gone := [name for name in before["cases"] if name not in done and not args.cases]:
        bad += len(gone)
        print(f"recorded before and no case now: {', '.join(gone)}")
    print(
        f"{len(todo)} cases in {time.perf_counter() - began:.0f} s, {bad} not equal"
        if args.against
        else f"{len(todo)} cases in {time.perf_counter() - began:.0f} s, {bad} failed"
    )
    # modules are imported as they are needed: it may be of neither
    if code(args.source.resolve()) != now_code:
        print(
            f"{args.source} was changed while this ran, so that it says nothing; run it again",
            file=sys.stderr,
        )
        return 1
    if args.write and not bad:
        args.write.write_text(
            json.dumps({"machine": here, "code": now_code, "cases": done}, indent=1) + "\n"
        )
        print(f"written to {args.write}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
