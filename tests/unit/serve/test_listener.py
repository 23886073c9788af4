"""The front's address, by sockets: half-sent requests, too many of them, and what is no HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import pytest
import uvicorn

from mixquant.serve import bodies, front, listener, routes
from mixquant.serve.accepted import accepted
from mixquant.serve.listener import Limits, protocol
from mixquant.servers.ports import free_ports

PATIENCE = 60  # s, for what takes a moment
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def fine(request: Any) -> Any:
    return httpx.Response(200, json={"fine": True})


@contextmanager
def listening(limits: Limits, router: Callable[[Any], Any] = fine) -> Iterator[int]:
    """The front on a free port, over a router that answers everything."""
    upstream = httpx.AsyncClient(transport=httpx.MockTransport(router))
    settings = front.FrontSettings("http://t", "http://d", 256, True, "inner", None, limits)
    config = uvicorn.Config(
        front.application(settings, upstream), http=protocol(limits), ws="none", log_level="error"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as one:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[one])))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield one.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


def said(port: int, content: bytes) -> bytes:
    """All that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as one:
        one.sendall(content)
        return b"".join(iter(lambda: one.recv(65536), b""))


def status_and_error(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_half_of_a_requests_headers_is_not_waited_for() -> None:
    with listening(Limits(request_seconds=0.3)) as port:
        status, error = status_and_error(said(port, HEAD))
        assert (status, error["code"]) == (408, 408)
        assert "0.3 s" in error["message"]
        # Also where it comes one byte at a time, and behind a whole one.
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as one:
            one.sendall(HEAD + b"Content-Length: 2\r\n\r\n{}")
            assert b"200 OK" in one.recv(65536)
            begun = time.monotonic()
            with pytest.raises(OSError):
                while time.monotonic() < begun + PATIENCE:
                    one.sendall(b"P")
                    time.sleep(0.05)
            assert time.monotonic() < begun + PATIENCE


def test_a_connection_that_says_nothing_is_closed() -> None:
    with listening(Limits(request_seconds=0.3)) as port:
        assert said(port, b"") == b""


def test_half_of_a_body_is_not_waited_for() -> None:
    with listening(Limits(request_seconds=0.3)) as port:
        for length in (
            b"Content-Length: 100\r\n\r\n{",
            b"Transfer-Encoding: chunked\r\n\r\n1\r\n{",
        ):
            answer = said(port, HEAD + length)
            status, error = status_and_error(answer)
            assert (status, error["code"]) == (408, 408)


def test_a_body_that_is_too_large_is_not_kept() -> None:
    with listening(Limits(body_bytes=1000, request_seconds=0.5)) as port:
        large = b"x" * 3_000_000
        url = f"http://127.0.0.1:{port}/v1/completions"
        answer = httpx.post(url, content=large, timeout=PATIENCE)
        assert answer.status_code == 413
        assert "1000 bytes" in answer.json()["error"]["message"]
        # Announced, and asked for permission: refused before it is sent.
        length = b"Content-Length: 3000000\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
        assert status_and_error(said(port, HEAD + length))[0] == 413
        # Announced, and half of it sent.
        half = said(port, HEAD + b"Content-Length: 3000000\r\n\r\n" + large[:5000])
        assert status_and_error(half)[0] == 413


def test_a_body_that_takes_long_to_parse_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parsing, parsed = threading.Semaphore(0), threading.Event()

    def slowly(path: str, raw: bytes) -> Any:
        if len(raw) > bodies.PARSED_AT_ONCE:
            parsing.release()
            assert parsed.wait(PATIENCE)
        return accepted(path, raw)

    monkeypatch.setattr(routes, "accepted", slowly)
    large = {"prompt": "a" * bodies.PARSED_AT_ONCE}
    with listening(Limits()) as port, ThreadPoolExecutor(bodies.PARSERS + 1) as clients:
        url = f"http://127.0.0.1:{port}"
        try:
            waiting = [
                clients.submit(httpx.post, f"{url}/v1/completions", json=large, timeout=PATIENCE)
                for _ in range(bodies.PARSERS + 1)
            ]
            for _ in range(bodies.PARSERS):
                assert parsing.acquire(timeout=PATIENCE)
            assert httpx.get(f"{url}/health").status_code == 200
            assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 200
            assert not parsing.acquire(blocking=False)  # no more at a time
        finally:
            parsed.set()
        assert [one.result(PATIENCE).status_code for one in waiting] == [200] * len(waiting)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_no_more_bodies_than_are_held(
    monkeypatch: pytest.MonkeyPatch, streams: bool, path: str
) -> None:
    """They are held until the answers are sent, and no longer."""
    monkeypatch.setattr(listener, "LARGEST_BODIES", 2)
    asked = threading.Semaphore(0)
    answer = asyncio.Event()
    loop: asyncio.AbstractEventLoop

    class Stream(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            asked.release()
            yield b"data: a\n\n"
            await answer.wait()

    async def router(request: Any) -> Any:
        nonlocal loop
        loop = asyncio.get_running_loop()
        if request.method == "GET":
            return httpx.Response(200)
        return httpx.Response(200, stream=Stream())

    content = json.dumps({"prompt": "a", "stream": streams}).encode().ljust(1000)
    limits = Limits(body_bytes=1000)
    with listening(limits, router) as port, ThreadPoolExecutor(2) as clients:
        url = f"http://127.0.0.1:{port}{path}"

        for _ in range(3):  # what is held once is given back
            answer.clear()
            clients_waiting = [
                clients.submit(httpx.post, url, content=content, timeout=PATIENCE) for _ in range(2)
            ]
            try:
                for _ in range(2):
                    assert asked.acquire(timeout=PATIENCE)
                refused = httpx.post(url, content=content, timeout=PATIENCE)
                assert refused.status_code == 503
                assert "try again" in refused.json()["error"]["message"]
                assert refused.headers["retry-after"] == "5"
            finally:
                loop.call_soon_threadsafe(answer.set)
            assert [one.result(PATIENCE).status_code for one in clients_waiting] == [200] * 2


def test_no_more_connections_than_are_taken() -> None:
    limits = Limits(connections=20, request_seconds=PATIENCE)
    with listening(limits) as port:
        held = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(20)]
        try:
            for one in held:
                one.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
            time.sleep(0.5)  # until the server has read them all
            for _ in range(3):
                status, error = status_and_error(said(port, b""))
                assert status == 503
                assert "try again" in error["message"]
        finally:
            for one in held:
                one.close()
        url = f"http://127.0.0.1:{port}/v1/completions"
        end = time.monotonic() + PATIENCE
        while httpx.post(url, json={"prompt": "a"}, timeout=PATIENCE).status_code != 200:
            assert time.monotonic() < end


def test_connections_that_ask_for_nothing_make_room() -> None:
    """Those that say nothing, send half of a request's headers, or keep alive what was answered."""
    limits = Limits(connections=20, request_seconds=PATIENCE)
    with listening(limits) as port, ExitStack() as open_ones:
        url = f"http://127.0.0.1:{port}/v1/completions"
        kept = open_ones.enter_context(httpx.Client(timeout=PATIENCE))
        assert kept.post(url, json={"prompt": "a"}).status_code == 200
        for number in range(40):
            one = socket.create_connection(("127.0.0.1", port), PATIENCE)
            open_ones.enter_context(one)
            if number % 2:
                one.sendall(HEAD)
        for _ in range(3):
            assert httpx.post(url, json={"prompt": "a"}).status_code == 200
        assert kept.post(url, json={"prompt": "a"}).status_code == 200


def test_a_connection_whose_request_is_answered_is_not_cut_for_a_new_one() -> None:
    asked, answer = threading.Event(), threading.Event()

    async def slowly(request: Any) -> Any:
        asked.set()
        while not answer.is_set():
            await asyncio.sleep(0.01)
        return httpx.Response(200, json={"fine": True})

    with (
        listening(Limits(connections=1), slowly) as port,
        ThreadPoolExecutor(1) as clients,
    ):
        url = f"http://127.0.0.1:{port}/v1/completions"
        waiting = clients.submit(httpx.post, url, json={"prompt": "a"}, timeout=PATIENCE)
        try:
            assert asked.wait(PATIENCE)
            assert status_and_error(said(port, b""))[0] == 503
        finally:
            answer.set()
        assert waiting.result(PATIENCE).status_code == 200


@pytest.mark.parametrize("closes", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_does_not_read_is_cut(streams: bool, closes: bytes) -> None:
    large = b"a" * 20_000_000  # more than any buffer of the system's
    ended = threading.Event()

    class Stream(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            try:
                for start in range(0, len(large), 10_000):
                    yield large[start : start + 9_999] + b"\n"
            finally:
                ended.set()

    def router(request: Any) -> Any:
        if b"large" not in request.content:
            return httpx.Response(200, json={})
        return httpx.Response(200, stream=Stream())

    body = json.dumps({"prompt": "large", "stream": streams}).encode()
    length = f"Content-Length: {len(body)}\r\n\r\n".encode()
    with (
        listening(Limits(connections=1, request_seconds=1), router) as port,
        socket.create_connection(("127.0.0.1", port), PATIENCE) as one,
    ):
        one.sendall(HEAD + closes + length + body)
        one.recv(1)
        end = time.monotonic() + PATIENCE
        url = f"http://127.0.0.1:{port}/v1/completions"
        while httpx.post(url, json={"prompt": "a"}).status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert ended.wait(PATIENCE)
        got = 1
        with suppress(ConnectionResetError):
            while piece := one.recv(2**20):
                got += len(piece)
        assert got < len(large)


def test_a_client_that_reads_slowly_is_waited_for() -> None:
    large, seconds = 40_000_000, 1.5

    def router(request: Any) -> Any:
        return httpx.Response(200, content=b"a" * large)

    with (
        listening(Limits(request_seconds=seconds), router) as port,
        socket.create_connection(("127.0.0.1", port), PATIENCE) as one,
    ):
        one.sendall(HEAD + b"Content-Length: 15\r\nConnection: close\r\n\r\n" + b'{"prompt": "a"}')
        got, begun = 0, time.monotonic()
        while got < 0.8 * large:
            got += len(one.recv(2**20))
        time.sleep(max(0.0, begun + 1.5 * seconds - time.monotonic()))
        while piece := one.recv(2**20):
            got += len(piece)
    assert got > large


def test_the_inner_address_has_no_limits_of_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The routers ask there for every request whether their key is right."""
    (inner_port,) = free_ports(1)
    servers: list[uvicorn.Server] = []

    class Server(uvicorn.Server):
        def __init__(self, config: uvicorn.Config) -> None:
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(uvicorn, "Server", Server)
    limits = Limits(connections=1, request_seconds=0.2)
    settings = front.FrontSettings("http://t", "http://d", 256, True, "inner", None, limits)
    with socket.create_server(("127.0.0.1", 0)) as one, ExitStack() as open_ones:
        serving = listener.serve(
            front.application(settings),
            [one],
            limits,
            1,
            front.inner_application("inner"),
            f"127.0.0.1:{inner_port}",
        )
        thread = threading.Thread(target=lambda: asyncio.run(serving))
        thread.start()
        try:
            url = f"http://127.0.0.1:{inner_port}/internal/key-check"
            headers = {"Authorization": "Bearer inner"}
            clients = [
                open_ones.enter_context(httpx.Client(headers=headers, timeout=PATIENCE))
                for _ in range(5)
            ]
            end = time.monotonic() + PATIENCE
            while True:
                with suppress(httpx.ConnectError):
                    clients[0].get(url)
                    break
                assert time.monotonic() < end
            half = socket.create_connection(("127.0.0.1", inner_port), PATIENCE)
            open_ones.enter_context(half).sendall(b"GET /internal/key-check HTTP/1.1\r\n")
            for _ in range(3):
                assert [c.get(url).status_code for c in clients] == [200] * 5
                time.sleep(0.3)
            half.sendall(b"Host: a\r\nAuthorization: Bearer inner\r\n\r\n")
            assert b"200 OK" in half.recv(65536)
        finally:
            servers[0].should_exit = True
            thread.join(PATIENCE)
        assert not thread.is_alive()


def test_what_takes_long_to_answer_is_not_cut_off() -> None:
    """The deadline is for clients, not for engines."""
    limits = Limits(request_seconds=0.2)

    async def slowly(request: Any) -> Any:
        await asyncio.sleep(1)
        return httpx.Response(200, json={"fine": True})

    settings = front.FrontSettings("http://t", "http://d", 256, True, "inner", None, limits)
    upstream = httpx.AsyncClient(transport=httpx.MockTransport(slowly))
    config = uvicorn.Config(
        front.application(settings, upstream), http=protocol(limits), ws="none", log_level="error"
    )
    server = uvicorn.Server(config)

    async def main() -> int:
        with socket.create_server(("127.0.0.1", 0)) as one:
            running = asyncio.ensure_future(server.serve(sockets=[one]))
            async with httpx.AsyncClient(timeout=PATIENCE) as client:
                url = f"http://127.0.0.1:{one.getsockname()[1]}/v1/completions"
                answer = await client.post(url, json={"prompt": "a"})
            server.should_exit = True
            await running
            return answer.status_code

    assert asyncio.run(main()) == 200


@pytest.mark.parametrize(
    "content", [b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20000]
)
def test_what_is_no_request(content: bytes) -> None:
    with listening(Limits()) as port:
        try:
            answer = said(port, content)
        except ConnectionResetError:  # it was still sending
            return
        status, error = status_and_error(answer)
        assert (status, error["type"]) == (400, "invalid_request_error")
