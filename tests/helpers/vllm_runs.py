"""Runs real vLLM engines, one after the other, in a process of its own, and writes down what came out.

    python vllm_runs.py SPEC.json OUT.json

SPEC maps names to engines, the arguments of `_engine`, whose runs are named, too; a run has those of
`run`. Several processes may share it: each engine is run by the one that gets to it first. OUT maps
the names to the runs' results; an engine that does not start gives its error instead.
The engine's scheduler runs in this process, so that a test can set the size of chunks and preempt
requests while they run.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from this_machine import multiply_bf16_in_fp64

TRACE = "MIXQUANT_TRACE"


products: Counter[str] = Counter()


def count_products() -> None:
    """Counts what is multiplied with quantized copies, a layer at a time.

    The trace says what was planned; this says what was done.
    """
    from mixquant.engines.vllm.attention import layers as attention
    from mixquant.engines.vllm.experts import method as experts
    from mixquant.engines.vllm.linear import fp8_layer, operator
    from mixquant.engines.vllm.linear import method as linear

    of_attention, encoded = attention.attend, linear.PhaseLinearMethod.encoded
    in_fp8 = fp8_layer.Fp8Layer.multiplied
    linear_layer, experts_layer = operator._quantized, experts.PhaseExpertsMethod._experts

    def counted_linear(*arguments: Any) -> None:
        products["linear"] += 1
        linear_layer(*arguments)

    def counted_experts(*arguments: Any) -> Any:
        products["experts"] += 1
        return experts_layer(*arguments)

    def counted_fp8(layer: Any, *arguments: Any) -> Any:
        products["linear"] += 1
        products["activations"] += layer.activated
        products["norms"] += layer.norm is not None
        return in_fp8(layer, *arguments)

    def counted_attention(shape: Any, run: Any, *arguments: Any) -> None:
        products["attention"] += len(run.sequences)
        of_attention(shape, run, *arguments)

    def counted_activations(method: Any, *arguments: Any) -> Any:
        if method.activated:
            products["activations"] += 1
        return encoded(method, *arguments)

    attention.attend = counted_attention
    linear.PhaseLinearMethod.encoded = counted_activations  # type: ignore[method-assign]
    fp8_layer.Fp8Layer.multiplied = counted_fp8  # type: ignore[method-assign]
    operator._quantized = counted_linear
    experts.PhaseExpertsMethod._experts = counted_experts  # type: ignore[method-assign]


most_layers_in_bf16 = 0


def watch_loading() -> None:
    """Notes how many of our layers hold a BF16 weight at once, at the most, while they are loaded."""
    from weakref import WeakSet

    from mixquant.engines.vllm.linear.method import PhaseLinearMethod

    layers: WeakSet[Any] = WeakSet()
    creating = PhaseLinearMethod.create_weights
    processing = PhaseLinearMethod.process_weights_after_loading

    def create_weights(self: Any, layer: Any, *arguments: Any, **more: Any) -> None:
        creating(self, layer, *arguments, **more)
        layers.add(layer)

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        global most_layers_in_bf16
        weights = [one.weight for one in layers]
        there = sum(weight.numel() > 0 and not weight.is_meta for weight in weights)
        most_layers_in_bf16 = max(most_layers_in_bf16, there)
        processing(self, layer)

    PhaseLinearMethod.create_weights = create_weights
    PhaseLinearMethod.process_weights_after_loading = process_weights_after_loading


def main(spec_file: str, out_file: str) -> None:
    os.environ[TRACE] = f"{out_file}.trace"
    multiply_bf16_in_fp64()
    count_products()
    watch_loading()
    results: dict[str, Any] = {}
    engines = json.loads(Path(spec_file).read_text())
    sets = any("prefill" in engine for engine in engines.values())
    process = _process_for_prefill() if sets else None
    for number, (name, engine) in enumerate(engines.items()):
        try:
            Path(f"{spec_file}.{number}").touch(exist_ok=False)
        except FileExistsError:  # another process has taken it
            continue
        print(f"== {name}", flush=True)
        try:
            results[name] = _engine(**engine, process=process)
        except Exception as error:
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    Path(out_file).write_text(json.dumps(results))


def _engine(
    model: str,
    options: dict[str, Any],
    runs: dict[str, dict[str, Any]],
    prefill: dict[str, Any] | None = None,
    process: Any = None,
) -> Any:
    """The runs' results.

    ``prefill``: the options of another engine, in another ``process``, which reads the prompts first,
    but for runs with ``"sent": False``.
    """
    if prefill is None:
        with _started(model, options) as llm:
            return {name: run(llm, **arguments) for name, arguments in runs.items()}
    results: dict[str, Any] = {}
    prompts = {
        name: arguments["prompts"]
        for name, arguments in runs.items()
        if arguments.pop("sent", True)
    }
    reading = _prefill_engine(model, prefill, prompts, process)
    with reading as sent, _started(model, options) as llm:
        results |= {f"{name}, prefill": its for name, its in sent.items()}
        for name, arguments in runs.items():
            transfers = sent[name]["transfers"] if name in sent else None
            results[name] = run(llm, **arguments, transfers=transfers)
    return results


@contextlib.contextmanager
def _prefill_engine(
    model: str, options: dict[str, Any], prompts: dict[str, list[list[int]]], process: Any
) -> Iterator[dict[str, Any]]:
    """An engine in another process that has read the prompts and keeps their keys and values."""
    process.send((model, options, prompts))
    yield process.recv()
    process.send("read")


def _process_for_prefill() -> Any:
    """A process that runs such engines, one after the other, by the end of a pipe to it.

    Forked, for vLLM takes ten seconds to import; so it has to be before there is an engine here.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    context.Process(target=_prefill, args=(ours, theirs), daemon=True).start()
    theirs.close()
    return ours


def _prefill(theirs: Any, parent: Any) -> None:
    theirs.close()
    os.environ[TRACE] += ".prefill"
    from mixquant.servers.ports import free_ports

    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_ports(1)[0])
    ask = {"do_remote_decode": True, "do_remote_prefill": False}
    with contextlib.suppress(EOFError):
        while True:
            model, options, prompts = parent.recv()
            with _started(model, options) as llm:
                parent.send(
                    {
                        name: run(llm, these, new_tokens=1, transfers=[ask] * len(these))
                        for name, these in prompts.items()
                    }
                )
                parent.recv()


@contextlib.contextmanager
def _started(model: str, options: dict[str, Any]) -> Iterator[Any]:
    import gc

    import torch
    from vllm import LLM

    global most_layers_in_bf16
    most_layers_in_bf16 = 0
    defaults: dict[str, Any] = {"skip_tokenizer_init": True, "disable_log_stats": True}
    if torch.cuda.is_available():
        # The compiled model and its CUDA graphs are tested, too; engines share the memory, so none
        # can measure what is left.
        defaults |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2 * 10**9}
        defaults |= {"max_num_seqs": 32}
    else:
        defaults |= {"enforce_eager": True}
    llm = LLM(model, **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def run(
    llm: Any,
    prompts: list[list[int]],
    new_tokens: int = 8,
    chunk: int | None = None,
    preempt_after: int | None = None,
    sampling: dict[str, Any] | None = None,
    lora: str | None = None,
    reload_from: str | None = None,
    sleep: int | None = None,
    transfers: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Greedy answers to prompts that are submitted together.

    Args:
        prompts: token ids.
        new_tokens: of each answer.
        chunk: how many tokens a pass may have; None: as the engine was told.
        preempt_after: so many steps into the run, every running request is preempted.
        sampling: further sampling parameters.
        lora: the directory of an adapter for all requests.
        reload_from: a checkpoint whose weights are loaded into the running engine first.
        sleep: a level of vLLM's sleep mode, at which the engine sleeps before the run.
        transfers: per prompt, what the KV connector is told: to keep the prompt's keys and values for
            another engine, or where they are.

    Returns:
        ``products`` with quantized copies, by kind of layer (in this process: not on several ranks),
        ``tokens`` per prompt, ``logprobs`` per prompt and token (the 20 likeliest), ``prompt_logprobs``
        if asked for, ``transfers`` for the engine that reads the prompts' keys and values, and the
        ``passes`` that mixquant traced, requests numbered as the prompts are. Of the loaded model
        ``parameter_bytes``, and ``most_layers_in_bf16`` at once while it was loaded.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    usual = scheduler.max_num_scheduled_tokens
    if sleep:
        llm.sleep(level=sleep)
        llm.wake_up()
    if reload_from:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": reload_from})
    products.clear()
    trace = Path(os.environ[TRACE])
    seen = trace.stat().st_size if trace.exists() else 0
    each = [{"extra_args": {"kv_transfer_params": one}} for one in transfers or ()]
    parameters = [
        SamplingParams(
            temperature=0,
            max_tokens=new_tokens,
            ignore_eos=True,
            logprobs=20,
            detokenize=False,
            **(sampling or {}),
            **(each[number] if each else {}),
        )
        for number in range(len(prompts))
    ]
    adapter = LoRARequest("adapter", 1, lora) if lora else None
    for number, prompt in enumerate(prompts):
        engine.add_request(
            str(number), {"prompt_token_ids": prompt}, parameters[number], lora_request=adapter
        )
    finished: dict[int, Any] = {}
    step = 0
    scheduler.max_num_scheduled_tokens = chunk or usual
    try:
        while engine.has_unfinished_requests():
            if step == preempt_after:
                scheduler.reset_prefix_cache(reset_running_requests=True)
            for output in engine.step():
                if output.finished:
                    finished[int(output.request_id)] = output
            step += 1
    finally:
        scheduler.max_num_scheduled_tokens = usual
    answers = [finished[number].outputs[0] for number in range(len(prompts))]
    return {
        "products": dict(products),
        "tokens": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [{token: entry.logprob for token, entry in place.items()} for place in answer.logprobs]
            for answer in answers
        ],
        "prompt_logprobs": [
            [
                {token: entry.logprob for token, entry in (place or {}).items()}
                for place in finished[number].prompt_logprobs or ()
            ]
            for number in range(len(prompts))
        ],
        "most_layers_in_bf16": most_layers_in_bf16,
        "parameter_bytes": sum(llm.apply_model(_parameter_bytes)),
        "transfers": [finished[number].kv_transfer_params for number in range(len(prompts))],
        "passes": _passes(trace, seen),
    }


def _parameter_bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _passes(trace: Path, start: int) -> list[dict[str, Any]]:
    if not trace.exists():
        return []
    with trace.open() as file:
        file.seek(start)
        passes = [json.loads(line) for line in file]
    for one in passes:
        # vLLM appends something random to the names that requests are given.
        one["requests"] = [int(name.split("-")[0]) for name in one["requests"]]
    return passes


if __name__ == "__main__":
    from mixquant.servers.ports import free_ports

    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NIXL_SIDE_CHANNEL_HOST="127.0.0.1",
        VLLM_NIXL_SIDE_CHANNEL_PORT=str(free_ports(1)[0]),
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # several ranks on one NUMA node
        VLLM_WORKER_MULTIPROC_METHOD=os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "fork"),
        VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    )
    main(*sys.argv[1:])
