"""A server of files on this machine, with faults."""

from __future__ import annotations

import collections
import contextlib
import http.server
import threading
import time


class Server(http.server.ThreadingHTTPServer):
    """Sends `files` by name; `fault` is what it does wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.fault, self.requests = {}, "", collections.Counter()

    def url(self, file):
        return f"http://127.0.0.1:{self.server_address[1]}/{file}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        assert isinstance(server, Server)
        name = self.path.strip("/")
        server.requests[name] += 1
        if name not in server.files:
            return self.send_error(404)
        if server.fault == "redirect" and not name.startswith("moved-"):
            server.files[f"moved-{name}"] = server.files[name]
            self.send_response(302)
            self.send_header("Location", f"/moved-{name}")
            return self.end_headers()
        content = server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if server.fault == "truncated":
            content = content[: len(content) // 2]
        if server.fault == "altered":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if server.fault == "slow":
            time.sleep(1.5)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving():
    """A running `Server`."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
