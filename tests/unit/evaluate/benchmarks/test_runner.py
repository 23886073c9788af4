"""The runner against a server over real HTTP: what is asked how often, and what becomes of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from chat_stub import Body, Drop, Refuse, Stub, question, serving

from mixquant.evaluate.benchmarks.answer_file import AnswerFile, Entry
from mixquant.evaluate.benchmarks.chat import Endpoint
from mixquant.evaluate.benchmarks.runner import HOPELESS, BenchmarkRun, RunError, run
from mixquant.evaluate.tasks import Answer, Chat, Item, JudgeError, Task, Verdict


class Echo(Task):
    """Right is who repeats the question."""

    name = "echo"

    async def score(self, item: Item, answer: Answer, judge: Chat | None = None) -> Verdict:
        if answer["text"] == "crash the scorer":
            raise ZeroDivisionError("in the scorer")
        return Verdict(float(answer["text"] == item.reference))


class Judged(Echo):
    name = "judged"
    needs_judge = True

    async def score(self, item: Item, answer: Answer, judge: Chat | None = None) -> Verdict:
        assert judge is not None
        said = await judge.ask([{"role": "user", "content": answer["text"]}], temperature=0)
        if said.text not in ("yes", "no"):
            raise JudgeError(f"the judge said {said.text!r}")
        return Verdict(float(said.text == "yes"))


class TwoTurns(Echo):
    name = "two-turns"

    async def run(self, item: Item, chat: Chat, seed: int, judge: Chat | None = None) -> Answer:
        first = await chat.ask(item.messages, seed=seed)
        again = [*item.messages, {"role": "assistant", "content": first.text}]
        second = await chat.ask([*again, {"role": "user", "content": item.id}], seed=seed)
        return {"text": second.text, "turns": [first.text, second.text]}


def items(number: int) -> list[Item]:
    return [
        Item(f"q{place}", ({"role": "user", "content": f"q{place}"},), f"q{place}")
        for place in range(number)
    ]


@dataclass
class Ran:
    work: BenchmarkRun
    stub: Stub
    judge: Stub
    told: list[Entry] = field(default_factory=list)

    @property
    def entries(self) -> dict[tuple[str, int], Entry]:
        return self.work.file.entries


def echo(body: Body) -> str:
    return question(body)[0]


def do(
    path: Path,
    task: Task,
    asked: Sequence[Item],
    answer: Callable[[Body], str | dict[str, Any]] = echo,
    judge: Callable[[Body], str | dict[str, Any]] | None = None,
    *,
    seeds: int = 1,
    concurrency: int = 4,
    retries: int = 2,
    judge_model: str = "stub",
    down: bool = False,
) -> Ran:
    """Runs a task, with a server and, if one is given, a judge that answer so."""

    async def go() -> None:
        url = "http://127.0.0.1:9" if down else ran.stub.url
        async with (
            Endpoint(url, "stub", retries=retries) as endpoint,
            Endpoint(ran.judge.url, judge_model, retries=0) as judging,
        ):
            tell = lambda work, entry: ran.told.append(entry)  # noqa: E731
            chosen = judging if judge else None
            await run([ran.work], endpoint, chosen, concurrency=concurrency, tell=tell)

    work = BenchmarkRun(task, asked, seeds, {"temperature": 0.6}, AnswerFile(path, {}))
    with serving(Stub(answer)) as stub, serving(Stub(judge or echo)) as judging_stub:
        ran = Ran(work, stub, judging_stub)
        asyncio.run(go())
    # What is in memory is what the file holds.
    assert AnswerFile(path, {}).entries == ran.entries
    return ran


def test_every_item_is_asked_once_with_every_seed(tmp_path: Path) -> None:
    ran = do(tmp_path / "a", Echo(), items(7), seeds=3)
    wanted = {(f"q{place}", seed): 1 for place in range(7) for seed in range(3)}
    assert ran.stub.times == wanted
    assert ran.entries.keys() == wanted.keys()
    assert all(entry.verdict == Verdict(1.0) for entry in ran.entries.values())
    assert all(entry.usage.attempts == 1 for entry in ran.entries.values())
    assert len(ran.told) == 21
    assert all(body["temperature"] == 0.6 for body in ran.stub.asked)


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_as_many_are_in_work_as_may_be_and_never_more(tmp_path: Path, concurrency: int) -> None:
    together = threading.Barrier(concurrency)  # nobody is answered before so many have asked

    def answer(body: Body) -> str:
        together.wait(60)
        return echo(body)

    ran = do(tmp_path / "a", Echo(), items(24), answer, concurrency=concurrency)
    assert ran.stub.at_once == concurrency
    assert len(ran.entries) == 24


def test_what_is_finished_is_not_asked_again_and_more_seeds_and_items_are(tmp_path: Path) -> None:
    do(tmp_path / "a", Echo(), items(4), seeds=2)
    again = do(tmp_path / "a", Echo(), items(4), seeds=2)
    assert again.stub.asked == []
    more = do(tmp_path / "a", Echo(), items(5), seeds=3)
    assert set(more.stub.times) == {(f"q{p}", 2) for p in range(4)} | {("q4", s) for s in range(3)}


def test_failures_stand_apart_and_are_asked_again_in_the_next_run(tmp_path: Path) -> None:
    def answer(body: Body) -> str:
        if echo(body) in ("q1", "q3"):
            raise Refuse(500, "broken")
        return echo(body)

    ran = do(tmp_path / "a", Echo(), items(5), answer)
    failed_ones = [item for (item, _), entry in ran.entries.items() if entry.answer is None]
    assert sorted(failed_ones) == ["q1", "q3"]
    failed = ran.entries["q1", 0]
    assert failed.error is not None
    assert "broken" in failed.error
    assert failed.usage.attempts == ran.stub.times["q1", 0] == 3
    again = do(tmp_path / "a", Echo(), items(5))
    assert set(again.stub.times) == {("q1", 0), ("q3", 0)}
    assert all(entry.verdict == Verdict(1.0) for entry in again.entries.values())


def test_attempts_are_counted_where_a_retry_helped(tmp_path: Path) -> None:
    seen: list[str] = []

    def answer(body: Body) -> str:
        seen.append(echo(body))
        if echo(body) == "q1" and seen.count("q1") < 3:
            raise Refuse(429)
        if echo(body) == "q2" and seen.count("q2") < 2:
            raise Drop
        return echo(body)

    ran = do(tmp_path / "a", Echo(), items(3), answer)
    assert [ran.entries[f"q{place}", 0].usage.attempts for place in range(3)] == [1, 3, 2]
    assert all(entry.verdict == Verdict(1.0) for entry in ran.entries.values())


def test_a_task_of_several_turns_counts_all_of_them(tmp_path: Path) -> None:
    ran = do(tmp_path / "a", TwoTurns(), items(2), seeds=2)
    entry = ran.entries["q1", 1]
    assert entry.answer == {"text": "q1", "turns": ["q1", "q1"]}
    assert (entry.usage.attempts, entry.usage.prompt_tokens) == (2, 14)
    assert [body["seed"] for body in ran.stub.asked].count(1) == 4


def test_a_scorer_that_crashes_costs_no_answer(tmp_path: Path) -> None:
    crash = lambda body: "crash the scorer" if echo(body) == "q0" else echo(body)  # noqa: E731
    ran = do(tmp_path / "a", Echo(), items(2), crash)
    entry = ran.entries["q0", 0]
    assert entry.answer is not None
    assert entry.verdict is None
    assert entry.error == "no verdict: ZeroDivisionError: in the scorer"
    assert ran.entries["q1", 0].verdict == Verdict(1.0)


def test_what_the_judge_fails_at_is_judged_again_but_not_asked_again(tmp_path: Path) -> None:
    def judge(body: Body) -> str:
        if echo(body) == "q1":
            return "perhaps"
        if echo(body) == "q2":
            raise Refuse(500, "judge overloaded")
        return "yes"

    ran = do(tmp_path / "a", Judged(), items(4), judge=judge)
    assert ran.entries["q0", 0].judge == "stub"
    assert ran.entries["q1", 0].error == "no verdict: the judge said 'perhaps'"
    assert "judge overloaded" in (ran.entries["q2", 0].error or "")
    again = do(tmp_path / "a", Judged(), items(4), judge=lambda body: "no")
    assert again.stub.asked == []
    assert sorted(echo(body) for body in again.judge.asked) == ["q1", "q2"]
    scores = [again.entries[f"q{place}", 0].verdict for place in range(4)]
    assert scores == [Verdict(1.0), Verdict(0.0), Verdict(0.0), Verdict(1.0)]
    assert all(entry.error is None for entry in again.entries.values())


def test_another_judge_judges_all_answers_anew(tmp_path: Path) -> None:
    do(tmp_path / "a", Judged(), items(3), judge=lambda body: "yes")
    other = do(
        tmp_path / "a", Judged(), items(3), judge=lambda body: "no", judge_model="a stricter one"
    )
    assert other.stub.asked == []
    assert len(other.judge.asked) == 3
    assert all(entry.verdict == Verdict(0.0) for entry in other.entries.values())


def test_an_answer_is_safe_before_it_is_judged(tmp_path: Path) -> None:
    held: list[dict[tuple[str, int], Entry]] = []

    def judge(body: Body) -> str:
        held.append(AnswerFile(tmp_path / "a", {}).entries)
        return "yes"

    do(tmp_path / "a", Judged(), items(1), judge=judge)
    assert held[0]["q0", 0].answer is not None


def test_a_server_that_is_gone_ends_the_run_and_keeps_what_is_finished(tmp_path: Path) -> None:
    do(tmp_path / "a", Echo(), items(3))
    with pytest.raises(RunError, match=r"does not answer any more; .* run the same command again"):
        do(tmp_path / "a", Echo(), items(50), down=True, retries=0)
    entries = AnswerFile(tmp_path / "a", {}).entries
    assert sum(entry.answer is not None for entry in entries.values()) == 3
    assert len(entries) < 50
    again = do(tmp_path / "a", Echo(), items(50))
    assert len(again.stub.asked) == 47


def test_a_server_that_refuses_everything_ends_the_run(tmp_path: Path) -> None:
    def refuse(body: Body) -> str:
        raise Refuse(400, "no tools here")

    with pytest.raises(RunError, match=f"first {HOPELESS} requests all failed.*no tools here"):
        do(tmp_path / "a", Echo(), items(HOPELESS + 50), refuse, concurrency=1)
    # But not where some were answered before, in this run or another.
    do(tmp_path / "b", Echo(), items(1))
    ran = do(tmp_path / "b", Echo(), items(HOPELESS + 5), refuse)
    assert sum(entry.answer is None for entry in ran.entries.values()) == HOPELESS + 4
