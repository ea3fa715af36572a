"""vLLM's server with an export, asked over HTTP by OpenAI's client."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.exports import load
from tests.vllm import engine
from tests.vllm.engine import Answer
from tests.vllm.exports import TOKENS, write_export

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

LIMIT = 600
"""Seconds after which a wait has failed; nothing here is measured."""
CONTEXT = 2048
"""Tokens of a prompt and its answer, at most."""
TEXT = "the red house"


def command(folder: Path, port: int) -> list[str | Path]:
    return [
        sys.executable, "-m", "npt_fast", "serve", folder, "--host", "127.0.0.1",
        "--port", str(port), "--served-model-name", "model", "--dtype", "float32",
        "--max-model-len", str(CONTEXT), "--enforce-eager",
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)


class Server:
    """A server process, and a client of it."""

    def __init__(self, folder: Path, log: Path) -> None:
        import httpx
        import openai

        self.folder, self.log, self.port = folder, log, free_port()
        address = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=address, timeout=LIMIT)
        self.client = openai.OpenAI(
            base_url=f"{address}/v1", api_key="none", timeout=LIMIT, max_retries=0
        )

    def start(self) -> None:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command(self.folder, self.port), stdout=log, stderr=log, env=engine.ENVIRONMENT
            )
        wait_until(self.is_ready)

    def is_ready(self) -> bool:
        import httpx

        assert self.process.poll() is None, self.log.read_text()[-6000:]
        try:
            return self.http.get("/health").is_success
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        """Stop it as service managers do; return its exit code, once its workers are gone."""
        import psutil

        workers = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(LIMIT)
        assert workers and not psutil.wait_procs(workers, LIMIT)[1]
        return code

    def ask(self, prompt: str | Sequence[int], tokens: int = TOKENS, **options: Any) -> Any:
        return self.client.completions.create(
            model="model", prompt=prompt, max_tokens=tokens, temperature=0, logprobs=1,
            extra_body={"return_token_ids": True, "ignore_eos": True}, **options,
        )  # fmt: skip

    def answer(self, prompt: Sequence[int], tokens: int = TOKENS) -> Answer:
        choice = self.ask(prompt, tokens).choices[0]
        return Answer(choice.token_ids, choice.logprobs.token_logprobs)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(f"{name}{{")]
        assert found
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def server(exported: Path) -> Iterator[Server]:
    found = Server(exported, exported.parent / "log")
    try:
        found.start()
        yield found
    finally:
        if found.process.poll() is None:
            found.stop()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """64 prompts, each one token longer than the one before."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 257, (n,), generator=generator).tolist() for n in range(1, 65)]


@pytest.fixture(scope="module")
def expected(exported: Path, prompts: list[list[int]]) -> list[Answer]:
    return engine.by_hand(load(exported), prompts, TOKENS)


def test_a_stream_is_the_whole_text(server: Server) -> None:
    whole = server.ask(TEXT).choices[0]
    chunks = [chunk.choices[0] for chunk in server.ask(TEXT, stream=True)]
    assert len(chunks) > 1 and whole.text
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert chunks[-1].finish_reason == whole.finish_reason == "length"


def test_requests_at_once(server: Server, prompts: list[list[int]], expected: list[Answer]) -> None:
    lengths = [4 + n % (TOKENS - 3) for n in range(len(prompts))]
    with ThreadPoolExecutor(len(prompts)) as threads:
        found = list(threads.map(server.answer, prompts, lengths))
    assert [len(answer.tokens) for answer in found] == lengths
    shorter = [
        Answer(*(part[:length] for part in answer))
        for answer, length in zip(expected, lengths, strict=True)
    ]
    engine.assert_same(found, shorter)


def test_a_client_that_disconnects(
    server: Server, prompts: list[list[int]], expected: list[Answer]
) -> None:
    """Its request ends without its other 2,000 tokens, and the other requests do not notice."""
    finished, started = server.metric("vllm:request_success_total"), 8
    with ThreadPoolExecutor(started) as threads:
        stream = server.ask(TEXT, CONTEXT - 100, stream=True)
        next(stream)
        others = [threads.submit(server.answer, prompt) for prompt in prompts[:started]]
        stream.close()
        found = [other.result() for other in others]
    engine.assert_same(found, expected[:started])

    def is_gone() -> bool:
        nonlocal started
        server.ask(TEXT, 1)  # the numbers are those of the engine's last step
        started += 1
        return server.metric("vllm:num_requests_running") == 0

    wait_until(is_gone)
    assert server.metric("vllm:request_success_total") == finished + started


def test_a_prompt_that_is_too_long(server: Server, prompts: list[list[int]]) -> None:
    import openai

    before = server.answer(prompts[3])
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask([1] * (CONTEXT + 1))
    message: str = caught.value.body["message"]  # type: ignore[index, call-overload, assignment]
    assert str(CONTEXT) in message and "\n" not in message
    assert server.answer(prompts[3]) == before


def test_stop_and_restart(server: Server, prompts: list[list[int]]) -> None:
    before = server.answer(prompts[9])
    assert server.stop() == 0
    server.start()  # on the same port
    assert server.answer(prompts[9]) == before


def test_changed_np_weights_are_refused(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "changed")
    (folder / "npt_weights.safetensors").write_bytes(b"other")
    done = subprocess.run(
        command(folder, free_port()), capture_output=True, text=True, env=engine.ENVIRONMENT
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "its SHA-256 differs; copy the folder" in done.stderr.splitlines()[-1]
