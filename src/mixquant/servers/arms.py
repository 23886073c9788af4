"""Arms: the things compared. Each is a vLLM server that we start, or one that already runs."""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixquant import results
from mixquant.core.recipe import Recipe
from mixquant.errors import MixquantError
from mixquant.files.reading import parse_json
from mixquant.servers.process import arguments_for, serving, stands_for

DEFAULTS = ("bf16", "quantized", "mixquant")

# Options of vLLM that we set for every server that is started, and those in which `DEFAULTS` differ.
_ADDRESS = ("--config", "--host", "--model", "--port", "--served-model-name", "--uds")
_PRECISION = ("--additional-config", "--quantization", "-q")

ARM_NAME = re.compile(r"\w[\w.-]*")
"""What an arm may be called: files are named after it, too."""


class ArmError(MixquantError, ValueError):
    """An arm that cannot be used: a wrong option, or a server that does not answer. One line."""


@dataclass(frozen=True)
class ServedArm:
    """One of the things compared."""

    name: str
    recipe: Recipe | None = None  # None: vLLM without mixquant
    arguments: tuple[str, ...] = ()  # vLLM's own, beside the recipe's
    url: str | None = None  # of a server that runs already, without /v1

    def to_result(self) -> results.Arm:
        """As results files have it."""
        return results.Arm(
            name=self.name,
            recipe=None if self.recipe is None else self.recipe.to_dict(),
            arguments=None if self.url else shlex.join(self.arguments),
            url=self.url,
        )


def chosen_arms(
    recipe: Recipe, arms: Sequence[str] = (), urls: Sequence[str] = (), vllm_args: str = ""
) -> tuple[ServedArm, ...]:
    """The arms that a command's options say.

    Args:
        recipe: of ``mixquant``, and of ``quantized``, which has it everywhere.
        arms: each ``NAME``, one of `DEFAULTS`, or ``NAME=ARGUMENTS`` with vLLM's own arguments, which
            is vLLM without mixquant unless they say otherwise.
        urls: each ``NAME=URL``, of servers that run already. Given them and no ``arms``, nothing
            else is compared; otherwise `DEFAULTS` are.
        vllm_args: for every server that is started, as a shell would read them.

    Raises:
        ArmError: an option that cannot be read, an unknown name, one name twice, or arguments that
            give what the command sets.
    """
    shared = tuple(_split(vllm_args, "--vllm-args"))
    _check(shared, "--vllm-args", (*_ADDRESS, *_PRECISION))
    known = {
        "bf16": ServedArm("bf16", arguments=shared),
        "quantized": ServedArm("quantized", replace(recipe, everywhere=True), shared),
        "mixquant": ServedArm("mixquant", recipe, shared),
    }
    chosen = [_from_url(text) for text in urls]
    for text in arms or (() if urls else DEFAULTS):
        name, given, own = text.partition("=")
        if given:
            own_arguments = _split(own, f"--arm {name}")
            _check(own_arguments, f"--arm {name}", _ADDRESS)
            arguments = (*shared, *own_arguments)
            chosen.append(ServedArm(_checked(name, text), arguments=arguments))
        elif name in known:
            chosen.append(known[name])
        else:
            raise ArmError(
                f"unknown arm {name!r}; expected {', '.join(DEFAULTS)}, or NAME=ARGUMENTS with "
                "arguments for vLLM"
            )
    for number, arm in enumerate(chosen):
        if any(arm.name == other.name for other in chosen[:number]):
            raise ArmError(f"two arms are called {arm.name!r}")
    # The defaults in their usual order, whatever the order of the options.
    order = {name: place for place, name in enumerate(DEFAULTS)}
    return tuple(sorted(chosen, key=lambda arm: order.get(arm.name, len(order))))


@contextlib.contextmanager
def running(
    arm: ServedArm,
    model: str,
    *,
    name: str,
    log: Path,
    progress: Callable[[str], None] = lambda doing: None,
) -> Iterator[str]:
    """The server of an arm for as long as the block lasts: started, unless it already runs.

    SIGTERM ends the block as Ctrl-C does, so no server outlives it.

    Args:
        model: a directory or a hub name.
        name: what requests call the model, if the server is started.
        log: a file that takes what the server prints.
        progress: is told what is being waited for.

    Yields:
        Its address, without ``/v1``.

    Raises:
        ServerError: it did not start.
    """
    if arm.url is not None:
        yield arm.url
        return
    arguments = [*arguments_for(arm.recipe), *arm.arguments]
    with (
        terminated_like_interrupted(),
        serving(model, arguments, log, name=name, progress=progress) as url,
    ):
        yield url


def served_models(
    url: str, key: str | None = None, *, timeout: float = 10
) -> dict[str, int | None]:
    """The models of a server, and the context length of each in tokens, where the server says so.

    Args:
        url: without ``/v1``.
        key: of its API, if it wants one.

    Raises:
        ArmError: it does not answer, or not like an OpenAI-compatible server.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(f"{url}/v1/models", headers=headers)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            models = parse_json(answer.read())["data"]
        return {str(model["id"]): _context(model.get("max_model_len")) for model in models}
    except urllib.error.HTTPError as error:
        wanted = "; it wants another key" if error.code in (401, 403) else ""
        raise ArmError(f"{url}/v1/models answers {error.code} {error.reason}{wanted}") from None
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise ArmError(f"no server answers at {url}: {reason}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArmError(f"{url} is not an OpenAI-compatible server: it lists no models") from None


def _context(tokens: Any) -> int | None:
    return tokens if type(tokens) is int and tokens > 0 else None


def served_name(served: Mapping[str, Any], wanted: str, url: str) -> str:
    """What a server calls the model: ``wanted``.

    Raises:
        ArmError: it does not have it; the message lists what it has.
    """
    if wanted in served:
        return wanted
    raise ArmError(
        f"{url} does not serve {wanted!r} but {', '.join(map(repr, served)) or 'nothing'}; "
        "say which with --served-name"
    )


def _from_url(text: str) -> ServedArm:
    name, _, url = text.partition("=")
    if not re.match(r"https?://[^/]", url):
        raise ArmError(f"--url {text!r}: expected NAME=URL with http:// or https://")
    return ServedArm(_checked(name, text), url=url.rstrip("/").removesuffix("/v1").rstrip("/"))


def _checked(name: str, text: str) -> str:
    if not ARM_NAME.fullmatch(name):
        raise ArmError(f"{text!r}: an arm's name is letters, digits, '-', '_' and '.'")
    return name


def _check(arguments: Sequence[str], where: str, decided: Sequence[str]) -> None:
    for argument in arguments:
        if (option := stands_for(argument, decided)) is not None:
            instead = "; give --arm NAME=ARGUMENTS for an arm of your own" * (option in _PRECISION)
            raise ArmError(f"{where}: {argument!r} is {option}, which this command sets{instead}")


def _split(arguments: str, where: str) -> list[str]:
    try:
        return shlex.split(arguments)
    except ValueError as error:
        raise ArmError(f"{where}: cannot read {arguments!r}: {error}") from None


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Makes SIGTERM end the block as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
