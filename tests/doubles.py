"""Test doubles: programs of llama.cpp that note what they are asked for, and a Hugging Face Hub on this machine."""

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_" + "secretsecretsecret"
FAKE_CONVERTER = """#!{python}
# A test double of llama.cpp's convert_hf_to_gguf.py: notes its arguments, and writes the file that it is asked for.
import json, pathlib, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(["convert", *arguments]) + "\\n")
if "--vocab-only" in arguments and not (pathlib.Path(arguments[0]) / "tokenizer.json").is_file():
    sys.exit("no tokenizer.json")
pathlib.Path(arguments[arguments.index("--outfile") + 1]).write_bytes(b"GGUF")
"""
FAKE_QUANTIZER = """#!{python}
# A test double of llama.cpp's llama-quantize.
import json, pathlib, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(["quantize", *sys.argv[1:]]) + "\\n")
pathlib.Path(sys.argv[2]).write_bytes(pathlib.Path(sys.argv[1]).read_bytes())
"""


def make_tools(folder: Path, **scripts: str) -> str:
    """Write test doubles of llama.cpp's programs, and return a PATH that has them first; their log is folder/log."""
    folder.mkdir()
    for name, text in (scripts or {"convert_hf_to_gguf.py": FAKE_CONVERTER, "llama-quantize": FAKE_QUANTIZER}).items():
        (folder / name).write_text(text.format(python=sys.executable, log=str(folder / "log")))
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


class Hub:
    """A Hugging Face Hub of one user on this machine: takes one upload, and notes every request."""

    def __init__(self, role="write", fails=()):
        hub = self
        self.requests, self.files, self.private = [], {}, None

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.split("?")[0]
                hub.requests.append(f"{self.command} {path}")
                status, value = 200, {}
                if any(part in path for part in fails):
                    status, value = 500, {"error": "on fire"}
                elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    status, value = 401, {"error": "Invalid credentials"}
                elif path == "/api/whoami-v2":
                    value = {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": role}}}
                elif path == "/api/repos/create":
                    hub.private = json.loads(body).get("private", json.loads(body).get("visibility") == "private")
                    value = {"url": f"{hub.url}/me/tools", "name": "me/tools"}
                elif "/preupload/" in path:
                    value = {
                        "files": [
                            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                            for file in json.loads(body)["files"]
                        ]
                    }
                elif "/commit/" in path:
                    for line in body.decode().splitlines():
                        line = json.loads(line)
                        if line["key"] == "file":
                            hub.files[line["value"]["path"]] = len(line["value"]["content"])
                    value = {"commitUrl": f"{hub.url}/me/tools/commit/1", "commitOid": "1", "success": True}
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_HEAD = answer

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *arguments):
        self.server.shutdown()
        self.server.server_close()


def on_hub(hub: Hub, token: str = TOKEN) -> dict:
    """Return the environment of a run that knows no other Hub than this one."""
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
