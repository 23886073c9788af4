"""The options of `mixquant evaluate`, checked, and the benchmarks, loaded before anything long
begins."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mixquant.checkpoints.models import find, load_tokenizer
from mixquant.errors import MixquantError
from mixquant.evaluate.benchmarks.answer_file import AnswerFile
from mixquant.evaluate.benchmarks.runner import BenchmarkRun
from mixquant.evaluate.benchmarks.settings import MiddleCutter, PromptTokens, Settings
from mixquant.evaluate.tasks import OPTIONS, Item, PromptLimits, Task, TaskError
from mixquant.evaluate.tasks.registry import TASKS
from mixquant.evaluate.tasks.registry import task as find_task
from mixquant.servers.arms import ServedArm, served_models, served_name


class EvaluationError(MixquantError, ValueError):
    """An evaluation that cannot begin. The message is one line."""


@dataclass(frozen=True)
class Judge:
    """A model that says whether answers are right."""

    url: str  # without /v1
    model: str
    key: str = field(repr=False)


@dataclass(frozen=True)
class Options:
    """The user's options."""

    model: str
    benchmarks: Sequence[str]
    arms: Sequence[ServedArm]
    out: Path
    data: Mapping[str, Path] = field(default_factory=dict)  # by benchmark
    settings: Mapping[str, Any] = field(
        default_factory=dict
    )  # fields of `Settings` that were given
    task_options: Mapping[str, Any] = field(default_factory=dict)  # `OPTIONS` that were given
    protocol: str | None = None  # of `PROTOCOLS`; None: ours
    judge: Judge | None = None
    served_names: Sequence[str] = ()  # what servers call the model; none: as ``model``
    key: str | None = field(default=None, repr=False)  # of the arms' servers
    limit: int | None = None  # items of each benchmark
    context: int | None = None  # of the model, in tokens; None: what it and the servers say
    concurrency: int = 16
    retries: int = 8
    timeout: float = 3600
    command: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that is loaded."""

    task: Task
    settings: Settings
    items: Sequence[Item]  # the items to ask
    digest: str  # the number of all its items


def chosen_tasks(options: Options) -> list[Task]:
    names = list(dict.fromkeys(options.benchmarks))
    tasks = [find_task(name, options.task_options, options.protocol) for name in names]
    for key in options.task_options:
        if not any(key in task.options for task in tasks):
            takers = " or ".join(name for name in TASKS if key in find_task(name).options)
            raise EvaluationError(
                f"{OPTIONS[key]} is an option of {takers} only; add --benchmark {takers}, or leave the "
                "option out"
            )
    for name, file in options.data.items():
        if name not in names:
            raise EvaluationError(
                f"--data names {name!r}, which is not among the benchmarks; add --benchmark {name}, or "
                "leave the file out"
            )
        if not os.path.exists(file):
            raise EvaluationError(f"cannot read {file}: no such file")
    for task in tasks:
        if task.needs_judge and options.judge is None:
            raise EvaluationError(
                f"{task.name} needs a second model, as judge or as simulated user: give --judge-url "
                "and --judge-model, and its key in the environment variable MIXQUANT_JUDGE_KEY"
            )
    if options.judge is not None:
        served = served_models(options.judge.url, options.judge.key)
        if options.judge.model not in served:
            some = ", ".join(map(repr, list(served)[:10])) or "nothing"
            raise EvaluationError(
                f"the judge at {options.judge.url} does not serve {options.judge.model!r}; "
                f"it serves {some}{' and others' if len(served) > 10 else ''}"
            )
    return tasks


def context_of(options: Options) -> int | None:
    """The number of tokens that a prompt and its answer may have together in every arm."""
    known = [options.context]
    for arm in options.arms:
        if arm.url is not None:
            served = served_models(arm.url, options.key)
            known.append(served[_served_as(served, options, arm.url)])
        else:
            # A length that is given counts: with YaRN it is more than the checkpoint says.
            given = _max_model_len(arm.arguments)
            known.append(find(options.model).context if given is None else given)
    return min((tokens for tokens in known if tokens is not None), default=None)


def on_cpu(arm: ServedArm, context: int | None) -> ServedArm:
    """The arm for a machine without a GPU: it reads each prompt in one chunk.

    vLLM's runner on CPUs (0.32) ends with "CPU Generator does not use offset" when a request with a
    seed is read in several chunks.
    """
    given = {argument.partition("=")[0].replace("_", "-") for argument in arm.arguments}
    chunks = {"--enable-chunked-prefill", "--no-enable-chunked-prefill", "--max-num-batched-tokens"}
    if arm.url is not None or context is None or given & chunks:
        return arm
    added = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(context)]
    if "--max-model-len" not in given:
        added += ["--max-model-len", str(context)]
    return replace(arm, arguments=(*arm.arguments, *added))


def _max_model_len(arguments: Sequence[str]) -> int | None:
    """The value of ``--max-model-len``, if it is a plain number."""
    for place, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option.replace("_", "-") == "--max-model-len":
            value = value or " ".join(arguments[place + 1 : place + 2])
            return int(value) if value.isdecimal() else None
    return None


def name_at(arm: ServedArm, options: Options) -> str:
    """What an arm's server calls the model: the first of the names that it has.

    Raises:
        ArmError: a server that runs already has none of them.
    """
    if arm.url is None:
        return _names(options)[0]
    return _served_as(served_models(arm.url, options.key), options, arm.url)


def _served_as(served: Mapping[str, Any], options: Options, url: str) -> str:
    names = _names(options)
    found = next((name for name in names if name in served), names[0])
    return served_name(served, found, url)


def _names(options: Options) -> Sequence[str]:
    return options.served_names or (options.model,)


def load(
    task: Task, options: Options, context: int | None, note: Callable[[str], None]
) -> Benchmark:
    names = " ".join([options.model, *options.served_names])
    settings = Settings.of(task, options.settings, context, names)

    def tokenizer() -> Any:
        return load_tokenizer(find(options.model, note))

    around = {"around": 0} if task.cuts_prompts else {}
    cut = MiddleCutter(settings, context, tokenizer, **around)
    task.limits = PromptLimits(PromptTokens(tokenizer, note), context, settings.max_tokens)
    items = task.load(options.data.get(task.name), cut)
    if not items:
        raise TaskError(f"{task.name}: the data holds no item")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise TaskError(f"{task.name}: two items have the id {item.id!r}")
        seen.add(item.id)
    # Without the further groups: they change no answer.
    asked = [{key: value for key, value in asdict(item).items() if key != "also"} for item in items]
    text = json.dumps(asked, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    in_turns = task.in_turns or bool(task.weights)
    return Benchmark(task, settings, some_items(items, options.limit, in_turns=in_turns), digest)


def some_items(items: Sequence[Item], limit: int | None, *, in_turns: bool) -> Sequence[Item]:
    """A random but always equal choice of so many items, in their order.

    A smaller number draws a part of what a larger one draws, so that a run can be enlarged.

    Args:
        in_turns: draw from one group after the other, so that every group is there.
    """
    if limit is None or limit >= len(items):
        return items
    drawn = sorted(items, key=lambda item: hashlib.sha256(item.id.encode()).digest())
    if in_turns:
        seen: Counter[str] = Counter()
        rank = {}
        for item in drawn:
            rank[item.id] = seen[item.group]
            seen[item.group] += 1
        drawn.sort(key=lambda item: rank[item.id])  # stable
    kept = {item.id for item in drawn[:limit]}
    return [item for item in items if item.id in kept]


def work_of(
    benchmark: Benchmark, arm: ServedArm, options: Options, context: int | None
) -> BenchmarkRun:
    settings = benchmark.settings.to_dict()
    configuration = {
        "model": options.model,
        "benchmark": benchmark.task.name,
        "protocol": options.protocol,
        # Not the address, which may change between runs.
        "arm": {**arm.to_result().model_dump(exclude={"url"}), "started": arm.url is None},
        # More seeds or items continue a file.
        "settings": {key: value for key, value in settings.items() if key != "seeds"},
        "context": context if settings["context_tokens"] is not None else None,
        "items": benchmark.digest,
    }
    file = AnswerFile(options.out / benchmark.task.name / f"{arm.name}.jsonl", configuration)
    return BenchmarkRun(
        benchmark.task,
        benchmark.items,
        benchmark.settings.seeds,
        benchmark.settings.sampling,
        file,
        benchmark.settings.first_seed,
    )
