"""A stand-in for the Hugging Face hub on 127.0.0.1: accounts, repositories, uploads, as
huggingface_hub asks for them.

with Hub() as hub: HfApi(endpoint=hub.url, token=hub.token).whoami()

It keeps what it was sent (`files`), refuses what the hub refuses (tokens, namespaces, invalid front
matter, bytes that are not those of their digest) and can die in the middle. A thousand requests are
the most that it answers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from types import TracebackType
from typing import Any

import yaml

MOST = 1000
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
Answer = tuple[int, Any]


class Hub:
    """One user, ``me``, who may write to ``me`` and ``team``. ``dies_at``: a word of the path at
    which it hangs up for good.
    """

    token = "hf_" + "s" * 34

    def __init__(self, *, dies_at: str | None = None) -> None:
        self.files: dict[str, dict[str, bytes]] = {}  # repository -> path -> content, as committed
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.dies_at, self.dead, self.lock = dies_at, False, Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    # --- the routes, by method and pattern of the path

    def routes(self) -> list[tuple[str, str, Callable[..., Answer]]]:
        return [
            (
                "GET",
                r"/api/whoami-v2",
                lambda body: (200, {"type": "user", "name": "me", "orgs": [{"name": "team"}]}),
            ),
            ("POST", r"/api/repos/create", self.create),
            ("GET", r"/api/models/([\w.-]+/[\w.-]+)", self.info),
            ("POST", r"/api/validate-yaml", lambda body: validated(json.loads(body)["content"])),
            ("POST", r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", self.preupload),
            ("POST", r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", self.batch),
            ("PUT", r"/store/([0-9a-f]{64})", self.put),
            (
                "POST",
                r"/verify",
                lambda body: (200 if json.loads(body)["oid"] in self.objects else 404, {}),
            ),
            ("POST", r"/api/models/([\w.-]+/[\w.-]+)/commit/main", self.commit),
        ]

    def create(self, body: bytes) -> Answer:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo.split("/")[0] not in ("me", "team"):
            return 403, {
                "error": "You don't have the rights to create a model under this namespace"
            }
        if repo in self.files:
            return 409, {
                "error": "You already created this model repo",
                "url": f"{self.url}/{repo}",
            }
        self.files[repo], self.private[repo] = (
            {},
            asked.get("visibility") == "private" or bool(asked.get("private")),
        )
        return 200, {"url": f"{self.url}/{repo}", "id": repo}

    def info(self, body: bytes, repo: str) -> Answer:
        known = repo in self.files
        return (
            (200, {"id": repo, "private": self.private[repo], "sha": "0" * 40})
            if known
            else (404, {"error": "not found"})
        )

    def preupload(self, body: bytes, repo: str) -> Answer:
        def mode(file: dict[str, Any]) -> str:
            return (
                "lfs"
                if file["path"].endswith((".safetensors", ".png")) or file["size"] > 10 << 20
                else "regular"
            )

        files = json.loads(body)["files"]
        return 200, {
            "files": [
                {"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False, "oid": None}
                for f in files
            ]
        }

    def batch(self, body: bytes, repo: str) -> Answer:
        def entry(one: dict[str, Any]) -> dict[str, Any]:
            actions = {
                "upload": {"href": f"{self.url}/store/{one['oid']}"},
                "verify": {"href": f"{self.url}/verify"},
            }
            return {**one, "actions": actions}

        return 200, {
            "transfer": "basic",
            "objects": [entry(one) for one in json.loads(body)["objects"]],
        }

    def put(self, body: bytes, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "not the bytes of this digest"}
        self.objects[oid] = body
        return 200, {}

    def commit(self, body: bytes, repo: str) -> Answer:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.objects[value["oid"]]
            else:
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40}


def validated(card: str) -> Answer:
    """The hub's answer to a card's front matter: what it is known to refuse (docs/hub/model-cards)."""
    found = re.match(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))", card)
    meta = yaml.safe_load(found[2]) if found else None
    if not isinstance(meta, dict):
        return 400, {"errors": [{"message": "empty or missing yaml metadata"}], "warnings": []}
    ids = [*([meta["base_model"]] if "base_model" in meta else []), *meta.get("datasets", [])]
    errors = [f"{name!r} is not a valid id" for name in ids if not HUB_ID.fullmatch(name)]
    errors += (
        ["license must be a lower-case id"]
        if not re.fullmatch(r"[a-z0-9.-]+", meta.get("license", "mit"))
        else []
    )
    for model in meta.get("model-index", []):
        for result in model["results"]:
            whole = (
                {"task", "dataset", "metrics"} <= result.keys()
                and result["dataset"]["type"]
                and result["dataset"]["name"]
            )
            errors += (
                []
                if whole and all(m["type"] and m["value"] is not None for m in result["metrics"])
                else ["model-index"]
            )
    return (400 if errors else 200), {"errors": [{"message": e} for e in errors], "warnings": []}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 20

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.answer()

        do_POST = do_PUT = do_GET

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def answer(self) -> None:
            path = self.path.split("?")[0]
            with hub.lock:
                hub.asked.append(f"{self.command} {path}")
                hub.dead |= (hub.dies_at is not None and hub.dies_at in path) or len(
                    hub.asked
                ) > MOST
                dead = hub.dead
            if dead:
                self.close_connection = True
                self.connection.close()
                return
            self.send(*self.found(path, self.body()))

        def found(self, path: str, body: bytes) -> Answer:
            if (
                not path.startswith("/store/")
                and self.headers.get("Authorization") != f"Bearer {hub.token}"
            ):
                return 401, {"error": "Invalid credentials in Authorization header"}
            for method, pattern, serve in hub.routes():
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    with hub.lock:
                        return serve(body, *match.groups())
            return 404, {"error": f"no route {path}"}

        def send(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
