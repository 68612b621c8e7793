"""docs/migrating.md tells the truth: every `lorry` line of it runs, on small models of the three
families and local rows.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from lorry import cli, config
from lorry.config import parse_settings
from lorry.config.parsing.open_unlearning import verb_of_launcher
from lorry.data.catalog import shipped_catalog
from lorry.errors import LorryError
from lorry.runs.process import is_process_alive, read_process
from lorry.verbs import background
from tests.support.hub_standin import Hub
from tests.support.hubrows import ROWS as HUB_ROWS
from tests.support.hubworld import started_hub  # noqa: F401 - the fixture
from tests.support.processes import clone_background_runs, wait_until
from tests.support.tiny import GPT2, LLAMA, NEOX, random_model
from tests.support.verbworld import tokenizer, write_rows

PAGE = Path(__file__).resolve().parent.parent / "docs" / "migrating.md"
LINES = [
    line
    for line in re.findall(r"`(lorry \w+ [^`]+)`", PAGE.read_text())
    if "data.mix=" in line or "tasks=" in line
]
MODELS = {"gpt2": GPT2, "pythia": NEOX, "smol": LLAMA}
SMALL = ("max_steps=2", "dtype=float32", "threads=1", "save_strategy=no", "max_length=400")
SETS = ("common_gen", "bool_q", "xsum")


def test_the_page_has_the_lines_of_the_issue() -> None:
    said = PAGE.read_text()
    assert len(LINES) >= 7
    for flag in ("--lora", "--distill", "-m ", "-c ", "-n ", "--num_epochs", "--batch_size", "--lora_r", "--lora_alpha",
                 "--lora_dropout", "--lora_bias", "--save_model", "--push_to_hub", "--repo_name", "--n_shot"):  # fmt: skip
        assert flag in said, flag


@pytest.mark.parametrize("line", LINES)
def test_every_line_is_a_valid_description(line: str) -> None:
    verb, *words = shlex.split(line)[1:]
    schema = next(v.schema for v in cli.VERBS if v.name == verb)
    parse_settings(getattr(config, schema), words, print)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of the three families and local rows of every set of the flan suite."""
    folder = tmp_path_factory.mktemp("migrating")
    for name, family in MODELS.items():
        size = {"n_positions": 1024} if name == "gpt2" else {"max_position_embeddings": 1024}
        base_directory(folder / name, family, size)
    other = base_directory(folder / "teacher", LLAMA, {"max_position_embeddings": 2048})
    tokens = json.loads((other / "tokenizer.json").read_text())
    known = tokens["model"]["vocab"]
    known["a"], known["b"] = known["b"], known["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    for name in shipped_catalog().suites["flan"]:
        write_rows(folder / f"{name}.jsonl", rows_of(name))
    return folder


def base_directory(path: Path, family: dict[str, Any], size: dict[str, Any]) -> Path:
    """A random base model without a chat template."""
    words = tokenizer(None, "<|endoftext|>")
    model = random_model(
        {**family, "vocab_size": len(words), "eos_token_id": words.eos_token_id, **size}
    )
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


def rows_of(name: str) -> list[dict[str, Any]]:
    """Four rows as the hub has them."""
    return [HUB_ROWS[name].row] * 4


def small(line: str, place: Path, out: Path) -> list[str]:
    """A line of the page on small things: its model, its data, its directory and few steps."""
    verb, *words = shlex.split(line)[1:]
    made = [verb]
    for word in words:
        key, _, value = word.partition("=")
        if key in ("model", "teacher"):
            name = (
                "teacher"
                if key == "teacher"
                else next(name for name in MODELS if name in value.lower())
            )
            word = f"{key}={place / name}"
        elif word == "runs/mine":
            word = str(out / "mine")
        elif key == "output_dir" and verb == "eval":
            word = f"output_dir={out / value}"
        elif key == "limit":
            word = "limit=2"
        made.append(word)
    if verb == "eval":
        names = shipped_catalog().suites["flan"] if "tasks=flan" in words else SETS
        return [
            *made,
            *(f"local.{name}={place / name}.jsonl" for name in names),
            "max_new_tokens=4",
            "dtype=float32",
        ]
    return [
        *made,
        *(f"data.local.{name}={place / name}.jsonl" for name in SETS),
        *SMALL,
        f"output_dir={out / 'run'}",
    ]


@pytest.mark.parametrize("line", LINES)
def test_every_line_runs(
    line: str, place: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(background, "START_TIMEOUT", math.inf)
    clone_background_runs(monkeypatch)
    argv = small(line, place, tmp_path)
    if argv[0] == "eval":
        first = next(one for one in LINES if one.startswith("lorry sft"))
        assert (
            cli.main([*small(first, place, tmp_path)[:-1], f"output_dir={tmp_path / 'mine'}"]) == 0
        )
    assert cli.main(argv) == 0, capsys.readouterr().err
    if argv[0] == "eval":
        return
    run = tmp_path / "run"
    # in the background it ends when it ends: its process.json goes last, or says why it failed
    wait_until(lambda: (one := read_process(run)) is None or not is_process_alive(one, run))
    assert read_process(run) is None, (run / "log.txt").read_text()[-2000:]
    whole = "lora=null" in argv
    assert (run / ("model.safetensors" if whole else "adapter_model.safetensors")).is_file()
    assert (run / "losses.json").is_file()
    assert bool(hub.files) == ("push_to_hub=true" in argv)


# Of the tools whose settings are pairs of "`name: value`" and "`name=value ...`", "nothing" or
# "refused"
PEERS = ("PEFT", "TRL", "axolotl", "LLaMA-Factory")
PAIR = re.compile(r"^\| `(\w+: [^`]+)` \| (?:`([^`]+)`|(nothing|refused)) \|", flags=re.M)
SECTIONS = dict(
    re.findall(r"^## From ([\w-]+)\b[^\n]*\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.M | re.S)
)
PAIRS = [(tool, *found.groups()) for tool in PEERS for found in PAIR.finditer(SECTIONS[tool])]
NEEDED = {"eval_strategy": ["test_size=0.1"]}  # beside a setting, or it would be refused


@pytest.mark.parametrize("tool", PEERS)
def test_every_pair_of_a_table_is_tried(tool: str) -> None:
    rows = [
        line
        for line in SECTIONS[tool].split("| what is different |")[1].split("\n\n")[0].splitlines()
        if line[:3] == "| `"
    ]
    assert len(rows) == sum(one == tool for one, *_ in PAIRS) >= 12


@pytest.mark.parametrize(
    ("tool", "theirs", "ours", "word"),
    PAIRS,
    ids=[f"{tool}-{theirs}" for tool, theirs, *_ in PAIRS],
)
def test_both_sides_of_a_pair_are_the_same_run(
    tool: str, theirs: str, ours: str | None, word: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "theirs.yml"
    file.write_text(theirs + "\n")
    name = theirs.partition(":")[0]
    rest = [] if name in ("dataset_name", "datasets", "dataset") else ["data=rows.jsonl"]
    rest += ["output_dir=run", *NEEDED.get(name, [])]
    if word == "refused":
        with pytest.raises(LorryError, match=name):
            parse_settings(config.RunConfig, [str(file), *rest], print)
        return
    expected = parse_settings(config.RunConfig, [*shlex.split(ours or ""), *rest], print)
    assert parse_settings(config.RunConfig, [str(file), *rest], print) == expected


# open-unlearning's are whole commands in one table and single settings in the other, both of which are
# tried in an experiment
UNLEARNING = SECTIONS["open-unlearning"]
COMMANDS = re.findall(
    r"^\| `(\S* ?[^`]*src/\w+\.py [^`]+)` \| `lorry ([^`]+)` \|", UNLEARNING, flags=re.M
)
SETTINGS = re.findall(r"^\| `([^`]+=[^`]+)` \| (?:`([^`]+)`|nothing) \|", UNLEARNING, flags=re.M)
SETTINGS = [pair for pair in SETTINGS if "src/" not in pair[0]]


def parsed(words: list[str], notes: list[str]) -> Any:
    schema = next(verb.schema for verb in cli.VERBS if verb.name == words[0])
    return parse_settings(getattr(config, schema), words[1:], notes.append)


def test_every_row_of_open_unlearning_is_tried() -> None:
    rows = [line for line in UNLEARNING.splitlines() if line[:3] == "| `"]
    assert len(COMMANDS) >= 17
    assert len(SETTINGS) >= 23
    assert len(rows) == len(COMMANDS) + len(SETTINGS)


@pytest.mark.parametrize(("theirs", "ours"), COMMANDS)
def test_a_command_of_open_unlearning_is_the_one_beside_it(theirs: str, ours: str) -> None:
    notes = list[str]()
    pasted = parsed(verb_of_launcher(shlex.split(theirs)), notes)
    assert pasted == parsed(shlex.split(ours), [])
    assert notes
    # the same behind the verb, and with what Hydra needs left out
    verb, *words = verb_of_launcher(shlex.split(theirs))
    assert verb == ours.split()[0]
    script = next(at for at, word in enumerate(words) if word.endswith(".py"))
    assert parsed([verb, *words[script + 1 :]], []) == pasted


@pytest.mark.parametrize(("theirs", "ours"), SETTINGS)
def test_a_setting_of_open_unlearning_is_the_one_beside_it(theirs: str, ours: str) -> None:
    # shlex would take the backslash of a regular expression
    before, after = (
        ["unlearn", "experiment=unlearn/tofu/lora", *text.split()] for text in (theirs, ours)
    )
    notes = list[str]()
    assert parsed(before, notes) == parsed(after, [])
    assert any(theirs.lstrip("+").partition("=")[0] in note for note in notes)


def test_the_program_for_people_who_use_peft_runs_and_peft_reads_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", SECTIONS["PEFT"], flags=re.S)
    model = random_model(LLAMA)
    exec(compile(program, "docs/migrating.md", "exec"), {"model": model})
    found = PeftModel.from_pretrained(random_model(LLAMA), tmp_path / "adapter").peft_config[
        "default"
    ]
    assert (found.r, found.lora_alpha, set(found.target_modules or ())) == (
        4,
        8,
        {"q_proj", "v_proj"},
    )
