"""A small OpenAI-compatible server in this process, with faults to order."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = Callable[[int, dict], "str | int | None"]


class FakeOpenAI:
    """Answers "<last message>!<seed>"; `fault(number, body)` may name a status, "drop", "garbage" or "half"."""

    def __init__(self, fault: Fault = lambda number, body: None, *, models=("tiny",), delay: float = 0.0) -> None:
        self.fault, self.models, self.delay = fault, list(models), delay
        self.asked: list[dict] = []
        self.answered: list[dict] = []
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                self.reply(200, json.dumps({"data": [{"id": name} for name in server.models]}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.asked.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
                    number = len(server.asked)
                time.sleep(server.delay)
                fault = server.fault(number, body)
                if fault == "drop":
                    self.close_connection = True
                    self.connection.close()
                elif fault == "garbage":
                    self.reply(200, b"<html>")
                elif fault == "half":
                    self.reply(200, b'{"choices": []}')
                elif fault is not None:
                    self.reply(fault, json.dumps({"error": {"message": f"fault {fault}"}}).encode())
                else:
                    self.reply(200, json.dumps(server.completion(body)).encode())
                    with server.lock:
                        server.answered.append(body)

            def reply(self, status, content):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(content)

        class Server(ThreadingHTTPServer):
            request_queue_size = 256  # all of a run's connections at once

        self.http = Server(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda request, address: None  # clients that are killed break off
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def completion(self, body: dict) -> dict:
        last = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        ending = "length" if "long" in last else "stop"
        text = "" if "silent" in last else f"{last}!{body['seed']}"
        choice = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
        if "think" in last:
            choice["message"]["reasoning_content"] = "hm"
        if "call" in last:
            choice["message"] |= {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
            ending = "tool_calls"
        return {"choices": [choice | {"finish_reason": ending}], "usage": {"completion_tokens": len(text)}}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
