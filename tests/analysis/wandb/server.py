"""What `wandb sync` asks a W&B server, answered; artifacts count as known, so that their content is not asked for."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Server(ThreadingHTTPServer):
    """Keeps what was sent: GraphQL variables by operation, lines by streamed file."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.operations: dict[str, list[Any]] = defaultdict(list)
        self.lines: dict[str, list[Any]] = defaultdict(list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, operation: str, variables: Any) -> dict[str, Any]:
        self.operations[operation].append(variables)
        match operation:
            case "UpsertBucket":
                project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
                bucket = {"id": "b", "name": variables["name"], "project": project, "historyLineCount": 0}
                return {"upsertBucket": {"bucket": bucket, "inserted": True}}
            case "CreateArtifact":
                known = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "a"}}}
                return {"createArtifact": {"artifact": known}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/file/{name}"} for name in variables["files"]]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content: dict[str, Any] = {}
        if self.path == "/graphql":
            question = json.loads(body)
            (operation,) = re.findall(r"(?:query|mutation)\s+(\w+)", question["query"])[:1]
            content = {"data": self.server.answer(operation, question.get("variables"))}
        elif self.path.endswith("/file_stream"):
            for name, part in json.loads(body).get("files", {}).items():
                self.server.lines[name] += [json.loads(line) for line in part["content"]]
        self._reply(json.dumps(content).encode())

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._reply(b"")

    def log_message(self, *_: Any) -> None:
        pass

    def _reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving() -> Iterator[Server]:
    """Serve in a thread."""
    with Server() as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
