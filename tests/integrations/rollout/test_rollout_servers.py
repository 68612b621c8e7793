"""Adapters pushed to servers: the calls of vLLM and SGLang against a stand-in that answers by
transformers and PEFT (float32), and every way in which one can look healthy and not be."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.errors import ConfigError, ContractError
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.integrations.rollout import (
    AdapterSync,
    DirectoryReader,
    EngineError,
    SglangServer,
    VersionPublisher,
    VllmServer,
    check_held,
    measure_gap,
)
from lorry.runs.layout import ADAPTER_WEIGHTS
from tests.support.rollout_policy import PROMPTS, Policy
from tests.support.rollout_server import RolloutServer
from tests.support.tiny import one_thread

__all__ = ["one_thread"]
Client = Callable[[str], VllmServer | SglangServer]
BOTH = pytest.mark.parametrize("client", [VllmServer, SglangServer])


@BOTH
def test_every_version_is_loaded_under_its_own_name_and_answers_as_the_trainer_does(
    policy: Policy, tmp_path: Path, client: Client
) -> None:
    with RolloutServer(policy.base) as server:
        engine = client(server.url)
        sync = policy.sync(tmp_path / "out", engine)
        reports = [sync.push(policy.step(), stepped=True) for _ in range(3)]
        # the one before goes once the new one is proved
        assert set(engine.list_lora_adapters()) == {"lora_v000003"}
        base = engine.generate(PROMPTS, SamplingParams(max_new_tokens=5), adapter=None)
        ours = engine.generate(PROMPTS, SamplingParams(max_new_tokens=5), adapter="lora_v000003")
    gaps = [report.gaps[engine.label] for report in reports]
    # float32 on both sides, one of them PEFT
    assert max(gap.largest for gap in gaps) < 1e-4
    assert [gap.tokens for gap in gaps] == [20, 20, 20]
    assert all(gap.share == pytest.approx(1, abs=1e-3) for gap in gaps)
    assert base != ours
    assert "digests equal" in str(reports[0])
    assert "over 20 tokens, share 1.00 +- 0.00" in str(reports[0])
    sync.check_rollouts("lora_v000003")
    with pytest.raises(
        ContractError, match="sampled from lora_v000002, and the policy is lora_v000003"
    ):
        sync.check_rollouts("lora_v000002")


@BOTH
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("never", ContractError, "does not hold lora_v000002; it holds lora_v000001"),
        ("unlisted", ContractError, "does not hold lora_v000002"),
        ("elsewhere", ContractError, "read lora_v000002 from /elsewhere, not from"),
        ("stale", ContractError, r"at token \d of prompt \d \(bound 0\.001\)"),
        ("base", ContractError, r"at token \d of prompt \d \(bound 0\.001\)"),
        ("twice", ContractError, r"at token \d of prompt \d \(bound 0\.001\)"),
        ("nan", ContractError, r"nan at token 0 of prompt 0"),
        ("cut", EngineError, "3 answers to 4 prompts"),
    ],
)
def test_an_engine_that_only_looks_healthy_is_found(
    policy: Policy,
    tmp_path: Path,
    client: Client,
    fault: str,
    error: type[Exception],
    message: str,
) -> None:
    with RolloutServer(policy.base) as server:
        sync = policy.sync(tmp_path / "out", client(server.url))
        sync.push(policy.step(), stepped=True)
        server.fault = fault
        with pytest.raises(error, match=message):
            sync.push(policy.step(), stepped=True)
        assert sync.current is not None
        assert sync.current.name == "lora_v000001"


@pytest.mark.parametrize(("fault", "share"), [("base", r"0\.0"), ("twice", r"(1\.9|2\.)")])
def test_within_the_bound_of_bfloat16_the_share_of_the_effect_tells(
    policy: Policy, tmp_path: Path, fault: str, share: str
) -> None:
    """A small step moves log-probabilities by less than two kernels of bfloat16 differ."""
    with RolloutServer(policy.base, fault=fault) as server:
        sync = policy.sync(tmp_path / "out", VllmServer(server.url), mean_bound=0.5, bound=1.0)
        with pytest.raises(ContractError, match=rf"shows -?{share}\d* \+- 0\.\d+ of the adapter's"):
            sync.push(policy.step(0.005), stepped=True)


def test_share_and_bounds_by_hand() -> None:
    base, policy = [[-1.0, -2.0]], [[-0.9, -2.2]]
    half = [[-0.95, -2.1]]
    gap = measure_gap(half, policy, base)
    assert (gap.mean, gap.largest) == pytest.approx((0.075, 0.1))
    assert (gap.prompt, gap.token) == (0, 1)
    assert (gap.share, gap.share_error) == pytest.approx((0.5, 0))
    # 2 x the effect, and noise on one token: y = (0.2, -0.4) + (0.1, 0)
    gap = measure_gap([[-0.7, -2.4]], policy, base)
    share = (0.1 * 0.3 + 0.2 * 0.4) / 0.05
    noise = (0.3 - share * 0.1) ** 2 + (-0.4 + share * 0.2) ** 2
    assert (gap.share, gap.share_error) == pytest.approx((share, (noise / 0.05) ** 0.5))
    assert measure_gap(policy, policy, policy).share is None


def test_a_version_may_be_asked_less_often(policy: Policy, tmp_path: Path) -> None:
    with RolloutServer(policy.base) as server:
        sync = policy.sync(tmp_path / "out", VllmServer(server.url), every=2)
        asked = [bool(sync.push(policy.step(), stepped=True).gaps) for _ in range(4)]
        silent = policy.sync(tmp_path / "other", DirectoryReader(), every=0)
    assert asked == [False, True, False, True]
    assert silent.push(policy.step(), stepped=True).gaps == {}


def test_a_receiver_that_answers_no_prompts_is_said(policy: Policy, tmp_path: Path) -> None:
    reader = DirectoryReader("archive")
    with RolloutServer(policy.base) as server:
        engine = VllmServer(server.url)
        sync = AdapterSync(VersionPublisher(tmp_path / "out"), [reader, engine], policy.probe())
        with pytest.warns(UserWarning, match="archive: answers no prompts .* is not proved"):
            report = sync.push(policy.step(), stepped=True)
    # the others are asked all the same
    assert list(report.gaps) == [engine.label]
    assert list(report.unasked) == ["archive"]
    assert str(report).endswith("; archive: not asked")


def test_a_file_that_changed_on_its_way_is_found_and_the_tensor_named(
    policy: Policy, tmp_path: Path
) -> None:
    version = VersionPublisher(tmp_path / "out").publish(policy.step())
    whole = (version.path / ADAPTER_WEIGHTS).read_bytes()
    reader = DirectoryReader()
    (version.path / ADAPTER_WEIGHTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    reader.load_lora_adapter(version)
    with pytest.raises(ContractError, match=r"\S+lora_[AB]\.weight is not what was sent"):
        check_held(reader, version)
    # and by a server, whose memory nobody can see: of the file that it names
    with RolloutServer(policy.base) as server:
        engine = VllmServer(server.url)
        engine.load_lora_adapter(version)
        with pytest.raises(ContractError, match=r"\S+lora_[AB]\.weight is not what was sent"):
            check_held(engine, version)
        (version.path / ADAPTER_WEIGHTS).unlink()
        with pytest.raises(EngineError, match="must share the directory of versions"):
            check_held(engine, version)


@BOTH
def test_refusals_say_what_the_server_said(policy: Policy, tmp_path: Path, client: Client) -> None:
    version = VersionPublisher(tmp_path / "out").publish(policy.step())
    with RolloutServer(policy.base) as server:
        engine = client(server.url)
        engine.load_lora_adapter(version)
        with pytest.raises(EngineError, match="has already been loaded"):
            engine.load_lora_adapter(version)
        engine.unload_lora_adapter(version.name)
        with pytest.raises(EngineError, match="cannot be found"):
            engine.unload_lora_adapter(version.name)
        assert engine.base_model() == "base"
    with pytest.raises(EngineError, match="is it running, and is this its address"):
        client(server.url).list_lora_adapters()
    with pytest.raises(ConfigError, match="give http://HOST:PORT"):
        client("localhost:8000")


def read_request(caller: socket.socket) -> None:
    """Read all of one request: who hangs up with some of it unread resets the connection, and the
    answer may be lost with it."""
    with caller.makefile("rb") as lines:
        head = b"".join(takewhile(lambda line: line != b"\r\n", lines))
        if length := re.search(rb"(?i)content-length: (\d+)", head):
            lines.read(int(length[1]))


@contextmanager
def answering(content: bytes) -> Iterator[str]:
    """The address of a server that says this to whoever calls, once, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            caller, _ = listener.accept()
            with caller:
                read_request(caller)
                caller.sendall(content)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)


def http_answer(value: Any) -> bytes:
    return b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(value).encode()


CHUNK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n{"


@pytest.mark.parametrize("content", [b"", CHUNK], ids=["nothing", "a part"])
def test_a_server_that_dies_while_it_answers_is_told(content: bytes) -> None:
    """Before it says anything, and in the middle."""
    with (
        answering(content) as url,
        pytest.raises(EngineError, match=r"no answer to /v1/models \(\w+.* is this its address"),
    ):
        VllmServer(url).list_lora_adapters()


CHOICE = {"token_ids": [4], "logprobs": {"token_logprobs": [-0.5]}, "index": 0}
UNLIKE = {"meta_info": {"output_token_logprobs": [[-0.5, "four"]], "finish_reason": {}}}


@pytest.mark.parametrize(
    ("client", "value", "message"),
    [
        (VllmServer, [], "base was asked, None answered"),
        (VllmServer, {"model": "base", "choices": [CHOICE, CHOICE]}, "a prompt answered twice"),
        (SglangServer, [UNLIKE], "answers without token ids"),
    ],
)
def test_answers_of_another_form_are_told(client: Client, value: Any, message: str) -> None:
    """Greedy, so that all prompts are one request."""
    params = SamplingParams(max_new_tokens=1)
    with answering(http_answer(value)) as url, pytest.raises(EngineError, match=message):
        client(url).generate([[1], [2]], params, adapter="base")


def test_no_prompts_have_no_answers() -> None:
    params = SamplingParams(max_new_tokens=1, temperature=0.7)
    assert VllmServer("http://127.0.0.1:1").generate([], params, adapter="lora") == []


def test_equal_prompts_are_sampled_with_seeds_of_their_own(policy: Policy) -> None:
    """A server draws all prompts of one request from one seed, so groups would be copies."""
    params = SamplingParams(max_new_tokens=2, temperature=0.7, top_p=0.9, seed=3)
    with RolloutServer(policy.base) as server:
        for _ in range(2):
            assert len(VllmServer(server.url).generate([PROMPTS[0]] * 4, params, adapter=None)) == 4
        asked = [body for path, body in server.asked if path == "/v1/completions"]
        SglangServer(server.url).generate([PROMPTS[0]] * 4, params, adapter=None)
        drawn = server.asked[-1][1]["sampling_params"]
    seeds = [body["seed"] for body in asked]
    assert [len(body["prompt"]) for body in asked] == [1] * 8
    assert len(set(seeds)) == 4
    assert sorted(seeds[:4]) == sorted(seeds[4:])
    assert {(b["temperature"], b["top_p"], b["max_tokens"], b["logprobs"]) for b in asked} == {
        (0.7, 0.9, 2, 0)
    }
    assert sorted(each["sampling_seed"] for each in drawn) == sorted(seeds[:4])


def test_an_adapter_that_is_not_loaded_is_not_answered_by_the_base(policy: Policy) -> None:
    with (
        RolloutServer(policy.base) as server,
        pytest.raises(EngineError, match="`lora_v000009` does not exist"),
    ):
        VllmServer(server.url).generate(PROMPTS, SamplingParams(), adapter="lora_v000009")


def test_a_vllm_that_takes_no_adapters_at_run_time_is_told_how_to(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = VersionPublisher(tmp_path / "out").publish(policy.step())
    with RolloutServer(policy.base) as server:
        monkeypatch.setattr(server, "load", lambda *_: (404, {"detail": "Not Found"}))
        with pytest.raises(
            EngineError, match="start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        ):
            VllmServer(server.url).load_lora_adapter(version)


def test_a_reader_refuses_what_an_engine_refuses(policy: Policy, tmp_path: Path) -> None:
    version, reader = VersionPublisher(tmp_path / "out").publish(policy.step()), DirectoryReader()
    with pytest.raises(ContractError, match="does not hold lora_v000001; it holds none"):
        check_held(reader, version)
    reader.load_lora_adapter(version)
    check_held(reader, version)
    with pytest.raises(EngineError, match="lora_v000001 is loaded already"):
        reader.load_lora_adapter(version)
    reader.unload_lora_adapter(version.name)
    with pytest.raises(EngineError, match="lora_v000001 is not loaded"):
        reader.unload_lora_adapter(version.name)
    with pytest.raises(ConfigError, match="name at least one"):
        AdapterSync(VersionPublisher(tmp_path / "out"), [])


def test_an_answer_without_log_probabilities_is_named(policy: Policy) -> None:
    answers = [Completion([1], "length", [-0.5])] * 3 + [Completion([1], "length")]
    with pytest.raises(ContractError, match="answered prompt 3 without a token or its log"):
        policy.probe().compare(answers, "engine", "lora_v000001")


def test_the_trainers_side_scores_the_tokens_that_were_given(policy: Policy) -> None:
    """Against the model's own logits, teacher-forced, float32."""
    policy.step()
    answers = [[3, 1, 4], [1], [5, 9], [2, 6, 5, 3]]
    got = policy.probe().score(PROMPTS, answers)
    for prompt, answer, values in zip(PROMPTS, answers, got, strict=True):
        with torch.no_grad():
            logits = policy.model(torch.tensor([[*prompt, *answer]])).logits[0].double()
        scores = torch.log_softmax(logits, -1)
        expected = [float(scores[len(prompt) - 1 + at, t]) for at, t in enumerate(answer)]
        assert values == pytest.approx(expected, abs=1e-5)


@BOTH
@pytest.mark.parametrize(
    ("said", "told"),
    [(b"nonsense\r\n\r\n", "no answer to"), (b"HTTP/1.1 200 OK\r\n\r\n[1]", "list models|answer")],
    ids=["no HTTP", "no object"],
)
def test_what_a_server_would_not_say_is_an_error_of_the_engine(
    client: Client, said: bytes, told: str
) -> None:
    def answer(listening: socket.socket) -> None:
        for _ in range(2):
            connection, _ = listening.accept()
            with connection:
                read_request(connection)
                connection.sendall(said)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        engine = client(f"http://127.0.0.1:{listening.getsockname()[1]}")
        engine.timeout = 10
        threading.Thread(target=answer, args=(listening,), daemon=True).start()
        with pytest.raises(EngineError, match=told):
            engine.list_lora_adapters()
        with pytest.raises(EngineError, match=told):
            engine.generate([[1, 2]], SamplingParams(max_new_tokens=2), adapter="lora_v000001")
