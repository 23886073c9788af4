"""The load generator: vLLM's own `vllm bench serve`, called with our requests.

It runs in a process of its own, so that this process takes no time from it. Its output goes to a
file. docs/guide/bench.md says why this generator was chosen.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mixquant.bench.trace import Request
from mixquant.errors import MixquantError


class GeneratorError(MixquantError, RuntimeError):
    """Requests that failed, or were answered in another length than asked for. The message is one
    line."""


@dataclass(frozen=True)
class Answer:
    """The generator's measurements of one request. Times in seconds."""

    prompt_tokens: int  # as the server counted them
    output_tokens: int
    start: float  # on the generator's clock
    ttft: float  # from sending the request until the first token arrived
    itl: tuple[
        float, ...
    ]  # between arrivals; fewer than the tokens if a server sends several at once

    @property
    def e2e(self) -> float:
        return self.ttft + sum(self.itl)

    @property
    def tpot(self) -> float | None:
        """Mean time of the tokens after the first; None if there are none."""
        return sum(self.itl) / (self.output_tokens - 1) if self.output_tokens > 1 else None


class Generator:
    """The generator's process, ready for requests."""

    def __init__(self, process: Any, connection: Connection, log: Path) -> None:
        self._process, self._connection, self._log = process, connection, log

    def send(
        self, url: str, model: str, sessions: Sequence[Sequence[Request]], concurrency: int
    ) -> list[Answer]:
        """Sends requests and waits for all answers.

        Args:
            url: of an OpenAI-compatible server, without ``/v1``. Its key, if it wants one, is taken from
                the environment variable OPENAI_API_KEY.
            model: what the server calls it.
            sessions: lists of requests that follow one another, each when the one before is answered.
            concurrency: sessions at a time, the next when one ends.

        Returns:
            One answer to each request, session by session.

        Raises:
            GeneratorError: a request failed, or a prompt or an answer is not of the length asked for.
        """
        self._connection.send((url, model, sessions, concurrency))
        try:
            outcome = self._connection.recv()
        except EOFError:
            raise GeneratorError(f"the load generator ended (its output: {self._log})") from None
        if isinstance(outcome, str):
            raise GeneratorError(outcome)
        answers = [answer for result in outcome for answer in parse(result)]
        asked = [request for session in sessions for request in session]
        for request, answer in zip(asked, answers, strict=True):
            _check(request, answer, url)
        return answers


@contextlib.contextmanager
def generator(log: Path) -> Iterator[Generator]:
    """The generator for as long as the block lasts.

    Args:
        log: a file that takes what it prints.

    Raises:
        GeneratorError: vLLM, which it is part of, is not installed or cannot be imported.
    """
    if importlib.util.find_spec("vllm") is None:
        raise GeneratorError(
            "vLLM, whose load generator this uses, is not installed: pip install 'mixquant[vllm]', "
            "or '[cpu]' on a machine without a GPU"
        )
    context = multiprocessing.get_context("spawn")
    own_end, other_end = context.Pipe()
    process = context.Process(target=_serve, args=(other_end, str(log)), daemon=True)
    process.start()
    other_end.close()
    try:
        try:
            failure = own_end.recv()
        except EOFError:
            failure = "it ended while it started"
        if failure is not None:
            raise GeneratorError(f"cannot use vLLM's load generator: {failure} (see {log})")
        yield Generator(process, own_end, log)
    finally:
        process.kill()
        process.join()


def parse(result: dict[str, Any]) -> list[Answer]:
    """The answers in what `vllm bench serve` saves of one run, with --save-detailed.

    Raises:
        GeneratorError: a request failed.
    """
    for error in result["errors"]:
        if error:
            # A reason, or a traceback whose last line is the error.
            reason = error.strip().splitlines()[-1]
            raise GeneratorError(f"a request failed: {reason[:300]}")
    per_request = (result[k] for k in ("input_lens", "output_lens", "start_times", "ttfts", "itls"))
    return [
        Answer(prompt, output, start, ttft, tuple(itl))
        for prompt, output, start, ttft, itl in zip(*per_request, strict=True)
    ]


def _check(request: Request, answer: Answer, url: str) -> None:
    """Refuses answers of other lengths: arms that did different work cannot be compared."""
    if answer.prompt_tokens != len(request.prompt):
        raise GeneratorError(
            f"{url} read {answer.prompt_tokens} tokens of a prompt of {len(request.prompt)}: "
            "it cuts prompts, or does not accept tokens as prompts"
        )
    if answer.output_tokens != request.output_tokens:
        raise GeneratorError(
            f"{url} wrote {answer.output_tokens} tokens where {request.output_tokens} were asked for: "
            "it does not know ignore_eos, or its longest context is too short"
        )


def _serve(connection: Connection, log: str) -> None:
    """The process: imports vLLM's module once, then answers what is sent until the pipe closes."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        import vllm.benchmarks.serve
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(None)
    while True:
        try:
            job = connection.recv()
        except (EOFError, KeyboardInterrupt):  # Ctrl-C reaches both processes; ours ends this one
            return
        try:
            connection.send(asyncio.run(_send(vllm.benchmarks.serve, *job)))
        except KeyboardInterrupt:
            return
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")


async def _send(
    serve: Any, url: str, model: str, sessions: Sequence[Sequence[Request]], concurrency: int
) -> list[dict[str, Any]]:
    """The generator's results: one, or one of each session if sessions have several requests."""
    if all(len(session) == 1 for session in sessions):
        requests = [session[0] for session in sessions]
        return [await _benchmark(serve, url, model, requests, concurrency)]
    in_flight = asyncio.Semaphore(concurrency)

    async def follow(session: Sequence[Request]) -> dict[str, Any]:
        async with in_flight:
            # One at a time, and in their order: its own places are given to who waited longest.
            return await _benchmark(serve, url, model, session, 1)

    return await asyncio.gather(*map(follow, sessions))


async def _benchmark(
    serve: Any, url: str, model: str, requests: Sequence[Request], concurrency: int
) -> dict[str, Any]:
    samples = [
        serve.SampleRequest(
            prompt=list(request.prompt),
            prompt_len=len(request.prompt),
            expected_output_len=request.output_tokens,
        )
        for request in requests
    ]
    result: dict[str, Any] = await serve.benchmark(
        task_type=serve.TaskType.GENERATION,
        endpoint_type="openai",
        api_url=f"{url}/v1/completions",
        base_url=url,
        model_id=model,
        model_name=model,
        tokenizer=None,
        input_requests=samples,
        logprobs=None,
        request_rate=float("inf"),
        burstiness=1.0,
        disable_tqdm=True,
        num_warmups=0,
        profile=False,
        selected_percentile_metrics=[],
        selected_percentiles=[],
        ignore_eos=True,
        goodput_config_dict={},
        max_concurrency=concurrency,
        lora_modules=None,
        extra_headers=None,
        extra_body={"temperature": 0.0},
        ready_check_timeout_sec=0,
    )
    return result
