"""A server between a client and a real one, that fails when it is told to."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# What happens to a request, by its method and path: None lets it pass, a number is the status that
# answers in place of the server, DROP lets the server do its work and drops the answer.
Fate = Callable[[str, str], int | None]
DROP = -1
_OWN = {"connection", "content-length", "keep-alive", "transfer-encoding"}


@contextmanager
def proxy(target: str, fate: Fate) -> Iterator[str]:
    """Pass requests on to a server, but for those whose fate is another; yield the address."""
    host = urlsplit(target).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = fate(self.command, self.path)
            if found in (None, DROP):
                status, headers, answer = self.passed_on(body)
                if found == DROP:
                    self.close_connection = True
                    return
            else:
                assert found is not None
                status, headers, answer = found, [], b""
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            # The length of what a HEAD asks about is that of the server.
            if self.command != "HEAD" or not any(n.lower() == "content-length" for n, _ in headers):
                self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def passed_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            own = _OWN - {"content-length"} if self.command == "HEAD" else _OWN
            with closing(http.client.HTTPConnection(host)) as connection:
                given = {n: v for n, v in self.headers.items() if n.lower() not in _OWN}
                connection.request(self.command, self.path, body or None, given)
                answer = connection.getresponse()
                kept = [(n, v) for n, v in answer.getheaders() if n.lower() not in own]
                return answer.status, kept, answer.read()

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    serving.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
