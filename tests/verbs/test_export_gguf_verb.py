"""`lorry export to=gguf` and `to=gguf-lora`: what is said, what is refused, what a wrong file comes
to. llama.cpp reads the files in tests/models/test_gguf_llamacpp.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

import lorry as library
from lorry.models.gguf import lora, writer
from lorry.models.gguf.architecture import GgufArchitecture
from tests.support.llamacpp import LlamaCpp
from tests.support.verbworld import World, lorry, model_directory, train

PROMPT = "<|im_start|>user\nWhere does Ilse live?<|im_end|>\n<|im_start|>assistant\n"


def test_a_run(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert lorry("export", world.run, "to=gguf", "outtype=Q8_0", f"output_dir={output}") == 0
    out, err = capsys.readouterr()
    file = output / "people-q8_0.gguf"
    assert out == f"{file}\n"
    assert [path.name for path in output.iterdir()] == [file.name]
    assert "read back: 21 tensors" in err
    assert "reloaded by transformers: largest logit difference" in err
    assert "rounding changed logits by" in err
    assert "2 tensors are stored in f16" in err  # rows of 48
    fields = GGUFReader(file).fields
    assert fields["general.file_type"].contents() == 7
    assert fields["general.name"].contents() == "people"
    assert "im_start" in fields["tokenizer.chat_template"].contents()


def test_text_goes_through_llama_cpps_own_tokenizer(world: World, tmp_path: Path) -> None:
    for settings in (("to=gguf",), ("to=gguf", "outtype=f16")):
        output = tmp_path / settings[-1]
        assert lorry("export", world.run, *settings, f"output_dir={output}") == 0
        (file,) = output.iterdir()
        assert LlamaCpp(file).greedy(PROMPT, 16) == "Ilse lives in Kyoto."


def test_an_adapter_beside_its_base(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, one, half = tmp_path / "base", tmp_path / "one", tmp_path / "half"
    assert lorry("export", world.base, "to=gguf", f"output_dir={base}") == 0
    assert lorry("export", world.run, "to=gguf-lora", f"output_dir={one}") == 0
    capsys.readouterr()
    assert lorry("export", world.run, "to=gguf-lora", "weight=0.5", f"output_dir={half}") == 0
    out, err = capsys.readouterr()
    assert out == f"{half / 'people-lora-f32.gguf'}\n"
    assert "read back: 28 matrices" in err
    assert "--lora people-lora-f32.gguf" in err
    file = base / "base-f32.gguf"
    assert LlamaCpp(file, lora=[one / "people-lora-f32.gguf"]).greedy(PROMPT, 16) == (
        "Ilse lives in Kyoto."
    )
    # g = 0.5 in the file, against g = 0.5 in our bank
    model, words = library.load(world.run, dtype="float32")
    ids = words(PROMPT).input_ids
    from lorry.adapters.attach import get_bank
    from lorry.adapters.mix import Mix

    get_bank(model).activate(Mix.constants({"people": 0.5}))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    found = LlamaCpp(file, lora=[half / "people-lora-f32.gguf"]).log_probabilities(ids)
    assert max(abs(float(expected[i]) - value) for i, value in found.items()) < 5e-4


def test_default_places(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.symlink_to(world.run)
    assert lorry("export", run, "to=gguf") == 0
    assert lorry("export", run, "to=gguf", "outtype=f16") == 0
    assert lorry("export", run, "to=gguf-lora") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "run",
        "run-f16-gguf",
        "run-gguf",
        "run-gguf-lora",
    ]


def test_a_head_that_leaves_the_embedding(world: World, tmp_path: Path) -> None:
    """An adapter on a tied head: merged the head is a tensor of its own; llama.cpp has no place
    for the adapter alone.
    """
    base = model_directory(tmp_path / "base", tie_word_embeddings=True)
    run = train(tmp_path / "run", base, world.rows, "target_modules=[lm_head,q_proj]", steps=10)
    assert lorry("export", run, "to=gguf") == 0
    (file,) = Path(f"{run}-gguf").iterdir()
    assert "output.weight" in {tensor.name for tensor in GGUFReader(file).tensors}
    model, words = library.load(run, dtype="float32")
    ids = words(PROMPT).input_ids
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    found = LlamaCpp(file).log_probabilities(ids)
    assert max(abs(float(expected[i]) - value) for i, value in found.items()) < 5e-4


def test_no_place_for_an_adapter(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model_directory(tmp_path / "base", tie_word_embeddings=True)
    run = train(tmp_path / "run", base, world.rows, "target_modules=[lm_head,q_proj]", steps=2)
    capsys.readouterr()
    assert lorry("export", run, "to=gguf-lora") == 4
    assert (
        "llama.cpp does not support an adapter on an output head tied to them"
        in capsys.readouterr().err
    )
    assert not Path(f"{run}-gguf-lora").exists()


@pytest.mark.parametrize("wrong", ["rows of q and k left alone", "rounded twice"])
def test_another_model_is_not_kept(
    wrong: str,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nobody would see it: llama.cpp loads both files and answers fluently."""
    if wrong == "rounded twice":
        right = writer.encode_tensor

        def encode(name: str, tensor: Tensor, kind: object) -> object:
            return right(name, tensor.bfloat16().float(), kind)  # type: ignore[arg-type]

        monkeypatch.setattr(writer, "encode_tensor", encode)
    else:
        # in what writes and in what puts back alike: a check of our own reading alone passes
        for way in ("to_gguf", "from_gguf"):
            monkeypatch.setattr(GgufArchitecture, way, lambda self, name, tensor: tensor)
    assert lorry("export", world.run, "to=gguf", f"output_dir={tmp_path / 'out'}") == 5
    assert "was removed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_adapter_is_not_kept(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = writer.encode_tensor
    monkeypatch.setattr(lora, "encode_tensor", lambda n, t, kind: right(n, 1.001 * t, kind))
    assert lorry("export", world.run, "to=gguf-lora", f"output_dir={tmp_path / 'out'}") == 5
    assert "the file was removed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gelu = model_directory(tmp_path / "gelu", hidden_act="gelu")
    window = model_directory(tmp_path / "window", model_type="mistral", sliding_window=8)
    for argv, code, message in (
        ((world.run, "to=gguf", "dtype=bfloat16"), 2, "with to=gguf give outtype="),
        ((world.run, "to=hf", "outtype=f16"), 2, "outtype=f16 is for to=gguf"),
        ((world.run, "to=gguf-lora", "outtype=q8_0"), 2, "do not divide into blocks of 32"),
        ((world.run, "to=gguf", "outtype=q4_k_m"), 2, "outtype"),
        ((world.base, "to=gguf-lora"), 2, "is a plain model and has no adapter"),
        ((world.base, "to=gguf", "adapter=animals"), 2, "has no adapter"),
        ((world.base, "to=gguf", "weight=0.5"), 2, "is a plain model and has no adapter"),
        (
            (world.run, "to=gguf-lora", "weight=0"),
            2,
            "weight of people is 0, so the merged model would equal the base model",
        ),
        (
            (world.run, "to=peft", "weight=0"),
            2,
            "weight of people is 0, so the merged model would equal the base model",
        ),
        ((world.run, "to=gguf", "gate_mode=hidden"), 2, "gate_mode is not for to=gguf"),
        ((gelu, "to=gguf"), 4, "hidden_act='gelu'"),
        ((window, "to=gguf"), 4, "sliding_window=8"),
        ((world.run, "to=gguf", f"output_dir={world.base}"), 2, "already exists and is not empty"),
    ):
        assert lorry("export", *argv) == code
        assert message in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"gelu", "window"}
