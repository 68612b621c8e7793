"""Megatron-core's layers in the place of the decoder's: what is refused, and what tells that something is
missing. That they compute the same is in `tests/contracts/test_megatron_layouts.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorry.adapters.attach import attach
from lorry.adapters.merge import merge
from lorry.adapters.mix import AdapterContext
from lorry.adapters.spec import LoraSpec
from lorry.adapters.targets.candidates import find_linears
from lorry.adapters.targets.skipped import list_skipped_modules
from lorry.backends.distributed.communicator import ONE_PROCESS
from lorry.backends.distributed.megatron import converter_of
from lorry.config.schema.backend import TrainBackendConfig
from lorry.config.schema.model import ModelConfig
from lorry.errors import ConfigError, ContractError
from lorry.families import find_family
from lorry.models.causal_lm import CausalLM, PackedInput, parameter_count
from lorry.models.converter import ModelConverter
from lorry.models.loading.load import load_model
from lorry.notes import ignore_note
from tests.support import tinyrun
from tests.support.tiny import one_thread  # noqa: F401 - a fixture

SETTINGS = TrainBackendConfig(name="megatron")
HERE = ModelConfig(name="any", device="cpu")


@pytest.fixture(scope="module")
def converter() -> Iterator[ModelConverter]:
    """One process as Megatron's only rank, on the CPU."""
    pytest.importorskip(
        "megatron.core", reason="megatron-core is an extra: pip install 'lorry[megatron]'"
    )
    from megatron.core import parallel_state

    from tests.support.cuda_shim import cuda_on_cpu

    with cuda_on_cpu():
        made = converter_of(SETTINGS, HERE, ONE_PROCESS, ignore_note)
        assert made is not None
        yield made
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinyrun.model_directory(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


def loaded(folder: Path, convert: ModelConverter | None) -> CausalLM:
    return load_model(
        folder, dtype=torch.float64, device="cpu", convert=convert, add_note=ignore_note
    ).model


def test_other_backends_have_no_converter() -> None:
    assert converter_of(TrainBackendConfig(name="ddp"), HERE, ONE_PROCESS, print) is None


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith(("megatron", "lorry.models.megatron."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(ConfigError, match=r"not installed .*pip install 'lorry\[megatron\]'"):
        converter_of(SETTINGS, HERE, ONE_PROCESS, print)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    pytest.importorskip("megatron.core")
    with pytest.raises(ConfigError, match="backend=megatron needs a CUDA device"):
        converter_of(SETTINGS, HERE, ONE_PROCESS, print)


def test_groups_are_made_once(converter: ModelConverter) -> None:
    assert converter_of(SETTINGS, HERE, ONE_PROCESS, print) is not None
    two = TrainBackendConfig(name="megatron", tensor_parallel=2)
    with pytest.raises(ConfigError, match=r"tensor_parallel=2: .*has Megatron's groups of 1"):
        converter_of(two, HERE, ONE_PROCESS, print)


def test_an_untested_version_is_told(
    converter: ModelConverter, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[str]()
    monkeypatch.setattr("megatron.core.__version__", "0.99.0")
    converter_of(SETTINGS, HERE, ONE_PROCESS, told.append)
    assert told == ["megatron-core 0.99.0 was never run with Lorry; 0.16.1 was"]


def test_ranks_have_one_version(converter: ModelConverter) -> None:
    told: Any = SimpleNamespace(exchange=lambda what, own: [own, "0.15.3"])
    with pytest.raises(ConfigError, match=r"rank 1 has megatron-core 0\.15\.3, rank 0 0\."):
        converter_of(SETTINGS, HERE, told, print)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gpt2"}, "not this one (of the family gpt2)"),
        ({"model_type": "mamba"}, "not this one (no family)"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "llama", "attention_bias": True}, "biases of other linears"),
    ],
)
def test_models_that_it_cannot_run(
    converter: ModelConverter, config: dict[str, Any], words: str
) -> None:
    whole = {**tinyrun.LLAMA, "vocab_size": 8, **config}
    family = find_family(config["model_type"])
    with pytest.raises(ConfigError) as raised:
        converter.refuse_unfit(family, whole, "no family")
    assert words in str(raised.value)
    assert "give backend=ddp or fsdp" in str(raised.value)


def test_another_family_is_refused_before_it_is_read(
    converter: ModelConverter, tmp_path: Path
) -> None:
    mamba = tinyrun.model_directory(tmp_path / "mamba", "mamba")
    with pytest.raises(ConfigError, match=r"and not this one \(.*no family"):
        loaded(mamba, converter)


def test_it_looks_like_the_decoder(converter: ModelConverter, folder: Path) -> None:
    """The same places for adapters, in their order; the same size; nothing passed over; nothing of
    Megatron's taken for a matrix that no adapter can sit on."""
    ours, theirs = loaded(folder, None), loaded(folder, converter)
    assert list(find_linears(theirs)) == list(find_linears(ours))
    assert parameter_count(theirs) == parameter_count(ours)
    adapters = [attach(each, LoraSpec(target_modules="all-linear")) for each in (ours, theirs)]
    assert adapters[0].targets() == adapters[1].targets()
    assert list_skipped_modules(theirs, adapters[1]) == []
    with pytest.raises(ConfigError, match="custom product"):
        merge(theirs)


def test_single_layers_are_refused(converter: ModelConverter, folder: Path) -> None:
    model, packed = loaded(folder, converter), PackedInput.of([[1, 2, 3]])
    for asked in ({"output_layers": [0]}, {"stop": 0}):
        with pytest.raises(ConfigError, match="behind the last layer alone"):
            model.hidden(packed, AdapterContext(), **asked)  # type: ignore[arg-type]


def test_a_weight_without_a_counterpart_is_found(
    converter: ModelConverter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorry.models.megatron import model

    monkeypatch.setattr(model, "_take_rest", lambda decoder, gpt: None)
    with pytest.raises(ContractError, match=r"Megatron's embedding.* has no counterpart"):
        loaded(folder, converter)
