"""Names from elsewhere never speak to the terminal: keys, columns, tensors, overrides, runs,
metrics, models, adapters.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lorry.console import VisibleConsole
from lorry.visible import escape_document, is_visible, make_visible, visible_message
from tests.support.runs import full
from tests.support.verbworld import World, lorry

EVIL = "\x1b]0;pwned\x07\x9b2J\u202eevil\x08\r"
SPEAKS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def spoken(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command; what it wrote to both streams, which nothing in it can make a terminal obey."""

    def run(*argv: object) -> str:
        assert lorry(*argv) != 130
        out, err = capfd.readouterr()
        assert not SPEAKS.search(out + err), (out + err)[-2000:]
        assert "Traceback" not in err
        return out + err

    return run


def test_overrides_and_verbs(spoken: Callable[..., str], world: World) -> None:
    for argv in (
        [EVIL], [f"{EVIL}sft"], ["sft", f"{EVIL}=1"], ["sft", f"data={EVIL}", f"model={world.base}"], ["sft", f"r={EVIL}"],
        ["sft", f"model={EVIL}", "data=x"], ["sft", f"output_dir=x{EVIL}", "data=x"], ["sft", f"jobs=[{{name: '{EVIL}'}}]"],
        ["runs", EVIL], ["report", EVIL], ["doctor", EVIL], ["plan", EVIL], ["merge", EVIL, "output_dir=x"], ["push", EVIL],
        ["sft", f"{EVIL}.yaml"], ["sft", "data=x", f"system={EVIL}", "--dump-config"],
    ):  # fmt: skip
        spoken(*argv)


def test_names_inside_files(spoken: Callable[..., str], world: World, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({EVIL: "a", f"{EVIL}2": "b"}) + "\n")
    assert "evil" in spoken(
        "sft", f"model={world.base}", f"data={rows}", f"output_dir={tmp_path / 'o'}", "max_steps=1"
    )
    rows.write_text(json.dumps({"prompt": "a", "completion": "b", EVIL: "c"}) + "\n")
    spoken(
        "sft",
        f"model={world.base}",
        f"data={rows}",
        f"output_dir={tmp_path / 'o'}",
        "max_steps=1",
        "dtype=float32",
    )

    adapter = tmp_path / "adapter"
    shutil.copytree(world.run, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, EVIL: 1}))
    assert "evil" in spoken("merge", adapter, f"output_dir={tmp_path / 'm'}")

    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    (base / "config.json").write_text(json.dumps({"model_type": EVIL}))
    assert "evil" in spoken("sft", f"model={base}", f"data={rows}", f"output_dir={tmp_path / 'p'}")
    shutil.copy(world.base / "config.json", base / "config.json")
    tensors = load_file(base / "model.safetensors")
    save_file(
        {EVIL if n == 3 else name: t for n, (name, t) in enumerate(tensors.items())},
        base / "model.safetensors",
    )
    assert "evil" in spoken("sft", f"model={base}", f"data={rows}", f"output_dir={tmp_path / 'p'}")


def test_names_inside_runs(spoken: Callable[..., str], tmp_path: Path) -> None:
    one, two = full(tmp_path / f"one{EVIL}", text=EVIL), full(tmp_path / "two", text=EVIL, rank=4)
    with (one / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 999, EVIL: 1.0, f"eval_{EVIL}": 1.0}) + "\n")
    shutil.copytree(two, tmp_path / f"three{EVIL}")
    (tmp_path / f"three{EVIL}" / "receipt.json").write_text("[")
    three = tmp_path / f"three{EVIL}"
    for argv in (
        ["runs", tmp_path], ["runs", tmp_path, "format=json"], ["report", one, two, three, f"output_dir={tmp_path / 'page'}"],
        ["compare", one, two, three], ["compare", one, two, "format=json"], ["doctor", one], ["doctor", three],
    ):  # fmt: skip
        assert "evil" in spoken(*argv)


def test_a_console_shows_what_it_would_have_obeyed() -> None:
    """Also in bars and tables, and on a terminal, where rich's own colours pass."""
    from rich.table import Table

    console = VisibleConsole(force_terminal=True, width=80)
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    with console.capture() as captured:
        console.print(table, EVIL, markup=False)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", captured.get())
    assert "evil" in plain
    assert not SPEAKS.search(plain)


def test_a_message_begins_no_line_of_its_own() -> None:
    assert visible_message("a\nerror: b") == "a\n  error: b"
    assert make_visible("é日本\n\t") == "é日本\n\t"
    assert json.loads(escape_document(json.dumps(EVIL, ensure_ascii=False))) == EVIL
    assert not SPEAKS.search(escape_document(json.dumps(EVIL, ensure_ascii=False)))
    assert [is_visible(text) for text in ("runs/é", "a\nb", "a\x1b", "\u202e")] == [
        True,
        False,
        False,
        False,
    ]
