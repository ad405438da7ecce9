"""A proxy that hands nothing on, and keeps what it was asked for."""

import socket
import socketserver
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import psutil


@contextmanager
def recording_proxy():
    """Listen on a free port; yields (variables that name it as every proxy, what was asked)."""
    asked = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            asked.append(self.rfile.readline().decode(errors="replace").strip())
            self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        names = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
        yield {n: address for name in names for n in (name, name.upper())}, asked
        server.shutdown()


def asked_of_this_machine(asked):
    """Requests for addresses of this machine; Ray looks for clouds at some of others."""
    entries = [entry.address for found in psutil.net_if_addrs().values() for entry in found]
    own = {"localhost", "127.0.0.1", "::1", socket.gethostname(), *entries}

    def host(line):
        target = line.split()[1] if len(line.split()) > 1 else ""
        return urlsplit(target if "://" in target else f"//{target}").hostname

    return [line for line in asked if host(line) in own or host(line) is None]
