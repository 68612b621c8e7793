"""The command line: help without torch, settings to verbs, errors and exit codes as a person or a
script sees them.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lorry import cli
from lorry.config import EvalSettings, MergeSettings, RunConfig, parse_settings
from lorry.config.parsing.names import schema_names
from lorry.errors import (
    ContractError,
    DataError,
    ModelError,
    NonFiniteError,
    OutOfMemoryError,
    RunInterruptedError,
)
from tests.support.processes import started

SRC = Path(cli.__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "numpy", "peft")
MEASURE = f"""
import sys
from lorry.cli import main
code = main(sys.argv[1:])
heavy = [name for name in {HEAVY} if name in sys.modules]
print("modules", len(sys.modules), "heavy", *heavy, file=sys.stderr)
sys.exit(code)
"""
STAND_IN = """
import sys, types
from lorry.cli import main
verb = types.ModuleType("lorry.verbs.sft")
{body}
sys.modules["lorry.verbs.sft"] = verb
sys.exit(main(["sft", "data=x"]))
"""
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
ENVIRONMENT = {**BUFFERED, "PYTHONPATH": str(SRC), "COLUMNS": "100", "TERM": "dumb"}


def python(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[object]]:
    """Install a stand-in for a verb's module; it notes what it is called with, then returns or
    raises ``outcome``.
    """

    def install(name: str, outcome: int | BaseException = 0) -> list[object]:
        calls: list[object] = []

        def main(settings: object) -> int:
            calls.append(settings)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = types.ModuleType(f"lorry.verbs.{name}")
        module.main = main  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"lorry.verbs.{name}", module)
        return calls

    return install


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["sft", "--help"], ["sft", "data=x", "--dump-config"]]
)
def test_help_is_light(argv: list[str]) -> None:
    done = python(MEASURE, *argv)
    assert done.returncode == 0, done.stderr
    measured = re.search(r"modules (\d+) heavy(.*)", done.stderr)
    assert measured
    assert measured[2].strip() == ""
    # 380 at most, a quarter of a second; torch alone brings 1,100. Seconds would say of this
    # machine and its load what they should say of the command
    assert int(measured[1]) < 600


def test_help_lists_every_verb_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert {v.name for v in cli.VERBS} == {
        "sft",
        "distill",
        "unlearn",
        "unlearn-alternates",
        "moe",
        "push",
        "compare",
        "runs",
        "sweep",
        "demo",
        "plan",
        "chat",
        "eval",
        "merge",
        "unmerge",
        "attack",
        "export",
        "report",
        "doctor",
    }
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in (v.name for v in cli.VERBS):
        assert len(re.findall(rf"^\W*{verb}\s", text, re.MULTILINE)) == 1
    assert cli.main([]) == 0
    assert capsys.readouterr().out == text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lorry ")


def test_verb_help_shows_every_setting_with_its_default_and_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["sft", "--help"]) == 0
    page = capsys.readouterr().out
    text = " ".join(page.split())
    for dotted, field in schema_names(RunConfig).fields.items():
        assert re.search(rf"^  {dotted.rpartition('.')[2]} ", page, re.MULTILINE), dotted
        assert field.description
        assert field.description in text, dotted
    for shown in (
        "[0.0002]",
        "[32; where rows choose the ranks 2 x r]",
        "[smollm2-135m-instruct]",
        "[required, unless mix is given]",
        "[runs/DATA-MODEL]",
    ):
        assert shown in text


@pytest.mark.parametrize("name", [v.name for v in cli.VERBS])
def test_every_verb_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "-h"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"Usage: lorry {name} [CONFIG.yaml] ")
    assert "  " not in page.splitlines()[0]


def test_a_verb_gets_its_settings(
    verb: Callable[..., list[object]], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = verb("sft", 7)
    assert cli.main(["sft", "data=x", "--cutoff-len", "64", "--max_steps", "-1", "--packing"]) == 7
    [run] = calls
    assert isinstance(run, RunConfig)
    assert (run.data.path, run.data.max_length, run.data.packing, run.train.max_steps) == (
        "x",
        64,
        True,
        -1,
    )
    out, err = capsys.readouterr()
    assert (out, err) == ("", "note: cutoff_len is read as data.max_length\n")


def test_a_verb_takes_bare_words(verb: Callable[..., list[object]]) -> None:
    merged, evaluated = verb("merge"), verb("eval")
    assert cli.main(["merge", "runs/a", "output_dir=m"]) == 0
    assert merged[0] == parse_settings(MergeSettings, ["run=runs/a", "output_dir=m"], print)
    assert cli.main(["eval", "runs/a", "data=f.jsonl"]) == 0
    assert evaluated[0] == parse_settings(EvalSettings, ["model=runs/a", "data=f.jsonl"], print)


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (
            DataError("people.jsonl:3: not JSON"),
            3,
            "error: people.jsonl:3: not JSON\nsee docs/data.md\n",
        ),
        (
            ContractError("nothing trained"),
            5,
            "error: nothing trained\nsee docs/architecture.md#the-contracts\n",
        ),
        (NonFiniteError("a NaN"), 6, "error: a NaN\nsee docs/architecture.md#the-contracts\n"),
        (OutOfMemoryError("too large"), 71, "error: too large\nsee docs/plan.md\n"),
        (ModelError("no such model"), 4, "error: no such model\n"),
        (RunInterruptedError("stopped at step 4"), 75, "error: stopped at step 4\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_errors_for_people(
    verb: Callable[..., list[object]], capsys: pytest.CaptureFixture[str],
    outcome: BaseException, code: int, message: str,
) -> None:  # fmt: skip
    verb("sft", outcome)
    assert cli.main(["sft", "data=x"]) == code
    assert capsys.readouterr().err == message


def test_debug_shows_the_traceback(
    verb: Callable[..., list[object]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verb("sft", DataError("bad row"))
    monkeypatch.setenv("LORRY_DEBUG", "1")
    assert cli.main(["sft", "data=x"]) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: bad row\nsee docs/data.md\n")


def test_our_own_mistakes_show_a_traceback() -> None:
    done = python(
        STAND_IN.format(body="def broken(settings): assert False, 'ours'\nverb.main = broken")
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "AssertionError: ours" in done.stderr


def test_colour_on_a_terminal_only(
    verb: Callable[..., list[object]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verb("sft", DataError("bad row"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.main(["sft", "data=x"])
    assert (
        capsys.readouterr().err == "\x1b[31merror: bad row\x1b[0m\n\x1b[2msee docs/data.md\x1b[0m\n"
    )
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(["sft", "data=x"])
    assert capsys.readouterr().err == "error: bad row\nsee docs/data.md\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sft"], "error: data.path is missing; give data=...\n"),
        (
            ["sft", "data=x", "lerning_rate=1"],
            "error: lerning_rate=1: unknown setting 'lerning_rate' (did you mean 'learning_rate'?)\n",
        ),
        (["sft", "no.yaml"], "error: no.yaml: cannot be read (No such file or directory)\n"),
        (["merge"], "error: run is missing; give run=...\n"),
        (["unlearn"], "error: unlearn.forget is missing; give forget=FILE and retain=FILE\n"),
        (["attack"], "error: attack is missing; give attack=relearn, quantize or rephrase\n"),
        (
            ["export", "runs/a"],
            "error: to is missing; give to=hf, dense, peft, gguf, gguf-lora or hf-moe\n",
        ),
        (
            ["export", "runs/a", "to=safetensors"],
            "error: to: got 'safetensors'; give one of hf, dense, peft, gguf, gguf-lora, hf-moe\n",
        ),
    ],
)
def test_wrong_settings_exit_2_with_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == message


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sf"]) == 2
    assert "'sf'" in capsys.readouterr().err


def test_dump_config_reloads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", "data=f.jsonl", "r=4", "eval=g.jsonl", "--dump-config"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["train"]["eval_strategy"] == "epoch"
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert cli.main(["sft", str(file), "--dump-config"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("lines", [1, 200_000])
def test_a_reader_that_leaves_is_no_error(lines: int) -> None:
    """One line is still in Python's buffer when the verb returns; many break the pipe inside the
    verb.
    """
    body = f"def talk(settings):\n    input()\n    for i in range({lines}): print(i)\n    return 0\nverb.main = talk"
    code = [sys.executable, "-c", STAND_IN.format(body=body)]
    with started(
        code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as talking:
        assert talking.stdin is not None
        assert talking.stdout is not None
        assert talking.stderr is not None
        talking.stdout.close()
        talking.stdin.write(b"go\n")
        talking.stdin.close()
        assert talking.stderr.read() == b""
        assert talking.wait() == cli.BROKEN_PIPE


def test_ctrl_c_exits_130() -> None:
    # whoever runs this suite in the background may ignore the signal
    body = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    # many short waits: a signal that arrives right before a long one would not end it
    body += "import time\ndef wait(settings):\n    print('ready', flush=True)\n"
    body += "    while True: time.sleep(0.01)\nverb.main = wait"
    with started(
        [sys.executable, "-c", STAND_IN.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "ready\n"
        waiting.send_signal(signal.SIGINT)
        _, err = waiting.communicate()
    assert (waiting.returncode, err) == (130, "error: interrupted\n")
