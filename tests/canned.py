"""A server of the standard library that speaks as OpenAI's API does and answers by a function of the request."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(content: str | None = None, *calls: dict, tokens: int | None = None, finish: str = "stop") -> dict:
    """Return a chat completion that calls tools, with arguments as JSON text unless they are a text already."""
    called = [
        {"id": f"c{index}", "type": "function", "function": {"name": call["name"], "arguments": to_text(call)}}
        for index, call in enumerate(calls)
    ]
    message = {"role": "assistant", "content": content} | ({"tool_calls": called} if called else {})
    usage = {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1} if tokens else None
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def to_text(call: dict) -> str:
    return call["arguments"] if isinstance(call["arguments"], str) else json.dumps(call["arguments"])


class Canned(ThreadingHTTPServer):
    """A server whose `reply(body)` is a JSON value, (status, JSON value), a text of HTML, or None to hang up."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, reply, models=("tuned",), port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.reply, self.models, self.requests, self.headers, self.lock = reply, models, [], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client may hang up."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]}
        known = {"/v1/models": listed, "/health": {}}
        self.send(known.get(self.path, (404, {"error": {"message": "no such page"}})))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.headers.append(self.headers)
            reply = self.server.reply(body)
        self.send(reply if self.path == "/v1/chat/completions" else (404, {}))

    def send(self, reply):
        if reply is None:
            return self.connection.close()
        status, value = reply if isinstance(reply, tuple) else (200, reply)
        kind, text = ("text/html", value) if isinstance(value, str) else ("application/json", json.dumps(value))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(text.encode())
