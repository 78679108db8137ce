"""The command ``vlmeff serve`` as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from served import PICTURE, ROOT, chat, data_url

openai = pytest.importorskip("openai")


@pytest.mark.slow
def test_the_command_serves_and_ends_in_good_order() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import typer; from vlmeff.cli_serve import serve_command; typer.run(serve_command)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--model", "tiny-llava", "--preset", "fast", "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            for _ in range(600):
                assert process.poll() is None
                try:
                    answer = client.chat.completions.create(model="tiny-llava", messages=chat(data_url(PICTURE)))
                    break
                except openai.APIConnectionError:
                    time.sleep(0.2)
            assert answer.choices[0].message.content
        process.send_signal(signal.SIGTERM)
        shown = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 0, shown
    assert f"serving tiny-llava with preset fast at {url}" in shown
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), 1):
        pass
