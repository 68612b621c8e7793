"""Secrets are known by their shape and by the environment; digests, tokenizers and ordinary rows are not taken for any."""

from __future__ import annotations

import base64
import hashlib
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.disk.secret_shapes import SHAPES, find, hidden, names_secret, of_environment

HEX, MIXED = "0123456789abcdef" * 8, "aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0zA" * 8
EXAMPLES = {
    f"hf_{MIXED[:34]}": "Hugging Face", f"hf_oauth_{MIXED[:40]}": "Hugging Face",
    f"hf_jwt_{MIXED[:20]}.{MIXED[:20]}": "Hugging Face",
    f"api_org_{MIXED[:34]}": "Hugging Face", f"sk-ant-api03-{MIXED[:90]}": "Anthropic", f"sk-proj-{MIXED[:80]}": "OpenAI",
    f"sk-svcacct-{MIXED[:60]}": "OpenAI", f"sk-{MIXED[:20]}T3BlbkFJ{MIXED[:20]}": "OpenAI",
    f"sk-{MIXED[:48]}": "of OpenAI's kind",
    f"sk-or-v1-{HEX[:64]}": "OpenRouter", f"lsv2_pt_{HEX[:32]}_{HEX[:10]}": "LangSmith", f"ghp_{MIXED[:36]}": "GitHub",
    f"gho_{MIXED[:36]}": "GitHub", f"github_pat_{MIXED[:22]}_{MIXED[:59]}": "GitHub", f"glpat-{MIXED[:20]}": "GitLab",
    f"glrt-{MIXED[:20]}": "GitLab", "AKIA" + "QWERTY234567ASDF": "AWS", "ASIA" + "QWERTY234567ASDF": "AWS",
    f"AIza{MIXED[:35]}": "Google", f"GOCSPX-{MIXED[:28]}": "Google", f"AccountKey={MIXED[:86]}==": "Azure",
    f"xoxb-123456789012-123456789012-{MIXED[:24]}": "Slack", f"xoxp-{MIXED[:40]}": "Slack", f"xapp-1-{MIXED[:40]}": "Slack",
    f"https://hooks.slack.com/services/T0/B0/{MIXED[:30]}": "Slack", "sk_" + f"live_{MIXED[:24]}": "Stripe",
    "sq0csp-" + MIXED[:43]: "Square", f"{HEX[:32]}-us12": "Mailchimp", f"M{MIXED[:23]}.{MIXED[:6]}.{MIXED[:27]}": "Discord",
    "PuTTY-User-Key-File-3: ssh-ed25519": "private key", "---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----": "private key",
    f"SG.{MIXED[:22]}.{MIXED[:43]}": "SendGrid", f"pypi-AgEIcHlwaS5vcmc{MIXED[:70]}": "PyPI", f"npm_{MIXED[:36]}": "npm",
    f"dckr_pat_{MIXED[:27]}": "Docker", f"wandb_v1_{MIXED[:50]}": "Weights", f"r8_{MIXED[:37]}": "Replicate",
    f"gsk_{MIXED[:52]}": "Groq", f"xai-{MIXED[:80]}": "xAI", f"pplx-{MIXED[:48]}": "Perplexity", f"nvapi-{MIXED[:64]}": "NVIDIA",
    f"dapi{HEX[:32]}": "Databricks", f"dop_v1_{HEX[:64]}": "DigitalOcean", f"tskey-auth-{MIXED[:30]}": "Tailscale",
    f"hvs.{MIXED[:90]}": "Vault", "AGE-SECRET-KEY-1" + "QPZRY9X8" * 8: "age key", "-----BEGIN PRIVATE KEY-----": "private key",
    "-----BEGIN RSA PRIVATE KEY-----": "private key", "-----BEGIN OPENSSH PRIVATE KEY-----": "private key",
    "-----BEGIN PGP PRIVATE KEY BLOCK-----": "private key", f"eyJ{MIXED[:20]}.eyJ{MIXED[:40]}.{MIXED[:43]}": "JSON web token",
    "https://me:hunter2hunter2@example.org/x": "password in an address", "postgres://u:s3cr3t99@db": "password in an address",
}  # fmt: skip


# Strings of our own of the shapes that detect-secrets' detectors document (bc-detect-secrets 1.5.52)
DETECT_SECRETS = [
    "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", "ghs_" + "a_B3" * 9, "AKIA" + "1234567890ABCDEF", "ABIA" + "Z" * 16,
    "sk_" + "live_ReTllpYQYfIZu2Jnf2lAPFjD", "rk_" + "live_5TcWfjKmJgpql9hjpRnwRXbT",
    "sq0csp-" + "ABCDEFGHIJK_LMNOPQRSTUVWXYZ-0123456789abcde",
    "343ea45721923ed956e2b38c31db76aa-us30", "MTk4NjIyNDgzNDcxOTI1MjQ4.Cl2FMQ.ZnCjm1XVW7vRze4b7Cq4se7kKWs",
    "xox" + "b-34532454-e039d02840a0b9379c", "https://hooks.slack.com/services/Txxxxxxxx/Bxxxxxxxx/xxxxxxxxxxxxxxxxxxxxxxxx",
    "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", "npm_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "AccountKey=lJzRc1YdHaAA2KCNJJ1tkYwF/+mKK6Ygw0NGe170Xu592euJv2wYUtBlV8z+qnlcNQSnIYVTkLWntUO1F8j8rQ==",
    "https://username:wh4tever@google.com", "-----BEGIN DSA PRIVATE KEY-----", "-----BEGIN EC PRIVATE KEY-----",
    "-----BEGIN OPENSSH PRIVATE KEY-----", "-----BEGIN PGP PRIVATE KEY BLOCK-----", "---- BEGIN SSH2 ENCRYPTED PRIVATE KEY",
    "PuTTY-User-Key-File-2: ssh-rsa\nEncryption: none",
]  # fmt: skip


@pytest.mark.parametrize("secret", DETECT_SECRETS, ids=lambda value: str(value)[:12])
def test_what_detect_secrets_documents_is_found(secret: str) -> None:
    assert find(f"x = '{secret}'") is not None


@pytest.mark.parametrize(("secret", "what"), EXAMPLES.items(), ids=lambda value: str(value)[:14])
def test_every_shape_is_known_wherever_it_stands(secret: str, what: str) -> None:
    for text in (secret, f"token: {secret}\n", json.dumps({"x": f"a\n{secret}"}), f"'{secret}'", f"--key={secret}"):
        found = find(text)
        assert found is not None, text
        assert what in found.what
        assert text[found.at :].startswith(secret[:8]) or "://" in secret
    assert secret not in hidden(f"run {secret} now")


def test_every_entry_has_an_example() -> None:
    named = {found.what for secret in EXAMPLES if (found := find(secret)) is not None}
    assert named == {what for what, _ in SHAPES}


@pytest.mark.parametrize(
    "text",
    [
        hashlib.sha256(b"x").hexdigest(), hashlib.sha512(b"y").hexdigest(), base64.b64encode(bytes(range(256)) * 20).decode(),
        "sha256-" + base64.b64encode(hashlib.sha256(b"z").digest()).decode(), "model.layers.0.self_attn.q_proj.lora_A.weight",
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct?x=1", "a task-specific sk-learn pipeline; desk-lamp",
        "What does -----BEGIN CERTIFICATE----- mean?", "Time: 12:30@noon, mail me@example.org", "git@github.com:user/repo.git",
        "https://example.org:8080/@user", "the key is under the mat; password: none", "ghp_ is the prefix", "AKIAble", "hf_hub",
        "http://{user}:{password}@host", "token: <|im_start|>", "019a3b5c-7d1e-7f00-8000-0123456789ab",
    ],
)  # fmt: skip
def test_ordinary_text_passes(text: str) -> None:
    assert find(text) is None
    assert hidden(text) == text


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=0, max_size=600))
def test_random_bytes_in_base64_and_hexadecimal_pass(raw: bytes) -> None:
    assert find(base64.b64encode(raw).decode()) is None
    assert find(raw.hex()) is None


def test_a_large_file_takes_no_time() -> None:
    text = json.dumps({f"Ġtoken{n}": n for n in range(50_000)}) + "".join(
        part * 20_000 for part in ("sk-", "a://b:", "-eyJ-", "x:")
    )
    begun = time.thread_time()
    assert find(text) is None
    assert time.thread_time() - begun < 20


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "MY_KEY",
        "GH_PAT",
        "PAT",
        "NPM_TOKEN",
        "DB_PASSWORD",
        "CLIENT_SECRET",
        "AWS_SECRET_ACCESS_KEY",
        "X_CREDENTIALS",
    ):
        monkeypatch.setenv(name, f"an-odd-value-of-{name}")
    for name, value in (
        ("PATH_KEY", "/home/me/.ssh/id"), ("SORT_KEY", "name"), ("SHORT_TOKEN", "abc123"), ("N_KEY", "123456789012"),
        ("SPAT", "an-odd-value-of-spat"), ("KEYBOARD", "an-odd-value-of-keyboard"), ("TOKENIZER", "an-odd-value-of-it"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    found = of_environment()
    assert {
        "MY_KEY",
        "GH_PAT",
        "PAT",
        "NPM_TOKEN",
        "DB_PASSWORD",
        "CLIENT_SECRET",
        "AWS_SECRET_ACCESS_KEY",
        "X_CREDENTIALS",
    } <= set(found)
    assert not {"PATH_KEY", "SORT_KEY", "SHORT_TOKEN", "N_KEY", "SPAT", "KEYBOARD", "TOKENIZER"} & set(found)
    held = find("x\nan-odd-value-of-MY_KEY", found)
    assert held is not None
    assert (held.what, held.at) == ("MY_KEY", 2)


def test_names_of_settings() -> None:
    secret = ("hub_token", "--api-key", "api_key", "password", "train.hub_token", "--github-pat", "CLIENT_SECRET", "access_key")
    plain = ("max_new_tokens", "tokenizer", "tokenize", "data", "monkey", "key_value", "path", "pattern", "rank_pattern", "model")
    assert [names_secret(name) for name in secret] == [True] * len(secret)
    assert [names_secret(name) for name in plain] == [False] * len(plain)
