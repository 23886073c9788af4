"""What `mixquant bench` makes of the load generator's output, and what it asks of it."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections import Counter
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import sample_results
from hypothesis import given
from hypothesis import strategies as st
from paths import DATA
from rich.console import Console

from mixquant import cli
from mixquant.bench import counts, generator, summary
from mixquant.bench.counts import Counts
from mixquant.bench.generator import Answer, GeneratorError
from mixquant.bench.trace import Request
from mixquant.bench.workloads import LoadPoint, Plan, points
from mixquant.cli.tables import speed as table
from mixquant.core.recipe import Recipe
from mixquant.results import Measurement

FULL = Counts(quantized=75.0, precise=25.0, queried=200.0, hit=50.0)


def recorded(name: str) -> dict[str, Any]:
    """What `vllm bench serve` of vLLM 0.32 gave for real requests."""
    values: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return values


# --- the generator's output --------------------------------------------------------------------------


def test_answers_are_the_generators_figures() -> None:
    result = recorded("vllm_bench_serve")
    answers = generator.parse(result)
    assert [(a.prompt_tokens, a.output_tokens) for a in answers] == [(20, 3), (30, 5)]
    assert [a.ttft for a in answers] == result["ttfts"]
    # Its own sum of the same, which versions before 0.30 do not give.
    assert [a.e2e for a in answers] == pytest.approx(result["latencies"])
    for answer, latency in zip(answers, result["latencies"], strict=True):
        assert answer.tpot == pytest.approx((latency - answer.ttft) / (answer.output_tokens - 1))


def test_one_token_has_no_time_per_output_token() -> None:
    assert Answer(5, 1, 0.0, 0.1, ()).tpot is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vllm_bench_serve_failed", "Not Found"),
        ("vllm_bench_serve_down", "Cannot connect to host 127.0.0.1:8912"),
    ],
)
def test_a_failed_request_is_one_line(name: str, says: str) -> None:
    with pytest.raises(GeneratorError) as raised:
        generator.parse(recorded(name))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer(9, 4, 0.0, 0.1, (0.1,) * 3), "read 9 tokens of a prompt of 10"),
        (Answer(10, 2, 0.0, 0.1, (0.1,)), "wrote 2 tokens where 4 were asked for"),
    ],
)
def test_other_work_than_asked_for_is_refused(answer: Answer, says: str) -> None:
    with pytest.raises(GeneratorError, match=says):
        generator._check(Request(tuple(range(10)), 4), answer, "http://there")


class _Recorder:
    """Stands in for vLLM's module: notes what is sent, and how much of it at a time."""

    TaskType = SimpleNamespace(GENERATION="generation")
    SampleRequest = SimpleNamespace

    def __init__(self) -> None:
        self.sent: list[tuple[list[list[int]], int]] = []
        self.in_flight = self.most = 0

    async def benchmark(self, **arguments: Any) -> dict[str, Any]:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        prompts = [sample.prompt for sample in arguments["input_requests"]]
        self.sent.append((prompts, arguments["max_concurrency"]))
        for _ in prompts:
            await asyncio.sleep(0)
        self.in_flight -= 1
        return {"of": prompts}


def test_single_requests_go_out_together_and_sessions_one_request_at_a_time() -> None:
    singles = [[Request((i,), 1)] for i in range(5)]
    recorder = _Recorder()
    asyncio.run(generator._send(recorder, "http://there", "m", singles, 3))
    assert recorder.sent == [([[0], [1], [2], [3], [4]], 3)]

    sessions = [[Request((i,), 1), Request((i, i), 1)] for i in range(5)]
    recorder = _Recorder()
    results = asyncio.run(generator._send(recorder, "http://there", "m", sessions, 3))
    assert recorder.most == 3
    assert all(at_once == 1 for _, at_once in recorder.sent)
    assert [result["of"] for result in results] == [[[i], [i, i]] for i in range(5)]


# --- figures -----------------------------------------------------------------------------------------

times = st.floats(1e-4, 1e3)
an_answer = st.builds(
    lambda start, ttft, prompt, itl: Answer(prompt, len(itl) + 1, start, ttft, tuple(itl)),
    times,
    times,
    st.integers(1, 10**6),
    st.lists(times, max_size=5),
)
some_runs = st.lists(st.lists(an_answer, min_size=1, max_size=4), min_size=1, max_size=4)


def a_point(workload: Any = "length", tokens: int = 7, concurrency: int = 1) -> LoadPoint:
    return LoadPoint(workload, tokens, concurrency, tokens, tokens, lambda number: [])


@given(some_runs)
def test_figures_are_medians_within_their_range(runs: list[list[Answer]]) -> None:
    found = {f.metric: f for f in summary.measurements("arm", a_point(), runs, FULL)}
    answers = [answer for run in runs for answer in run]
    assert found["ttft"].value == median(1e3 * a.ttft for a in answers)
    for figure in found.values():
        assert (figure.arm, figure.workload, figure.tokens) == ("arm", "length", 7)
        assert figure.value > 0
        if figure.lowest is not None and figure.highest is not None:
            assert figure.lowest <= figure.value <= figure.highest
    assert found["ttft"].value <= found["e2e"].value
    assert ("tpot" in found) == ("itl" in found) == any(a.output_tokens > 1 for a in answers)
    assert found["prefill"].value > 0
    # A run cannot read faster than its slowest request alone, nor produce tokens faster than read.
    assert found["total"].value > found["output"].value
    assert (found["quantized"].value, found["cached"].value) == (0.75, 0.25)


def test_rates_are_of_whole_runs() -> None:
    run = [Answer(100, 3, 10.0, 1.0, (0.5, 0.5)), Answer(60, 2, 10.5, 2.5, (1.0,))]
    found = {
        f.metric: f.value for f in summary.measurements("a", a_point("batch"), [run], Counts())
    }
    # From 10.0 to 14.0; the last first token came at 13.0.
    assert found["output"] == pytest.approx(5 / 4)
    assert found["total"] == pytest.approx(165 / 4)
    assert found["prefill"] == pytest.approx(160 / 3)
    assert not {"quantized", "cached"} & set(found)


@pytest.mark.parametrize("workload", ["concurrency", "agent"])
def test_prefill_has_no_rate_where_requests_begin_at_different_times(workload: str) -> None:
    run = [Answer(100, 2, 1.0, 1.0, (0.5,))]
    found = summary.measurements("a", a_point(workload), [run], Counts())
    assert "prefill" not in {figure.metric for figure in found}


def figure(arm: str, metric: str, value: float, **more: Any) -> Measurement:
    unit = "ms" if metric in summary.TIMES else "tok/s"
    where: dict[str, Any] = {"tokens": 7, "concurrency": 1, "unit": unit} | more
    return Measurement(arm=arm, metric=metric, value=value, **where)


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6), st.sampled_from(["ttft", "tpot", "total"]))
def test_gains_are_above_one_for_the_faster(base: float, value: float, metric: str) -> None:
    found = [figure("mine", metric, value), figure("bf16", metric, base)]
    gained = summary.gains(found)
    assert gained["bf16", ("length", 7, None, 1), metric] == 1
    ratio = gained["mine", ("length", 7, None, 1), metric]
    faster = value < base if metric in summary.TIMES else value > base
    assert (ratio > 1) == faster or value == base or ratio == pytest.approx(1)
    wanted = base / value if metric in summary.TIMES else value / base
    assert ratio == pytest.approx(wanted)


def test_gains_are_to_the_first_arm_where_there_is_no_bf16_and_within_a_point() -> None:
    found = [
        figure("one", "ttft", 4.0),
        figure("two", "ttft", 2.0),
        figure("two", "ttft", 2.0, tokens=9),
        figure("one", "quantized", 0.5, unit="share"),
    ]
    assert summary.gains(found) == {
        ("one", ("length", 7, None, 1), "ttft"): 1.0,
        ("two", ("length", 7, None, 1), "ttft"): 2.0,
    }
    assert summary.gains([]) == {}


def test_tables_show_medians_ranges_gains_and_shares() -> None:
    runs = [[Answer(100, 2, 0.0, 0.2, (0.01,))], [Answer(100, 2, 1.0, 0.4, (0.03,))]]
    slower = [[Answer(100, 2, 0.0, 0.6, (0.01,))], [Answer(100, 2, 1.0, 0.6, (0.03,))]]
    found = summary.measurements("bf16", a_point(), slower, Counts())
    found += summary.measurements("mixquant", a_point(), runs, FULL)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for each in table.tables(found):
        console.print(each)
    lines = console.export_text().splitlines()
    ours = next(line for line in lines if "mixquant" in line)
    assert "300 200-400" in ours
    assert "2.00x" in ours
    assert "75%" in ours and "25%" in ours
    theirs = next(line for line in lines if "bf16" in line)
    assert "1.00x" not in theirs and "–" in theirs


def test_tables_fit_a_narrow_terminal() -> None:
    run = [Answer(32768, 2, float(i), 12.0, (0.1234,)) for i in range(16)]
    point = a_point("batch", 32768, 16)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    found = [
        figure
        for arm in ("bf16", "quantized")
        for figure in summary.measurements(arm, point, [run], FULL)
    ]
    console.print(*table.tables(found))
    text = console.export_text()
    assert "…" not in text
    assert "12000 12000-12000 1.00x" in text


# --- what the server counts --------------------------------------------------------------------------

PAGE = """\
# HELP mixquant_rows_total Token rows.
# TYPE mixquant_rows_total counter
mixquant_rows_total{engine="0",phase="prefill",precision="quantized"} 600.0
mixquant_rows_total{engine="1",phase="prefill",precision="quantized"} 300.0
mixquant_rows_total{engine="0",phase="prefill",precision="precise"} 100.0
mixquant_rows_total{engine="0",phase="decode",precision="precise"} 77.0
mixquant_rows_total{engine="0",phase="decode",precision="quantized"} 5.0
# HELP vllm:prefix_cache_queries_total Prefix cache queries.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 4000.0
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 1000.0
"""


def test_counts_are_of_prompts_and_of_all_engines() -> None:
    found = counts.parse(PAGE)
    assert found == Counts(quantized=900, precise=100, queried=4000, hit=1000)
    assert (found.quantized_share, found.cached_share) == (0.9, 0.25)
    before = Counts(quantized=500, precise=100, queried=2000, hit=1000)
    assert found.since(before) == Counts(quantized=400, precise=0, queried=2000, hit=0)


def test_nothing_is_said_that_the_server_does_not_tell() -> None:
    assert counts.parse("") == Counts()
    assert (Counts().quantized_share, Counts().cached_share) == (None, None)
    assert counts.parse(PAGE).since(Counts()) == Counts()
    idle = Counts(0, 0, 0, 0)
    assert (idle.quantized_share, idle.cached_share) == (None, None)


# --- what is asked -----------------------------------------------------------------------------------


class Tokenizer:
    """Words of a vocabulary of 100, of which some are no text."""

    all_special_ids = (0, 1)

    def get_vocab(self) -> dict[str, int]:
        return {f"w{i}": i for i in range(100)}

    def get_added_vocab(self) -> dict[str, int]:
        return {"<image>": 50}


def a_plan(**more: Any) -> Plan:
    values: dict[str, Any] = {"lengths": (3, 40), "batches": (1, 4), "concurrencies": (2,)}
    values |= {
        "turns": (),
        "cached": (0,),
        "sessions": (),
        "prompt_tokens": 40,
        "output_tokens": 6,
        "seed": 1,
    }
    return Plan(**(values | more))


def test_points_are_of_the_size_asked_for() -> None:
    found = points(a_plan(), Tokenizer())
    assert [(p.workload, p.tokens, p.concurrency) for p in found] == [
        ("length", 3, 1),
        ("length", 40, 1),
        ("batch", 40, 1),
        ("batch", 40, 4),
        ("concurrency", 40, 2),
    ]
    assert [len(p.run(1)) for p in found] == [1, 1, 1, 4, 4]
    assert [len(p.run(0)) for p in found] == [1, 1, 1, 4, 2]
    for point in found:
        for (request,) in point.run(1):
            assert (len(request.prompt), request.output_tokens) == (point.tokens, 6)
            assert not {0, 1, 50} & set(request.prompt)
            assert point.longest == point.tokens + 6


def test_prompts_are_the_same_for_all_arms_and_new_in_every_run() -> None:
    long_ones = [p for p in points(a_plan(), Tokenizer()) if p.tokens == 40]
    again = [p for p in points(a_plan(), Tokenizer()) if p.tokens == 40]
    every = []
    for point, same in zip(long_ones, again, strict=True):
        for number in range(3):
            assert point.run(number) == same.run(number)
            every += [request.prompt for (request,) in point.run(number)]
    # No prefix of one helps another, within a run or between them.
    assert Counter(prompt[:16] for prompt in every).most_common(1)[0][1] == 1
    other = points(a_plan(seed=2), Tokenizer())[1].run(1)
    assert other != long_ones[0].run(1)


def test_turns_are_new_tokens_behind_what_the_warm_up_has_cached() -> None:
    plan = a_plan(lengths=(), batches=(), concurrencies=(), turns=(5, 9), cached=(0, 48))
    found = points(plan, Tokenizer())
    assert [(p.cached, p.tokens) for p in found] == [(0, 5), (0, 9), (48, 5), (48, 9)]
    prefixes = set()
    for point in found:
        assert point.cached is not None
        (warm_up,), (first,), (second,) = (point.run(number) for number in range(3))
        assert len(warm_up) == (2 if point.cached else 1)
        turns = [warm_up[-1], *first, *second]
        assert {len(turn.prompt) for turn in turns} == {point.tokens + point.cached}
        if point.cached:
            assert warm_up[0].prompt == turns[0].prompt[: point.cached]
            prefixes |= {turn.prompt[: point.cached] for turn in turns}
        assert len({turn.prompt for turn in turns}) == 3
        assert point.longest == point.tokens + point.cached + 6
    assert len(prefixes) == 1
    assert found[-1].name == "turns, 9 tokens behind 48"


def turns_of(gains: dict[tuple[int, int], float], quantized: int = 1) -> list[Measurement]:
    """Times to the first token of two arms, by cached and new tokens."""
    found = []
    for (cached, tokens), gain in gains.items():
        where = {"workload": "turns", "tokens": tokens, "cached": cached}
        found.append(figure("bf16", "ttft", 10.0 * gain, **where))
        found.append(figure("mixquant", "ttft", 10.0, **where))
        share = float(tokens >= quantized)
        found.append(figure("mixquant", "quantized", share, unit="share", **where))
    return found


@pytest.mark.parametrize(
    ("slowest", "quantized", "least"),
    [
        ({128: 0.7, 512: 1.1, 1024: 1.3}, 1, 512),
        ({128: 1.2, 512: 0.9, 1024: 1.3}, 1, 1024),
        ({128: 0.7, 512: 1.1, 1024: 0.99}, 1, None),
        ({128: 1.1, 512: 1.1}, 512, 512),  # where nothing is quantized nothing is known
        ({128: 1.1, 512: 1.1}, 4096, None),
    ],
)
def test_the_threshold_is_where_no_longer_turn_is_slower(
    slowest: dict[int, float], quantized: int, least: int | None
) -> None:
    gains = {(0, tokens): 2.0 for tokens in slowest}
    gains |= {(8192, tokens): gain for tokens, gain in slowest.items()}
    found = turns_of(gains, quantized)
    assert summary.crossover(found, "mixquant") == least
    said = table.threshold(found)
    assert said is not None
    assert ("nothing is known" in said) == (least is None)
    if least is not None:
        recipe = Recipe.from_json(said[said.index("{") :])
        assert recipe.min_prefill_tokens == least - 1  # all but the tail
    assert table.threshold([one for one in found if one.arm == "bf16"]) is None


def test_a_table_of_turns() -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*table.tables(turns_of({(0, 512): 1.0, (98304, 512): 1.25})))
    text = console.export_text()
    assert "512 behind 0 " in text and "512 behind 98304 " in text and "1.25x" in text


def test_what_is_left_out_is_not_asked() -> None:
    assert points(a_plan(lengths=(), batches=(), concurrencies=()), Tokenizer()) == []


# --- the command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lengths", "1,x"], "--lengths '1,x': expected numbers from 1"),
        (["--batches", "0"], "--batches '0'"),
        (["--concurrencies", "2,,3"], "--concurrencies"),
        (["--output-tokens", "0"], "--output-tokens"),
        (["--repeats", "0"], "--repeats"),
        (["--arm", "fast"], "unknown arm 'fast'; expected bf16, quantized, mixquant"),
        (["--arm", "bf16", "--arm", "bf16"], "two arms are called 'bf16'"),
        (["--arm", "x=--a 'b"], "--arm x"),
        (["--url", "there"], "expected NAME=URL"),
        (["--recipe", "quick"], "unknown recipe 'quick'"),
        (["--trace", "missing.jsonl"], "cannot read missing.jsonl: No such file"),
        (["--json", "missing/out.json"], "cannot write missing/out.json"),
        (["--engine", "sglang"], "--engine"),
        (["--engine", "transformers", "--url", "a=http://x"], "--url needs --engine vllm"),
        (["--engine", "transformers", "--trace", "builtin"], "--trace needs --engine vllm"),
        (["--engine", "transformers", "--arm", "a=--x"], "needs --engine vllm"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_looked_for(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", str(tmp_path / "no-model"), *arguments]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert printed.out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lengths", "9000"], "length, 9000 tokens: 9032 tokens exceed the context of"),
        (["--prompt-tokens", "8190", "--batches", "2"], "batch, 8190 tokens, 2 at once"),
        (["--url", "a=http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_server_is_started(
    arguments: list[str], says: str, smollm2_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", smollm2_path, *arguments]) == 2
    printed = capsys.readouterr()
    assert says in printed.err.replace("\n", " ")
    assert printed.out == ""


def test_without_vllm_one_line_says_so(
    smollm2_path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bench = importlib.import_module("mixquant.cli.bench")
    monkeypatch.setattr(bench, "environment", lambda elsewhere: sample_results.ENVIRONMENT)
    monkeypatch.setattr(generator.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", smollm2_path, "--lengths", "5", "--trace", "none"]) == 2
    assert "vLLM, whose load generator this uses, is not installed" in capsys.readouterr().err


def test_the_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that quantizes all of the warm-up, and nothing of the runs that are measured."""
    from mixquant.bench import run

    sent: list[int] = []

    class Load:
        def send(self, url: str, name: str, requests: Any, concurrency: int) -> list[Answer]:
            sent.append(requests)
            return []

    monkeypatch.setattr(
        run,
        "read_counts",
        lambda url: Counts(7.0 * sent.count(0), sum(number > 0 for number in sent), None, None),
    )
    counted: list[Counts] = []

    def measurements(arm: str, point: LoadPoint, runs: Any, counts: Counts) -> list[Any]:
        counted.append(counts)
        return []

    monkeypatch.setattr(run, "measurements", measurements)
    point: Any = LoadPoint("length", 7, 1, 7, 8, lambda number: number)  # type: ignore[arg-type, return-value]
    load: Any = Load()
    arm: Any = SimpleNamespace(name="one", url=None)
    run._measure(load, arm, "http://x", "m", [point], 2, lambda doing, tokens: None)
    assert sent == [0, 1, 2]
    assert counted == [Counts(0.0, 2, None, None)]
