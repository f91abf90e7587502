"""A stand-in for the Hugging Face Hub on this machine: what huggingface_hub asks of it to make, fill, list
and download models. Files are uploaded by LFS or within the commit; the Xet protocol is not spoken."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_sEcReTtOkEnOfATeSt"
USER = "me"


@dataclass
class Hub:
    """The content of the hub, and what was asked of it."""

    address: str = ""
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by model and name."""
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    """The models of the commits, in their order."""
    requests: list[str] = field(default_factory=list)
    """Method and path of each."""
    refuses: str = ""
    """If set, commits are refused with this message."""
    _objects: dict[str, bytes] = field(default_factory=dict)

    def sha(self, model: str) -> str:
        """The name of a model's newest version."""
        return digest(repr(sorted(self.models[model].items())).encode())


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def hub_stand_in(patch: pytest.MonkeyPatch, cache: Any) -> Iterator[Hub]:
    """A running stand-in that huggingface_hub uses, logged in, with an empty cache."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    use_hub(patch, hub.address, cache)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(patch: pytest.MonkeyPatch, address: str, cache: Any) -> None:
    """Lets huggingface_hub use this address and this cache, with the token of the test."""
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", TOKEN)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, content: Any = None, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def handle_one(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self.body = self.rfile.read(length)
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/lfs/" not in path:
                self.answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
                return
            parts = path.strip("/").split("/")
            if path == "/api/repos/create":
                self.create()
            elif path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif parts[:2] == ["api", "models"]:
                self.of_model("/".join(parts[2:4]), parts[4] if len(parts) > 4 else "")
            elif path.endswith(".git/info/lfs/objects/batch"):
                self.batch()
            elif parts[0] == "lfs":
                hub._objects[parts[1]] = self.body
                self.answer(200, {})
            else:
                self.file("/".join(parts[:2]), "/".join(parts[4:]))

        do_GET = do_HEAD = do_POST = do_PUT = handle_one

        def create(self) -> None:
            asked = json.loads(self.body)
            model = f"{asked.get('organization') or USER}/{asked['name']}"
            status = 409 if model in hub.models else 200
            hub.models.setdefault(model, {".gitattributes": b""})
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(model)
            self.answer(status, {"url": f"{hub.address}/{model}"})

        def of_model(self, model: str, what: str) -> None:
            if model not in hub.models:
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            elif model in hub.gated and what == "tree":
                self.answer(403, {"error": "gated"}, X_Error_Code="GatedRepo")
            elif what in ("revision", ""):
                names = [{"rfilename": name} for name in hub.models[model]]
                self.answer(200, {"id": model, "sha": hub.sha(model), "siblings": names, "private": False})
            elif what == "tree":
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                    for name, data in hub.models[model].items()
                ]
                self.answer(200, entries)
            elif what == "preupload":
                files = json.loads(self.body)["files"]
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
                self.answer(200, {"files": modes})
            elif what == "commit":
                self.commit(model)

        def batch(self) -> None:
            objects = [
                asked | {"actions": {"upload": {"href": f"{hub.address}/lfs/{asked['oid']}"}}}
                for asked in json.loads(self.body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})

        def commit(self, model: str) -> None:
            if hub.refuses:
                self.answer(400, {"error": hub.refuses}, X_Error_Message=hub.refuses)
                return
            files = dict(hub.models[model])
            for line in self.body.splitlines():
                operation = json.loads(line)
                kind, value = operation["key"], operation["value"]
                if kind == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif kind == "lfsFile":
                    files[value["path"]] = hub._objects[value["oid"]]
                elif kind == "deletedFile":
                    del files[value["path"]]
            hub.models[model] = files
            hub.commits.append(model)
            sha = hub.sha(model)
            self.answer(200, {"commitUrl": f"{hub.address}/{model}/commit/{sha}", "commitOid": sha})

        def file(self, model: str, name: str) -> None:
            if name not in hub.models.get(model, {}):
                self.answer(404, {"error": "not found"}, X_Error_Code="EntryNotFound")
                return
            data = hub.models[model][name]
            tag = f'"{digest(data)}"'
            self.answer(200, data, ETag=tag, X_Repo_Commit=hub.sha(model))

    return Handler
