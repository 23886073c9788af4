"""What to serve, and how: read from the command line or a YAML file, and checked as a whole."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mixquant.core.recipe import Recipe, RecipeError
from mixquant.errors import MixquantError
from mixquant.files.reading import ReadingError, parse_yaml, shown
from mixquant.servers.process import stands_for

# Options of vLLM that the description sets.
OWN_OPTIONS = (
    "--additional-config",
    "--api-key",
    "--config",  # a file, which may hold any of these options
    "--host",
    "--kv-transfer-config",
    "--model",
    "--port",
    "--quantization",
    "-q",
    "--served-model-name",
    "--tensor-parallel-size",
    "-tp",
    "--uds",
)

# Variables of engines that the description sets, and the key that sets each.
_OWN_VARIABLES = {
    "VLLM_API_KEY": "api_key_variable or api_key_file",
    "CUDA_VISIBLE_DEVICES": "prefill_gpus and decode_gpus",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "mixquant serve itself",
    "VLLM_NIXL_SIDE_CHANNEL_PORT": "mixquant serve itself",
}
_OF_A_SET = ("CUDA_VISIBLE_DEVICES", "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT")
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"

Policy = Literal[
    "consistent_hash", "cache_aware", "sticky_least_loaded", "power_of_two", "round_robin", "random"
]


class ServeError(MixquantError, ValueError):
    """A description that cannot be served, or a set that did not start. The message is one line."""


def _arguments(value: Any) -> Any:
    """vLLM's arguments, from a list or from one line as a shell would read it."""
    if isinstance(value, str):
        return shlex.split(value)
    if isinstance(value, list):
        return [str(one) if isinstance(one, (int, float)) else one for one in value]
    return value


def _indices(value: Any) -> Any:
    """GPU indices, from a list, a number, or text like ``0,1``."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if isinstance(value, int) else value


Arguments = Annotated[tuple[str, ...], BeforeValidator(_arguments)]
Gpus = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_indices)]
Count = Annotated[int, Field(ge=1, strict=True)]
Seconds = Annotated[float, Field(gt=0)]


class Deployment(BaseModel):
    """One description for the processes of this machine, the dry run and the manifests.

    Attributes:
        model: a directory or a hub name.
        served_model_name: what requests call the model; None: as ``model`` does.
        recipe: a preset's name, a mapping, JSON text, or the path of a JSON file.
        prefill: how many engines read prompts, with quantized weights alone. None, like ``decode``:
            one colocated server does both phases.
        decode: how many engines write answers, in BF16.
        prefill_gpus: indices of the GPUs of this machine that the prefill engines share out, each
            taking ``tensor_parallel_size`` of them. None: the first ones.
        decode_gpus: the same for the decode engines. None: those that are left.
        tensor_parallel_size: GPUs (on a CPU: processes) of each engine.
        host: address that the OpenAI-compatible server listens on.
        port: its port.
        log_folder: one file for each process. None: a new one under the temporary directory.
        api_key_variable: environment variable that holds the key which clients have to show.
        api_key_file: file that holds it. Neither: no key is asked for.
        tool_parser: vLLM's parser of tool calls. ``auto``: the one for the form that the model's chat
            template shows; ``none``: none, and tools that a model may choose are refused.
        reasoning_parser: vLLM's parser of reasoning, likewise.
        vllm_arguments: passed to every engine.
        prefill_arguments: passed to the prefill engines, after those for all.
        decode_arguments: passed to the decode engines, after those for all.
        environment: variables of every engine, beside the inherited ones.
        min_transfer_tokens: a prompt that is estimated to be shorter goes to a decode engine
            directly: sending its KV cache would cost more than computing it.
        decode_fallback: without a prefill engine alive the decode engines prefill by themselves;
            off, requests then fail with status 503.
        routing: the router's policy for both roles.
        metrics_port: of the loopback address, for the metrics of a set's front. None: a free one. In
            containers the front listens on its container's address: with Compose this port of the
            machine's loopback address leads there; in Kubernetes it is a port of the front's pod.
        max_body_bytes: of one request's body; a larger one is refused with status 413.
        request_timeout: seconds that the headers of a request may take to come, and then its body;
            after them it is refused with status 408.
        max_connections: of clients at a time; those beyond are refused with status 503.
        max_restarts: how often in a row an engine may end before it stays down.
        start_timeout: seconds until an engine has to answer.
        drain_timeout: seconds that requests in flight have to end in on shutdown.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(min_length=1)]
    served_model_name: Annotated[str, Field(min_length=1)] | None = None
    recipe: str | dict[str, Any] = "balanced"
    prefill: Count | None = None
    decode: Count | None = None
    prefill_gpus: Gpus | None = None
    decode_gpus: Gpus | None = None
    tensor_parallel_size: Count = 1
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535, strict=True)] = 8000
    log_folder: Path | None = None
    api_key_variable: Annotated[str, Field(pattern=rf"^{_VARIABLE}$")] | None = None
    api_key_file: Path | None = None
    tool_parser: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "auto"
    reasoning_parser: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "auto"
    vllm_arguments: Arguments = ()
    prefill_arguments: Arguments = ()
    decode_arguments: Arguments = ()
    environment: dict[str, str] = Field(default_factory=dict)
    min_transfer_tokens: Annotated[int, Field(ge=0, strict=True)] = 256
    decode_fallback: Annotated[bool, Field(strict=True)] = True
    routing: Policy = "consistent_hash"
    metrics_port: Annotated[int, Field(ge=1, le=65535, strict=True)] | None = None
    max_body_bytes: Count = 16 * 2**20
    request_timeout: Seconds = 60
    max_connections: Count = 1024
    max_restarts: Annotated[int, Field(ge=0, strict=True)] = 5
    start_timeout: Seconds = 1800
    drain_timeout: Seconds = 30

    @property
    def disaggregated(self) -> bool:
        return self.prefill is not None

    @property
    def name(self) -> str:
        """What requests call the model."""
        return self.served_model_name or self.model

    @property
    def has_key(self) -> bool:
        return self.api_key_variable is not None or self.api_key_file is not None

    def chosen_recipe(self) -> Recipe:
        """The recipe, of the role ``both``.

        Raises:
            RecipeError: it cannot be used.
        """
        if isinstance(self.recipe, dict):
            return Recipe.from_dict(self.recipe)
        return Recipe.load(self.recipe)

    def gpus_of(self, role: Literal["prefill", "decode"], index: int) -> tuple[int, ...]:
        """The GPUs of one engine of a disaggregated set on one machine."""
        size = self.tensor_parallel_size
        prefill = self.prefill_gpus or _first((self.prefill or 0) * size, self.decode_gpus or ())
        decode = self.decode_gpus or _first((self.decode or 0) * size, prefill)
        return (prefill if role == "prefill" else decode)[index * size : (index + 1) * size]

    @field_validator("environment", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        numbers = (int, float)  # YAML reads NAME: 4 as a number, and NAME: yes as True
        return {
            k: str(v) if isinstance(v, numbers) and not isinstance(v, bool) else v
            for k, v in value.items()
        }

    @model_validator(mode="after")
    def _check(self) -> Deployment:
        if (self.prefill is None) != (self.decode is None):
            given, missing = ("prefill", "decode") if self.prefill else ("decode", "prefill")
            raise ValueError(f"{given} needs {missing}: a set has at least one engine of each role")
        if not self.disaggregated:
            for name in ("prefill_gpus", "decode_gpus", "prefill_arguments", "decode_arguments"):
                if getattr(self, name):
                    raise ValueError(f"{name} needs prefill and decode, the numbers of engines")
        for role, count, gpus in (
            ("prefill", self.prefill, self.prefill_gpus),
            ("decode", self.decode, self.decode_gpus),
        ):
            if gpus is None or count is None:
                continue
            if len(set(gpus)) != len(gpus):
                raise ValueError(f"{role}_gpus names a GPU twice: {_listed(gpus)}")
            if len(gpus) != count * self.tensor_parallel_size:
                raise ValueError(
                    f"{role}_gpus: {count} engines of {self.tensor_parallel_size} GPUs each need "
                    f"{count * self.tensor_parallel_size}, not {len(gpus)} ({_listed(gpus)})"
                )
        if both := set(self.prefill_gpus or ()) & set(self.decode_gpus or ()):
            raise ValueError(f"GPU {_listed(sorted(both))} is in prefill_gpus and in decode_gpus")
        if self.metrics_port == self.port:
            raise ValueError("metrics_port and port have to differ")
        if self.api_key_variable is not None and self.api_key_file is not None:
            raise ValueError("give api_key_variable or api_key_file, not both")
        for field in ("vllm_arguments", "prefill_arguments", "decode_arguments"):
            for argument in getattr(self, field):
                if (option := stands_for(argument, OWN_OPTIONS)) is None:
                    continue
                written = argument.split("=", 1)[0]
                meant = f" ({option})" if written.replace("_", "-") != option else ""
                if option == "--config":
                    raise ValueError(
                        f"{field}: {written}{meant} may hide options that are decided by mixquant serve "
                        "itself; give the options of the file one by one"
                    )
                raise ValueError(f"{field}: {written}{meant} is set by mixquant serve itself")
        for name, value in self.environment.items():
            if re.fullmatch(_VARIABLE, name) is None:
                raise ValueError(
                    f"environment: {name!r} is not a variable's name: a name has letters, digits "
                    "and underscores, and does not begin with a digit"
                )
            if "\0" in value:
                raise ValueError(f"environment: the value of {name} holds a NUL character")
            if name in _OWN_VARIABLES and (self.disaggregated or name not in _OF_A_SET):
                raise ValueError(f"environment: {name} is decided by {_OWN_VARIABLES[name]}")
        try:
            recipe = self.chosen_recipe()
        except RecipeError as error:
            raise ValueError(str(error)) from None
        if self.disaggregated and recipe.role != "both":
            raise ValueError("recipe: leave out role, which each engine of the set is given")
        return self

    @classmethod
    def from_values(cls, values: dict[str, Any], source: str = "") -> Deployment:
        """The description with these values; absent ones take their defaults.

        Args:
            source: where they come from, for messages: a file's name and a colon.

        Raises:
            ServeError: an unknown key, or values that do not go together.
        """
        unknown = [key for key in values if key not in cls.model_fields]
        if unknown:
            raise ServeError(
                f"{source}unknown key {shown(unknown[0])}; the keys are {', '.join(cls.model_fields)}"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = str(first["loc"][0]) if first["loc"] else ""
            if first["type"] == "missing":
                raise ServeError(f"{source}{where} is missing") from None
            message = first["msg"].removeprefix("Value error, ")
            got = f", got {shown(values.get(where))}" if where else ""
            raise ServeError(f"{source}{where + ': ' if where else ''}{message}{got}") from None


def read(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ServeError: it cannot be read, is no mapping of text to values, or has a key twice.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ServeError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ServeError(f"cannot read {path}: it is not UTF-8 text") from None
    except ReadingError as error:
        raise ServeError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ServeError(f"{path}: expected a mapping such as 'model: NAME', got {shown(values)}")
    return values


def api_key(deployment: Deployment) -> str | None:
    """The key that clients have to show; None if none is asked for.

    Raises:
        ServeError: its source is empty or cannot be read.
    """
    if deployment.api_key_file is not None:
        path = deployment.api_key_file
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"cannot read the API key from {path}: {error}") from None
        if not key:
            raise ServeError(f"the API key's file {path} is empty")
    elif deployment.api_key_variable is not None:
        key = os.environ.get(deployment.api_key_variable, "").strip()
        if not key:
            raise ServeError(
                f"the environment variable {deployment.api_key_variable} is not set; it must hold the "
                "API key"
            )
    else:
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ServeError("the API key has to be printable ASCII without spaces")
    return key


def _first(number: int, without: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(gpu for gpu in range(number + len(without)) if gpu not in without)[:number]


def _listed(numbers: Any) -> str:
    return ", ".join(str(one) for one in numbers)
