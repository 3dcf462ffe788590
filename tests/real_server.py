"""A real server with OpenAI's API on localhost: ``transformers serve`` with a small model, for slow tests."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(model: Path, log: Path, seconds: float = 300) -> Iterator[str]:
    """The base URL of a server that runs until the block ends.

    Args:
        model: Hugging Face folder.
        log: file for the server's output.
        seconds: seconds that it may take to start.

    Raises:
        AssertionError: if it does not start; shows the end of its output.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--device", "cpu"]
    with log.open("w") as output:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT)
    url = f"http://localhost:{port}/v1"
    try:
        deadline = time.monotonic() + seconds
        while not _answers(url, str(model)):
            started = server.poll() is None and time.monotonic() < deadline
            assert started, f"the server did not start:\n{log.read_text()[-2000:]}"
            time.sleep(1)
        yield url
    finally:
        server.kill()
        server.wait()


def _answers(url: str, model: str) -> bool:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
