"""What secrets look like, so that none leaves this machine (`hub/files.py`) or is kept in a run
(`train/monitoring/process.py`).

    match = find_secret(text, environment_secrets())  # SecretMatch("a GitHub token", 17), or None
    line = mask_secrets("hub_token=hf_...")           # "hub_token=***"

Only shapes that say by themselves what they are: a prefix that the issuer fixed, and enough
characters behind it. Entropy alone cannot tell a digest from a key, and every run has digests. The
prefixes are those that the issuers document for secret scanners.

Why no library: detect-secrets 1.5.0 (May 2024) and its maintained fork bc-detect-secrets 1.5.52
(August 2026), the pure-Python lists on PyPI, know no Hugging Face, Anthropic, OpenAI or GitLab
token and no github_pat_; their broad detectors (entropy, keywords, AC or SK and 32 letters) ask for
no fixed prefix long enough to tell a secret from a digest, and they need requests and unidiff. What
of theirs says by itself what it is stands here too (`DETECT_SECRETS` in
tests/disk/test_secret_shapes.py).

What may repeat before more must follow is bounded: a scan takes time by the size of a text alone. A
new issuer is one line here, with an example in tests/disk/test_secret_shapes.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_B64 = r"[A-Za-z0-9_-]"
# (what it is, its shape); none may begin in the middle of a word
SECRET_SHAPES: tuple[tuple[str, str], ...] = (
    (
        "a Hugging Face token",
        r"(?:hf|api_org)_(?:oauth_)?[A-Za-z0-9]{30,}|hf_(?:oauth|jwt)_[A-Za-z0-9_.-]{20,}",
    ),
    ("an Anthropic key", rf"sk-ant-{_B64}{{20,}}"),
    (
        "an OpenAI key",
        rf"sk-(?:proj|svcacct|admin|None)-{_B64}{{20,}}|sk-{_B64}{{0,200}}T3BlbkFJ{_B64}{{16,}}",
    ),
    ("a key of OpenAI's kind", r"sk-[A-Za-z0-9]{32,}"),  # DeepSeek and others take its prefix
    ("an OpenRouter key", r"sk-or-v1-[0-9a-f]{40,}"),
    ("a LangSmith key", r"ls(?:v2_(?:pt|sk)_|__)[0-9a-f]{32}(?:_[0-9a-f]{10})?"),
    ("a GitHub token", r"gh[pousr]_[A-Za-z0-9_]{36,}|github_pat_[A-Za-z0-9_]{36,}"),
    (
        "a GitLab token",
        rf"(?:glpat|gldt|glft|glsoat|glrt|glptt|glagent|gloas|glimt|glcbt)-{_B64}{{20,}}",
    ),
    ("an AWS key", r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9+/=])"),
    (
        "a Google key",
        rf"AIza{_B64}{{35}}(?!{_B64})|GOCSPX-{_B64}{{28}}(?!{_B64})|ya29\.{_B64}{{40,}}",
    ),
    ("an Azure storage key", r"AccountKey=[A-Za-z0-9+/]{80,}={0,2}"),
    ("a Slack token", r"xox[abeoprs]-[A-Za-z0-9-]{20,}|xapp-\d-[A-Za-z0-9-]{20,}"),
    ("a Slack webhook", r"hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9/_-]{30,}"),
    ("a Stripe key", r"(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{20,}"),
    ("a Square secret", rf"sq0csp-{_B64}{{43}}"),
    ("a Mailchimp key", r"[0-9a-f]{32}-us[0-9]{1,2}(?![0-9A-Za-z])"),
    ("a Discord token", rf"[MNO][A-Za-z0-9_-]{{23,25}}\.{_B64}{{6}}\.{_B64}{{27,38}}(?!{_B64})"),
    ("a SendGrid key", rf"SG\.{_B64}{{20,24}}\.{_B64}{{39,50}}"),
    ("a PyPI token", rf"pypi-AgE{_B64}{{50,}}"),
    ("an npm token", r"npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])"),
    ("a Docker token", rf"dckr_(?:pat|oat)_{_B64}{{24,}}"),
    ("a Weights & Biases key", r"wandb_v1_[A-Za-z0-9_]{40,}"),
    ("a Replicate token", r"r8_[A-Za-z0-9]{37}(?![A-Za-z0-9])"),
    ("a Groq key", r"gsk_[A-Za-z0-9]{48,}"),
    ("an xAI key", r"xai-[A-Za-z0-9]{70,}"),
    ("a Perplexity key", r"pplx-[A-Za-z0-9]{40,}"),
    ("an NVIDIA key", rf"nvapi-{_B64}{{50,}}"),
    ("a Databricks token", r"dapi[0-9a-f]{32}(?:-\d)?(?![0-9a-f])"),
    ("a DigitalOcean token", r"do[opr]_v1_[0-9a-f]{64}"),
    ("a Tailscale key", r"tskey-[a-z]+-[A-Za-z0-9-]{20,}"),
    ("a Vault token", rf"hv[sb]\.{_B64}{{24,}}"),
    ("an age key", r"AGE-SECRET-KEY-1[0-9A-Z]{50,}"),
    (
        "a private key",
        r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,6}PRIVATE KEY(?: BLOCK)?-----"
        r"|---- BEGIN SSH2 ENCRYPTED PRIVATE KEY|PuTTY-User-Key-File-[23]:",
    ),
    ("a JSON web token", rf"eyJ{_B64}{{15,1000}}\.eyJ{_B64}{{15,4000}}\.{_B64}{{20,}}"),
    (
        "a password in an address",
        r"[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>{}$*]{1,100}:[^\s/:@\"'<>{}$*]{6,200}@[A-Za-z0-9]",
    ),
)
_BEGIN = r"(?:(?<![A-Za-z0-9_])|(?<=\\[nrt]))"  # JSON writes a line break before one as a letter
# one pattern of all shapes, each a group of its number, so that a text is read once
_ANY = re.compile(
    _BEGIN
    + "(?:"
    + "|".join(f"(?P<s{n}>{shape})" for n, (_, shape) in enumerate(SECRET_SHAPES))
    + ")"
)
# Of an environment variable, or of a setting on a command line.
_VARIABLE = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|(?:^|_)PAT)$")
_SETTING = re.compile(
    r"token(?!s|i)|secret|passw|passphrase|credential|(?:^|[-_.])(?:api|access|private)?[-_]?key$|(?:^|[-_.])pat$",
    re.I,
)
SHORTEST_SECRET = 12  # characters of a variable's value: a shorter one stands anywhere by chance
# values that such a variable has without being secret: a plain word, a path, a number, a switch
NO_SECRET = re.compile(r"[a-z]{1,15}|/.*|[0-9]{1,15}|(?i:true|false|none|null)")


@dataclass(frozen=True)
class SecretMatch:
    """What a text holds, and the character at which it begins."""

    what: str
    at: int


def find_secret(text: str, secrets: Mapping[str, str] | None = None) -> SecretMatch | None:
    """The first secret of a text: one of ``secrets`` (name -> value), or something of a known
    shape.
    """
    matches = [
        SecretMatch(name, at)
        for name, value in (secrets or {}).items()
        if (at := text.find(value)) >= 0
    ]
    if match := _ANY.search(text):
        matches.append(
            SecretMatch(SECRET_SHAPES[int((match.lastgroup or "s0")[1:])][0], match.start())
        )
    return min(matches, key=lambda match: match.at, default=None)


def environment_secrets() -> dict[str, str]:
    """The variables whose name says that they hold a secret, where the value is long enough to be
    one.
    """
    named = {name: value for name, value in os.environ.items() if _VARIABLE.search(name.upper())}
    return {
        name: value
        for name, value in named.items()
        if len(value) >= SHORTEST_SECRET and not NO_SECRET.fullmatch(value)
    }


def names_secret(setting: str) -> bool:
    """Whether a setting's name says that its value is a secret: hub_token, --api-key, password."""
    return bool(_SETTING.search(setting))


def mask_secrets(text: str) -> str:
    """The text with *** in the place of everything of a known shape."""
    return _ANY.sub("***", text)
