"""The plan from runner to layer, in stand-ins for vLLM's model runners."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

import vllm.distributed
from vllm.config import CUDAGraphMode
from vllm.forward_context import (
    ForwardContext,
    get_forward_context,
    override_forward_context,
)

from mixquant.core.phase import PhasePlan, plan_in_force
from mixquant.core.recipe import LEAST_WITHOUT_GRAPHS, Recipe
from mixquant.engines.vllm import counters, follower
from mixquant.engines.vllm.config import PhaseQuantizationConfig
from mixquant.engines.vllm.context import state_of
from mixquant.engines.vllm.counters import Counters
from mixquant.engines.vllm.first_prompts import KEY
from mixquant.engines.vllm.linear.route import StaticRoute
from mixquant.engines.vllm.loading.online import CannotReload
from mixquant.engines.vllm.patches import runners as passes
from mixquant.engines.vllm.stack import with_room


class Model(torch.nn.Module):
    """Notes the plan in force whenever it runs. With ``quantized`` it has a layer with a copy."""

    def __init__(self, quantized: bool = True) -> None:
        super().__init__()
        self.layer: Any = torch.nn.Module()
        if quantized:
            self.layer.mixquant_method = SimpleNamespace(fp8=None)
        self.plans: list[PhasePlan | None] = []
        self.modes: list[CUDAGraphMode] = []  # in which the passes ran in the end
        self.fails = False

    def forward(self, input_ids: Any = None, positions: Any = None, **kwargs: Any) -> Any:
        self.plans.append(plan_in_force())
        self.modes.append(get_forward_context().cudagraph_runtime_mode)
        if self.fails:
            raise RuntimeError("out of something")
        return positions

    def run(self, rows: int, mode: CUDAGraphMode = CUDAGraphMode.NONE, mrope: bool = False) -> None:
        context = ForwardContext(
            no_compile_layers={}, attn_metadata={}, slot_mapping={}, cudagraph_runtime_mode=mode
        )
        shape = (3, rows) if mrope else (rows,)
        with override_forward_context(context):
            self(input_ids=torch.zeros(rows), positions=torch.zeros(shape), inputs_embeds=None)

    @property
    def last(self) -> PhasePlan | None:
        return self.plans[-1]


@dataclass
class Step:
    """What the scheduler asks for: sequences of (first position, rows, prompt), and how they run."""

    sequences: list[tuple[int, int, int]]
    padding: int = 0
    mode: CUDAGraphMode = CUDAGraphMode.NONE
    replayed: bool = False  # the model's forward is not called
    mrope: bool = False
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = [count for _, count, _ in self.sequences]
        self.num_scheduled_tokens = {f"r{i}": count for i, count in enumerate(rows)}
        self.rows = sum(rows) + self.padding
        self.total_num_scheduled_tokens = sum(rows)


class Runner:
    """The parts that the two model runners have in common."""

    def __init__(self, method: Any, model: Model) -> None:
        self.vllm_config = SimpleNamespace(
            quant_config=method,
            parallel_config=SimpleNamespace(
                data_parallel_rank=0, data_parallel_index=0, tensor_parallel_size=1
            ),
            model_config=SimpleNamespace(max_model_len=4096),
            compilation_config=SimpleNamespace(
                cudagraph_capture_sizes=[], cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE
            ),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=300),
            use_v2_model_runner=isinstance(self, RunnerV2),
            lora_config=None,
        )
        self.device = torch.device("cpu")
        self.model: Any = model
        self.drafter = Model()

    def get_model(self) -> Model:
        return self.model

    def initialize_kv_cache(self) -> None:
        self.planned = self.vllm_config.compilation_config.cudagraph_capture_sizes

    def forward(self, step: Step) -> None:
        if not step.replayed:
            self.model.run(step.rows, step.mode, step.mrope)
        self.drafter.run(step.rows)

    def profile_run(self: Any, randomize_inputs: bool = False) -> str:
        self._dummy_run(40)
        return "profiled"


class RunnerV1(Runner):
    def _prepare_inputs(self, scheduler_output: Step, num_scheduled: Any) -> tuple[Any, ...]:
        first, _, prompt = np.array(scheduler_output.sequences).T
        spare = np.array([7, 7])  # rows of the table that hold no request
        self.input_batch = SimpleNamespace(
            num_reqs=len(first),
            req_ids=[f"r{i}" for i in range(len(first))],
            num_computed_tokens_cpu=np.append(first, spare).astype(np.int32),
            num_prompt_tokens=np.append(prompt, spare).astype(np.int32),
        )
        return (None, None, 1)

    def execute_model(self, scheduler_output: Step, intermediate_tensors: Any = None) -> str:
        if scheduler_output.sequences:
            assert self._prepare_inputs(scheduler_output, None) == (None, None, 1)
            self.forward(scheduler_output)
        return "executed"

    def _dummy_run(self, rows: int, mode: CUDAGraphMode = CUDAGraphMode.NONE) -> None:
        self.model.run(rows, mode)


class RunnerV2(Runner):
    def prepare_inputs(self, scheduler_output: Step, batch_desc: Any, **more: Any) -> Any:
        first, rows, prompt = np.array(scheduler_output.sequences).T
        count = len(first)
        slots = np.arange(count)[::-1] + 3  # requests lie in the table in another order
        table = np.full(count + 5, 10_000)
        table[slots] = prompt
        # After a preemption generated tokens are in here, too.
        prefill = SimpleNamespace(np=table + 10)
        self.req_states = SimpleNamespace(prompt_len=SimpleNamespace(np=table), prefill_len=prefill)
        return SimpleNamespace(
            num_reqs=count,
            req_ids=[f"r{i}" for i in range(count)],
            idx_mapping_np=np.append(slots, 0).astype(np.int32),
            num_computed_tokens_np=np.append(first, 0).astype(np.int32),
            num_scheduled_tokens=np.append(rows, 0).astype(np.int32),
        )

    def execute_model(
        self, scheduler_output: Step, intermediate_tensors: Any = None, dummy_run: bool = False
    ) -> str:
        if dummy_run:
            self.model.run(scheduler_output.rows)
        elif scheduler_output.sequences:
            assert self.prepare_inputs(scheduler_output, None).num_reqs
            self.forward(scheduler_output)
        return "executed"

    def _dummy_run(self, rows: int, mode: CUDAGraphMode = CUDAGraphMode.NONE) -> None:
        if mode == CUDAGraphMode.NONE:
            self.execute_model(Step([(0, rows, 0)]), dummy_run=True)
        else:
            self.model.run(rows, mode)


@pytest.fixture(autouse=True)
def _one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_rank", lambda: 0)
    group = SimpleNamespace(is_first_rank=True)
    monkeypatch.setattr(vllm.distributed, "get_pp_group", lambda: group)
    monkeypatch.setattr(counters, "_export", lambda path: None)


@pytest.fixture
def method() -> PhaseQuantizationConfig:
    config = PhaseQuantizationConfig()
    config.recipe = Recipe(format="int8", min_prefill_tokens=6, precise_head=1).resolved(
        frozenset({"int8"})
    )
    config.counters = Counters.create(2)
    return config


@pytest.fixture(params=["V1", "V2"])
def make(
    request: Any, method: PhaseQuantizationConfig, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Makes a runner of either kind, of a class that is followed."""
    base, name = {"V1": (RunnerV1, passes.V1), "V2": (RunnerV2, passes.V2)}[request.param]
    for each in (passes.V1, passes.V2):
        monkeypatch.delitem(sys.modules, each, raising=False)
    module: Any = ModuleType(name)
    module.GPUModelRunner = type("GPUModelRunner", (base,), dict(vars(base)))
    monkeypatch.setitem(sys.modules, name, module)
    passes.install(method)
    # As vLLM's own for CPUs does.
    runner_class = type("CPUModelRunner", (module.GPUModelRunner,), {})

    def make(of: Any = method, model: Model | None = None) -> Any:
        return runner_class(of, Model() if model is None else model)

    return make


def counted(method: PhaseQuantizationConfig) -> tuple[list[int], dict[str, int]]:
    """Rows (of prompts and others, of each quantized and precise) and passes."""
    assert method.counters is not None
    table = Counters(method.counters)
    return list(table.rows().values()), {k: v for k, v in table.passes().items() if v}


# --- the plan ----------------------------------------------------------------------------------------


def test_the_plan_is_in_force_in_the_forward_pass_alone(
    make: Callable[..., Any], method: PhaseQuantizationConfig
) -> None:
    runner = make()
    steps = Step([(0, 10, 10), (20, 1, 12), (5, 8, 30)], padding=3)
    assert runner.execute_model(steps) == "executed"
    plan = runner.model.last
    assert (plan.rows, plan.quantized) == (22, ((1, 9), (11, 19)))
    assert plan.precise == ((0, 1), (9, 11))  # the last three are padding
    assert runner.drafter.plans == [None]
    assert plan_in_force() is None
    runner.drafter.run(22)
    runner.model.run(22)  # by somebody else, not the runner
    assert [runner.drafter.last, runner.model.last] == [None, None]
    assert counted(method) == ([16, 2, 0, 1], {"quantized": 1})


def test_a_pass_has_room_on_the_stack(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make()
    below: list[Any] = []

    def forward(step: Step) -> None:
        below.extend(frame.f_code for frame, _ in traceback.walk_stack(None))

    monkeypatch.setattr(runner, "forward", forward)
    runner.execute_model(Step([(0, 10, 10)]))
    assert with_room.__code__ in below


def test_the_rule_holds_in_a_run(make: Callable[..., Any], method: PhaseQuantizationConfig) -> None:
    runner = make()
    for sequences in (
        [(10, 1, 10), (33, 1, 12)],  # decode
        [(0, 7, 7)],  # five rows are allowed, one fewer than pay
        [(10, 3, 10), (12, 4, 12)],  # decode with drafted tokens
    ):
        runner.execute_model(Step(sequences))
        plan = runner.model.last
        assert plan is None or not plan.quantized
    assert counted(method) == ([0, 7, 0, 9], {"precise": 3})
    runner.execute_model(Step([(0, 8, 8)]))
    assert runner.model.last.quantized == ((1, 7),)
    runner.execute_model(Step([(30, 10, 200), (4, 1, 4)], mrope=True))
    assert runner.model.last.quantized == ((0, 10),)
    assert counted(method) == ([16, 9, 0, 10], {"precise": 3, "quantized": 2})


@pytest.mark.parametrize(
    "recipe",
    [
        {"preset": "exact"},
        {"role": "decode"},
        {"preset": "exact", "role": "prefill"},
        {"preset": "exact", "prefill_attention": "fp8"},  # which no CPU has
        {"ignore": ("*",)},
        {"ignore": ("*",), "everywhere": True},
        {"ignore": ("*",), "role": "prefill"},
    ],
)
def test_where_nothing_is_quantized_there_are_no_plans(
    recipe: dict[str, Any],
    make: Callable[..., Any],
    method: PhaseQuantizationConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(follower.TRACE, str(tmp_path / "trace.jsonl"))
    method.recipe = Recipe(min_prefill_tokens=0, **recipe).resolved(frozenset({"int8"}))
    runner = make(model=Model(quantized=False))
    runner.execute_model(Step([(0, 10, 10)]))
    assert runner.model.last is None or not runner.model.last.quantized
    runner.execute_model(Step([(10, 1, 10)], replayed=True))
    assert counted(method) == ([0, 10, 0, 1], {"precise": 1, "graph": 1})
    lines = (tmp_path / "trace.jsonl").read_text().splitlines()
    assert [json.loads(line)["quantized"] for line in lines] == [[], []]


def test_a_layer_of_experts_alone_is_quantized(make: Callable[..., Any]) -> None:
    model = Model(quantized=False)
    model.layer.quant_method = SimpleNamespace(quantized=object())
    runner = make(model=model)
    runner.execute_model(Step([(0, 10, 10)]))
    assert runner.model.last.quantized == ((1, 9),)


@pytest.mark.parametrize("recipe", [{"everywhere": True}, {"role": "prefill"}])
def test_everywhere_and_in_a_prefill_engine_every_row_of_every_pass_is_quantized(
    recipe: dict[str, Any], make: Callable[..., Any], method: PhaseQuantizationConfig
) -> None:
    method.recipe = Recipe(preset="fast", **recipe).resolved(frozenset({"int8"}))
    runner = make()
    runner.execute_model(Step([(10, 1, 10), (0, 4, 4)], padding=3))
    assert (runner.model.last.rows, runner.model.last.quantized) == (8, ((0, 8),))
    runner._dummy_run(50, CUDAGraphMode.PIECEWISE)  # what a graph holds
    assert runner.model.last.quantized == ((0, 50),)
    runner.execute_model(Step([(11, 1, 10)], replayed=True))
    assert counted(method) == ([4, 0, 2, 0], {"quantized": 1, "graph": 1})
    assert plan_in_force() is None


def test_generated_tokens_computed_again_are_precise(make: Callable[..., Any]) -> None:
    """After a preemption a request comes back with what it had generated."""
    runner = make()
    runner.execute_model(Step([(0, 20, 12)]))
    assert runner.model.last.quantized == ((1, 11),)
    runner.execute_model(Step([(12, 20, 12)]))
    assert runner.model.last is None or not runner.model.last.quantized


def test_a_pass_of_another_row_count_is_precise(make: Callable[..., Any]) -> None:
    """Fewer rows than the sequences have: nobody knows which they are."""
    runner = make()
    runner.execute_model(Step([(0, 10, 10)], padding=-1))
    assert runner.model.last is None


def test_dummy_runs_are_precise_and_count_nothing(
    make: Callable[..., Any], method: PhaseQuantizationConfig
) -> None:
    runner = make()
    for _ in range(2):
        runner._dummy_run(50)
        runner._dummy_run(50, CUDAGraphMode.PIECEWISE)
        assert runner.model.plans[-2:] == [None, None]
        runner.execute_model(Step([(0, 50, 50)]))
        assert runner.model.last is not None
    assert counted(method)[1] == {"quantized": 2}


def test_profiling_runs_the_largest_pass_quantized(
    make: Callable[..., Any], method: PhaseQuantizationConfig
) -> None:
    runner = make()
    assert runner.profile_run(randomize_inputs=True) == "profiled"
    plan = runner.model.last
    assert (plan.rows, plan.quantized_rows) == (40, 39)
    runner._dummy_run(40)
    assert runner.model.last is None
    runner.model.fails = True
    with pytest.raises(RuntimeError):
        runner.profile_run()
    runner.model.fails = False
    runner._dummy_run(40)
    assert runner.model.last is None
    assert counted(method) == ([0, 0, 0, 0], {})


def test_a_replayed_graph_is_counted_and_leaves_nothing_behind(
    make: Callable[..., Any], method: PhaseQuantizationConfig
) -> None:
    runner = make()
    runner.execute_model(Step([(0, 10, 10), (20, 1, 5)], replayed=True))
    assert (runner.model.plans, runner.drafter.last) == ([], None)
    assert counted(method) == ([0, 10, 0, 1], {"graph": 1})
    runner._dummy_run(11)
    assert runner.model.last is None


@pytest.mark.parametrize("mode", [CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL])
def test_a_pass_in_a_graph_is_precise(
    mode: CUDAGraphMode, make: Callable[..., Any], method: PhaseQuantizationConfig
) -> None:
    runner = make()
    runner.execute_model(Step([(0, 10, 10)], mode=mode))
    plan = runner.model.last
    assert plan is None or not plan.quantized
    assert counted(method) == ([0, 10, 0, 0], {"graph": 1})


def test_a_pass_that_is_captured_is_precise(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The V2 runner captures whole passes in a context that says NONE."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    runner = make()
    runner.execute_model(Step([(0, 10, 10)]))
    assert runner.model.last is None or not runner.model.last.quantized


# --- graphs that are captured quantized --------------------------------------------------------------


@pytest.fixture
def with_graphs(make: Callable[..., Any], method: PhaseQuantizationConfig) -> Any:
    """A V2 runner whose passes of 129 to 256 rows replay graphs that are captured quantized."""
    method.default_graph_sizes = method.default_threshold = True
    runner = make()
    if not isinstance(runner, RunnerV2):
        pytest.skip("V2's")
    runner.model.layer.mixquant_method.fp8 = object()
    runner.vllm_config.compilation_config.cudagraph_capture_sizes = [1, 2, 4, 8]
    runner.profile_run()
    runner.initialize_kv_cache()
    assert runner.planned == [1, 2, 4, 8, 64, 128, 256]  # no pass has more than 300 rows
    # vLLM checks its configuration again once the engine has started.
    assert runner.vllm_config.compilation_config.cudagraph_capture_sizes == [1, 2, 4, 8]
    return runner


def static(runner: Any, rows: int) -> tuple[list[int], list[int]]:
    """The precise rows that a graph for so many rows would read, by number and by row."""
    graphs = runner.mixquant_follower.graphs
    route = state_of(graphs.plan_to_capture(rows)).route
    index = [row for row in route.index.tolist() if row >= 0]
    return index, [number for number in route._numbers.tolist() if number >= 0]


def test_what_is_captured_for_many_rows_is_quantized(with_graphs: Any) -> None:
    for rows, quantized in ((8, False), (64, False), (128, False), (256, True)):
        for mode in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE):  # warm-up and capture
            with_graphs.model.run(rows, mode)
            plan = with_graphs.model.last
            assert (plan is not None) == quantized
            if plan is not None:
                assert (plan.quantized, plan.precise) == (((0, rows),), ())
                assert isinstance(state_of(plan).route, StaticRoute)


def test_a_whole_pass_that_is_captured_is_precise_at_any_size(
    with_graphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with_graphs.model.run(256)
    assert with_graphs.model.last is None


def test_precise_rows_are_filled_in_before_a_replay(
    with_graphs: Any, method: PhaseQuantizationConfig
) -> None:
    before = counted(method)[1]
    step = Step([(0, 100, 100), (20, 1, 5), (3, 60, 90)], 95, CUDAGraphMode.PIECEWISE)
    with_graphs.execute_model(step)
    plan = with_graphs.model.last
    assert plan.precise == ((0, 1), (99, 101)) and plan.quantized == ((1, 99), (101, 161))
    assert static(with_graphs, 256) == ([0, 99, 100], [0, 1, 2])
    assert state_of(plan).route is None  # the graph's, not its own
    assert with_graphs.model.modes[-1] == CUDAGraphMode.PIECEWISE
    with_graphs.execute_model(Step([(5, 200, 300)], 56, CUDAGraphMode.PIECEWISE))
    assert static(with_graphs, 256) == ([], [])  # nothing is left of the pass before
    assert counted(method)[1] == {**before, "quantized_graph": 2}


@pytest.mark.parametrize(
    "sequences",
    [
        [(0, 120, 120), *[(20, 1, 5)] * 17],  # more precise rows than a graph has places for
        [(20, 1, 5)] * 140,
        [(0, 5, 5), *[(20, 1, 5)] * 130],  # too few quantizable ones
    ],
)
def test_a_pass_that_no_graph_serves_runs_without_one(
    sequences: list[tuple[int, int, int]], with_graphs: Any, method: PhaseQuantizationConfig
) -> None:
    rows = sum(count for _, count, _ in sequences)
    with_graphs.execute_model(Step(sequences, 256 - rows, CUDAGraphMode.PIECEWISE))
    assert with_graphs.model.modes[-1] == CUDAGraphMode.NONE
    kind = "quantized" if sequences[0][1] == 120 else "precise"
    assert counted(method)[1] == {kind: 1}
    plan = with_graphs.model.last
    assert (plan is not None and bool(plan.quantized)) == (kind == "quantized")


def test_smaller_passes_replay_precise_graphs(
    with_graphs: Any, method: PhaseQuantizationConfig
) -> None:
    with_graphs.execute_model(Step([(0, 100, 100)], 28, CUDAGraphMode.PIECEWISE))
    plan = with_graphs.model.last
    assert plan is None or not plan.quantized
    assert with_graphs.model.modes[-1] == CUDAGraphMode.PIECEWISE
    assert counted(method)[1] == {"graph": 1}


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("sizes chosen", "cudagraph_capture_sizes or max_cudagraph_capture_size is set"),
        ("no graphs", None),
        ("attention inside", "vLLM captures attention in its graphs"),
        ("LoRA", "LoRA is on"),
        ("another layer", "needs layers in FP8 on Hopper, without a bias"),
        ("experts", "the model has quantized experts"),
        ("V1", "needs vLLM's model runner V2"),
    ],
)
def test_other_engines_capture_what_they_did(
    case: str,
    why: str | None,
    make: Callable[..., Any],
    method: PhaseQuantizationConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(passes, "log_table", lambda model, recipe, patches: lines.extend(patches))
    method.default_graph_sizes = case != "sizes chosen"
    runner = make()
    config = runner.vllm_config
    runner.model.layer.mixquant_method.fp8 = None if case == "another layer" else object()
    config.use_v2_model_runner = case != "V1"
    if case != "no graphs":
        config.compilation_config.cudagraph_capture_sizes = [1, 2, 4, 8]
    if case == "attention inside":
        config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    if case == "LoRA":
        config.lora_config = object()
    if case == "experts":
        runner.model.layer.quant_method = SimpleNamespace(quantized=object())
    runner.initialize_kv_cache()
    assert runner.planned == ([] if case == "no graphs" else [1, 2, 4, 8])
    assert lines == ([] if why is None else [f"quantized CUDA graphs: none ({why})"])
    runner.model.run(256, CUDAGraphMode.PIECEWISE)
    assert runner.model.last is None


@pytest.mark.parametrize("said", [False, True])
def test_without_quantized_graphs_a_gpus_default_threshold_is_higher(
    said: bool,
    make: Callable[..., Any],
    method: PhaseQuantizationConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mixquant.engines.vllm.hardware.is_gpu", lambda: True)
    method.default_threshold = not said
    runner = make()
    runner.profile_run()
    follower = runner.mixquant_follower
    least = 6 if said else LEAST_WITHOUT_GRAPHS
    assert follower.graphs is None
    assert follower.thresholds.min_prefill_tokens == follower.recipe.min_prefill_tokens == least
    rows = LEAST_WITHOUT_GRAPHS + 2  # of them a precise head and tail of one token each
    for count, quantized in ((rows - 1, said), (rows, True)):
        runner.execute_model(Step([(0, count, count)]))
        assert bool(runner.model.last.quantized) == quantized


def test_with_quantized_graphs_the_default_threshold_stays(
    with_graphs: Any, method: PhaseQuantizationConfig
) -> None:
    assert with_graphs.mixquant_follower.thresholds.min_prefill_tokens == 6


def test_an_error_in_the_forward_pass_ends_the_plan(make: Callable[..., Any]) -> None:
    runner = make()
    runner.model.fails = True
    with pytest.raises(RuntimeError, match="out of something"):
        runner.execute_model(Step([(0, 10, 10)]))
    assert runner.model.last is not None
    assert plan_in_force() is None
    runner.model.fails = False
    runner._dummy_run(10)
    assert runner.model.last is None
    runner.execute_model(Step([(0, 10, 10)]))
    assert runner.model.last.quantized == ((1, 9),)  # type: ignore[attr-defined]


def test_steps_without_tokens(make: Callable[..., Any], method: PhaseQuantizationConfig) -> None:
    runner = make()
    assert runner.execute_model(Step([])) == "executed"
    assert counted(method) == ([0, 0, 0, 0], {})


def test_a_model_that_is_loaded_anew_is_followed(make: Callable[..., Any]) -> None:
    runner = make()
    runner.execute_model(Step([(0, 10, 10)]))
    runner.model = Model()
    for _ in range(3):
        runner.execute_model(Step([(0, 10, 10)]))
        assert runner.model.last.quantized == ((1, 9),)
        assert plan_in_force() is None
    assert len(runner.model._forward_pre_hooks) == len(runner.model._forward_hooks) == 1


def test_two_runners_do_not_meet(make: Callable[..., Any]) -> None:
    one, other = make(), make()
    one.execute_model(Step([(0, 10, 10)]))
    other._dummy_run(10)
    assert (one.model.last is None, other.model.last) == (False, None)


def test_another_methods_runner_is_left_alone(
    make: Callable[..., Any], method: PhaseQuantizationConfig
) -> None:
    for other in (None, object()):
        runner = make(other)
        assert runner.execute_model(Step([(0, 10, 10)])) == "executed"
        assert runner.profile_run() == "profiled"
        assert runner.model.plans == [None, None]
        assert not runner.model._forward_hooks and not runner.model._forward_pre_hooks
        assert "mixquant_follower" not in vars(runner)
    assert counted(method) == ([0, 0, 0, 0], {})


def test_installing_again_changes_nothing(
    make: Callable[..., Any], method: PhaseQuantizationConfig
) -> None:
    runner = make()
    before = type(runner).execute_model
    passes.install(method)
    assert type(runner).execute_model is before
    runner.execute_model(Step([(0, 10, 10)]))
    assert counted(method)[1] == {"quantized": 1}


@pytest.mark.parametrize("which", ["tensor rank", "pipeline stage"])
def test_only_the_first_worker_of_an_engine_counts(
    which: str,
    make: Callable[..., Any],
    method: PhaseQuantizationConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if which == "tensor rank":
        monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_rank", lambda: 1)
    else:
        group = SimpleNamespace(is_first_rank=False)
        monkeypatch.setattr(vllm.distributed, "get_pp_group", lambda: group)
    runner = make()
    runner.execute_model(Step([(0, 10, 10)]))
    assert runner.model.last.quantized == ((1, 9),)  # it quantizes all the same
    assert counted(method) == ([0, 0, 0, 0], {})


def test_without_counters_all_else_works(
    make: Callable[..., Any], method: PhaseQuantizationConfig
) -> None:
    for gone in (None, "/no/such/file"):  # the latter on another host
        method.counters = gone
        runner = make()
        runner.execute_model(Step([(0, 10, 10)]))
        assert runner.model.last.quantized == ((1, 9),)


def test_data_parallel_ranks_of_a_dense_model_count_apart(
    make: Callable[..., Any], method: PhaseQuantizationConfig
) -> None:
    """vLLM tells each of them that it is rank 0 of one; but two who add to one number lose some."""
    runner = make()
    runner.vllm_config.parallel_config.data_parallel_index = 1
    runner.execute_model(Step([(0, 10, 10)]))
    assert method.counters is not None
    table = Counters(method.counters)._table
    assert not table[0].any() and table[1].any()


def test_the_trace_has_a_line_for_each_pass(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "trace.jsonl"
    monkeypatch.setenv(follower.TRACE, str(file))
    runner = make()
    runner.profile_run()
    runner.execute_model(Step([(0, 10, 10), (20, 2, 21)], padding=4))
    runner._dummy_run(8)
    runner.execute_model(Step([(20, 1, 20)]))
    runner.execute_model(Step([(0, 10, 10)], replayed=True))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["quantized", "precise", "graph"]
    assert lines[0] == {
        "kind": "quantized",
        "requests": ["r0", "r1"],
        "first_positions": [0, 20],
        "row_counts": [10, 2],
        "prompt_lengths": [10, 21],
        "quantized": [[1, 9]],
    }
    assert [line["quantized"] for line in lines[1:]] == [[], []]


# --- whether the patch took ---------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said in vLLM's log."""
    lines: list[str] = []
    logger = SimpleNamespace(warning=lambda line, *args: lines.append(line % args), info=print)
    monkeypatch.setattr(follower, "logger", logger)
    monkeypatch.setattr(passes, "logger", logger)
    monkeypatch.setattr(passes, "_said", False)
    return lines


def unnoted(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM prepared the inputs of its passes elsewhere."""
    for base in (RunnerV1, RunnerV2):
        prepare = "_prepare_inputs" if base is RunnerV1 else "prepare_inputs"
        if isinstance(runner, base):
            monkeypatch.setattr(type(runner).__mro__[1], prepare, getattr(base, prepare))


def test_a_pass_that_was_not_noted_is_said_once(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    runner = make()
    unnoted(runner, monkeypatch)
    for _ in range(3):
        runner.execute_model(Step([(0, 10, 10)]))
        assert runner.model.last is None
    (line,) = said
    assert "a pass of 10 tokens" in line


def test_dummy_passes_and_steps_without_a_pass_say_nothing(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    runner = make()
    unnoted(runner, monkeypatch)
    runner.profile_run()
    for mode in CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE:
        runner._dummy_run(40, mode)
        runner.execute_model(Step([]))
        # As of an engine that only encodes images: there are tokens, but the model does not run.
        runner.execute_model(Step([(0, 10, 10)], replayed=True))
    if isinstance(runner, RunnerV2):
        runner.execute_model(Step([(0, 40, 0)]), None, True)
    assert said == []


def test_where_passes_are_noted_nothing_is_said(
    make: Callable[..., Any], method: PhaseQuantizationConfig, said: list[str]
) -> None:
    runner = make()
    runner.profile_run()
    for step in (
        Step([(0, 10, 10)]),
        Step([(10, 1, 10)], replayed=True),
        Step([(11, 1, 10)], mode=CUDAGraphMode.FULL),
        Step([]),
        Step([(0, 10, 10)], padding=-1),
    ):
        runner._dummy_run(40)
        runner.execute_model(step)
        runner.model.run(40)  # by somebody else
    assert said == []


def test_where_every_row_is_quantized_nothing_is_said(
    make: Callable[..., Any],
    method: PhaseQuantizationConfig,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    method.recipe = Recipe(preset="fast", everywhere=True).resolved(frozenset({"int8"}))
    runner = make()
    unnoted(runner, monkeypatch)
    runner.execute_model(Step([(0, 10, 10)]))
    assert runner.model.last.quantized == ((0, 10),)
    assert said == []


def test_a_model_without_a_runner_that_is_known_is_said_once(
    method: PhaseQuantizationConfig, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    for module in (passes.V1, passes.V2):
        monkeypatch.delitem(sys.modules, module, raising=False)
    passes.install(method)
    passes.install(method)
    (line,) = said
    assert passes.V1 in line and passes.V2 in line


def test_a_runner_that_is_known_is_enough(make: Callable[..., Any], said: list[str]) -> None:
    make()
    assert said == []


# --- weights that are loaded anew --------------------------------------------------------------------


def test_a_reload_in_the_kernels_format_is_refused(method: PhaseQuantizationConfig) -> None:
    class Reloading(RunnerV1):
        def reload_weights(
            self,
            weights_iterator: Any = None,
            weights_path: str | None = None,
            is_checkpoint_format: bool = True,
        ) -> str:
            return "reloaded"

    passes._wrap(Reloading, "_prepare_inputs", passes.note_v1, type(method))
    runner = Reloading(method, Model())
    assert runner.reload_weights(weights_path="a/path") == "reloaded"
    for refused in (
        lambda: runner.reload_weights([], is_checkpoint_format=False),
        lambda: runner.reload_weights([], None, False),
    ):
        with pytest.raises(CannotReload, match="is_checkpoint_format=True"):
            refused()
    other = Reloading(SimpleNamespace(), Model())  # another method's
    assert other.reload_weights([], None, False) == "reloaded"


def test_the_models_own_loading_is_followed(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    renewed: list[Any] = []
    model.layer = torch.nn.Linear(2, 2)
    model.layer.quant_method = SimpleNamespace(renew=renewed.append)
    model.load_weights = lambda weights: {"layer.weight"}  # type: ignore[assignment]
    runner = make(model=model)
    runner.execute_model(Step([(0, 10, 10)]))
    runner.execute_model(Step([(0, 10, 10)]))
    assert model.load_weights([]) == {"layer.weight"}
    assert renewed == [model.layer]


def test_rows_behind_the_first_prompt_of_a_beam_are_precise(make: Callable[..., Any]) -> None:
    """Its prompt is 20 tokens long by now, of which it has generated the last eight."""
    runner = make()
    step: Any = Step([(0, 20, 20), (0, 20, 20)])
    parameters = SimpleNamespace(extra_args={KEY: 12})
    step.scheduled_new_reqs = [SimpleNamespace(req_id="r1", sampling_params=parameters)]
    runner.execute_model(step)
    assert runner.model.last.quantized == ((1, 19), (21, 31))
    again: Any = Step([(0, 20, 20), (0, 20, 20)])
    again.finished_req_ids = {"r1"}
    runner.execute_model(again)
    assert runner.model.last.quantized == ((1, 19), (21, 39))
