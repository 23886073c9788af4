"""One results file of each kind, made up, with every part filled."""

from __future__ import annotations

from typing import Any

from mixquant.results import (
    Arm,
    Bench,
    ComparedArm,
    Comparison,
    Cost,
    Difference,
    Divergence,
    Environment,
    Evaluation,
    Fidelity,
    Measurement,
    Piece,
    Position,
    Predicted,
    Recovery,
    Score,
    Tried,
    Tuning,
)

ENVIRONMENT = Environment(
    date="2026-11-23T18:00:00+00:00",
    device="NVIDIA Imaginary",
    threads=16,
    platform="Linux-6.1-x86_64",
    versions={"python": "3.12.1", "mixquant": "0.1.0", "torch": "2.13.0"},
)
ARMS = (
    Arm(name="bf16", arguments=""),
    Arm(name="quantized", recipe={"format": {"default": "fp8"}, "decode": "everywhere"}),
    Arm(name="mixquant", recipe={"format": {"default": "fp8"}, "precise_tail": 1}),
)
NAMES = tuple(arm.name for arm in ARMS)


def measurement(arm: str, metric: str, value: float, **changes: Any) -> Measurement:
    fields = {"tokens": 2048, "concurrency": 1, "unit": "ms", **changes}
    return Measurement(arm=arm, metric=metric, value=value, **fields)


def bench() -> Bench:
    results = []
    for arm, speed in zip(NAMES, (1.0, 1.8, 1.6), strict=True):
        for tokens, ms in ((2048, 50.0), (8192, 210.0), (32768, 1200.0)):
            value = ms / speed
            results.append(
                measurement(
                    arm, "ttft", value, tokens=tokens, lowest=0.97 * value, highest=1.05 * value
                )
            )
        for batch in (1, 8, 32):
            options = {"workload": "batch", "concurrency": batch, "tokens": 128}
            results.append(measurement(arm, "tpot", 5.0 + batch / 16, **options))
            prefill = 40_000 * speed * (1 - 0.3 / batch)
            results.append(measurement(arm, "prefill", prefill, **options | {"unit": "tok/s"}))
        for clients in (1, 16):
            options = {"workload": "concurrency", "concurrency": clients, "unit": "tok/s"}
            results.append(measurement(arm, "output", 180 * clients**0.8, **options))
        results.append(measurement(arm, "itl", 5.0, lowest=0.1, highest=900.0))
        agent = {"workload": "agent", "tokens": 3000 + len(arm), "concurrency": 4}
        results.append(measurement(arm, "ttft", 80 / speed, **agent))
        share = {"bf16": 0.0, "quantized": 1.0, "mixquant": 0.83}[arm]
        results.append(measurement(arm, "quantized", share, **agent | {"unit": "share"}))
    breakdown = tuple(
        Piece(arm=arm, tokens=8192, kind=kind, ms=ms)
        for arm, times in (
            ("bf16", (150, 40, 0, 12, 8)),
            ("quantized", (70, 40, 6, 12, 8)),
            ("mixquant", (76, 40, 6, 12, 8)),
        )
        for kind, ms in zip(
            ("linear", "attention", "quantize", "norm", "other"), times, strict=True
        )
    )
    return Bench(
        environment=ENVIRONMENT,
        command="mixquant bench some/model",
        model="some/model",
        arms=ARMS,
        results=tuple(results),
        breakdown=breakdown,
    )


def turns() -> Bench:
    """New tokens behind cached ones: slower for small turns, nothing quantized in the smallest."""
    results = []
    for cached, factor in ((0, 1.1), (8192, 1.0), (32768, 0.95), (98304, 0.9)):
        for tokens, gain in ((64, 1.0), (256, 0.85), (1024, 1.1), (4096, 1.35)):
            base = 10 + tokens / 40 + cached / 4000
            for arm, speed in (("bf16", 1.0), ("mixquant", gain * factor)):
                at = {"workload": "turns", "tokens": tokens, "cached": cached}
                ms = base / speed
                results.append(
                    measurement(arm, "ttft", ms, lowest=0.99 * ms, highest=1.01 * ms, **at)
                )
                share = 0.0 if arm == "bf16" or tokens == 64 else 0.99
                results.append(measurement(arm, "quantized", share, unit="share", **at))
    recipe = {"format": {"default": "fp8"}, "min_prefill_tokens": 128}
    return bench().model_copy(
        update={
            "arms": (ARMS[0], Arm(name="mixquant", recipe=recipe)),
            "results": tuple(results),
            "breakdown": (),
        }
    )


def fidelity() -> Fidelity:
    arms = {"bf16": (16.0, 0.0), "quantized": (8.0, 0.09), "mixquant": (8.0, 0.03)}
    arms |= {"fast": (4.0, 0.11), "balanced": (5.2, 0.045), "with two groups": (5.6, 0.06)}
    return Fidelity(
        environment=ENVIRONMENT,
        command="mixquant fidelity some/model --recipe fast",
        model="some/model",
        engine="transformers",
        texts=("Python's documentation", "notes.txt"),
        arms=tuple(Arm(name=name) for name in arms),
        costs=tuple(
            Cost(arm=name, share={"bf16": (bits - 4) / 12, "nvfp4": (16 - bits) / 12}, bits=bits)
            for name, (bits, _) in arms.items()
        ),
        results=tuple(
            Divergence(
                arm=name,
                prompt_tokens=tokens,
                answers=8,
                answer_tokens=1536,
                kl_mean=kl * scale,
                kl_p99=kl * 8,
                kl_max=kl * 20,
                top1=1 - kl,
                perplexity=12.5 + kl,
                identical_tokens=64 if kl == 0 else 20.5,
                greedy_tokens=64,
                quantized_share=0.0 if kl == 0 else 0.99,
                by_position=tuple(
                    Position(first=first, kl_mean=kl * (0.4 + 2 / first), top1=1 - kl)
                    for first in (1, 2, 5, 17, 65)
                ),
            )
            for tokens, scale in ((512, 1.0), (2048, 1.2))
            for name, (_, kl) in arms.items()
        ),
    )


def evaluation() -> Evaluation:
    scores = {
        "math500": (0.912, 0.848, 0.902),
        "bfcl-v4": (0.428, 0.386, 0.414),
        "aime25": (0.5, 0.5, 0.533),
    }
    return Evaluation(
        environment=ENVIRONMENT,
        command="mixquant evaluate some/model --tasks math500,bfcl-v4,aime25",
        model="some/model",
        arms=ARMS,
        settings={"temperature": 0.6, "top_p": 0.95, "thinking": True, "seeds": [0, 1]},
        scores=tuple(
            Score(
                benchmark=name,
                arm=arm,
                score=score,
                low=score - 0.03,
                high=score + 0.025,
                items=500,
                seeds=2,
                failed=3 if (name, arm) == ("bfcl-v4", "quantized") else 0,
                prompt_tokens=1234.5,
                answer_tokens=5678.9,
            )
            for name, row in scores.items()
            for arm, score in zip(NAMES, row, strict=True)
        ),
        subscores=tuple(
            Score(
                benchmark=f"math500/{level}",
                arm=arm,
                score=0.9,
                low=0.85,
                high=0.925,
                items=250,
                seeds=2,
                failed=0,
            )
            for level in ("level 1", "level 2")
            for arm in NAMES
        ),
        differences=tuple(
            Difference(
                benchmark=name,
                arm=arm,
                versus="bf16",
                difference=score - row[0],
                low=score - row[0] - 0.012,
                high=score - row[0] + 0.012,
            )
            for name, row in scores.items()
            for arm, score in zip(NAMES[1:], row[1:], strict=True)
        ),
        recoveries=(
            Recovery(benchmark="math500", arm="mixquant", recovery=0.84),
            Recovery(benchmark="bfcl-v4", arm="mixquant", recovery=0.67),
            Recovery(benchmark="aime25", arm="mixquant", recovery=None),
            Recovery(benchmark="mean", arm="mixquant", recovery=0.77),
        ),
    )


def comparison() -> Comparison:
    return Comparison(
        environment=ENVIRONMENT,
        command="mixquant compare some/model",
        model="some/model",
        device="cpu",
        device_name="CPU, AVX512",
        threads=2,
        format="int8",
        kernel="oneDNN",
        native=True,
        recipe={"format": {"default": "int8"}, "precise_tail": 1},
        workload="A document, three questions",
        prompt_tokens_per_turn=(3141, 33),
        answer_tokens_per_turn=(24, 20),
        prefill_rounds=3,
        probed_prefill_s={"bfloat16": 1.87, "float32": 4.69},
        answers=("Yes.", "No."),
        arms=tuple(
            ComparedArm(
                name=name,
                device="cpu",
                compute_dtype="bfloat16",
                prefill_tokens=3174,
                quantized_prefill_tokens=quantized,
                ttft_s=sum(turns),
                ttft_s_per_turn=turns,
                prefill_tokens_per_s=3174 / sum(turns),
                tpot_s=tpot,
                kl_mean=kl,
                top1_agreement=1 - 4 * kl,
                extra_bytes=0 if name == "bf16" else 107412480,
                text=f"{name} says no.",
            )
            for name, quantized, turns, tpot, kl in (
                ("bf16", 0, (4.8, 0.12), 0.0603, 0.0),
                ("quantized", 3174, (2.0, 0.12), 0.0678, 0.0363),
                ("mixquant", 3140, (2.03, 0.12), 0.0605, 0.0122),
            )
        ),
    )


def tuning() -> Tuning:
    tried = (
        ("quantized", None, 4.5, None, 0.371, 0.366, 0.0),
        ("plain", 1.0, 4.5, 0.104, 0.11, 0.108, 0.705),
        ("candidate 1", 1.082, 4.71, 0.0171, 0.0192, 0.0197, 0.946),
        ("tuned", 1.097, 4.75, 0.0152, 0.0164, 0.0171, 0.953),
    )
    return Tuning(
        environment=ENVIRONMENT,
        command="mixquant tune some/model --target blackwell --recovered 0.95",
        model="some/model",
        target="blackwell",
        rates={"nvfp4": 4.0, "fp8": 2.0, "bf16": 1.0},
        budget="recovered",
        at_most=0.95,
        prompt_tokens=1024,
        cost_tokens=8192,
        texts=("one", "another"),
        held_out=("a third",),
        arms=tuple(
            Arm(name=arm, recipe={"format": {"default": "nvfp4"}, "everywhere": arm == "quantized"})
            for arm, *_ in tried
        ),
        tried=tuple(
            Tried(
                arm=arm,
                time=time,
                bits=bits,
                predicted=predicted,
                searched=searched,
                held_out=held_out,
                recovered=recovered,
            )
            for arm, time, bits, predicted, searched, held_out, recovered in tried
        ),
        frontier=tuple(
            Predicted(time=1 + n / 50, bits=4.5 + n / 20, kl=0.1 / (1 + n) ** 2) for n in range(40)
        ),
        rank=1.0,
    )
