"""The breakdown of a profiled pass, from traces as torch.profiler writes them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_times import KINDS, by_kind, count_launches, events, longest, trace_of

# As they are called on an H200 with vLLM 0.25.1, shortened.
NAMES = {
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT": "linear",
    "void cutlass::device_kernel<vllm::cutlass_3x_gemm_sm90_fp8<...>>": "linear",
    "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>": "attention",
    "void vllm::dynamic_per_token_scaled_fp8_quant_kernel_strided<...>": "quantize",
    "gather_kernel": "quantize",
    "triton_red_fused_add_mean_mul_pow_rsqrt_0": "norm",
    "triton_poi_fused_mul_silu_slice_1": "other",
    "Memcpy DtoD (Device -> Device)": "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_kinds(name: str) -> None:
    times = by_kind([(name, 1.0, 2.5)])
    assert {kind for kind, ms in times.items() if ms} == {NAMES[name]}
    assert times[NAMES[name]] == 2.5


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_only_the_gpus_work_is_read(tmp_path: Path, suffix: str) -> None:
    trace = [
        {"cat": "kernel", "name": "gemm", "ts": 1000, "dur": 500},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9000},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 3000, "dur": 250},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 900, "dur": 5},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 910, "dur": 5},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 920, "dur": 5},
        {"cat": "cuda_runtime", "name": "cudaDeviceSynchronize", "ts": 930, "dur": 5},
        {"name": "process_name", "ph": "M"},
    ]
    file = tmp_path / f"trace{suffix}"
    data = json.dumps({"traceEvents": trace}).encode()
    file.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    assert count_launches(trace_of(file)) == 3
    found = events(trace_of(file))
    assert found == [("gemm", 1.0, 0.5), ("Memcpy DtoH", 3.0, 0.25)]
    assert by_kind(found)["idle"] == 1.5
    assert longest(found) == [(0.5, 1, "gemm"), (0.25, 1, "Memcpy DtoH")]


@given(
    st.lists(
        st.tuples(st.sampled_from(list(NAMES)), st.integers(0, 100), st.integers(0, 30)),
        max_size=12,
    )
)
def test_busy_and_idle_make_up_the_whole(found: list[tuple[str, int, int]]) -> None:
    times = by_kind([(name, float(start), float(length)) for name, start, length in found])
    assert set(times) == {*KINDS, "idle"}
    assert sum(times[kind] for kind in KINDS) == sum(length for _, _, length in found)
    covered = {t for _, start, length in found for t in range(start, start + length)}
    span = max((s + n for _, s, n in found), default=0) - min((s for _, s, _ in found), default=0)
    assert times["idle"] == span - len(covered)
