"""Which sizes of passes are captured into CUDA graphs, and which of those quantized."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from vllm_engines import require_vllm

require_vllm()

from mixquant.engines.vllm.graphs import MARGIN, MAX_GRAPH_ROWS, sizes  # noqa: E402
from mixquant.kernels.triton import FEW_ROWS  # noqa: E402

OWN = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]  # vLLM's default


def test_with_vllms_defaults() -> None:
    precise, quantized = sizes(OWN, 512, 8192)
    assert precise == [576]
    assert quantized[:3] == [640, 768, 896] and quantized[-1] == MAX_GRAPH_ROWS
    # Few sequences at a time: vLLM's own graphs end early.
    precise, quantized = sizes([1, 2, 4, 8], 512, 2048)
    assert precise == list(range(64, 577, 64)) and (quantized[0], quantized[-1]) == (640, 2048)
    assert sizes(OWN, 512, 512) == ([], [])


@given(st.integers(1, 1024), st.integers(0, 5000), st.integers(1, 10_000))
def test_every_pass_that_a_quantized_graph_serves_has_enough_rows(
    largest: int, least: int, most: int
) -> None:
    own = [1, largest]
    precise, quantized = sizes(own, least, most)
    assert all(size <= most for size in (*precise, *quantized))
    if quantized:
        smallest = max([*own, *precise]) + 1  # pass that a quantized graph serves
        assert smallest - FEW_ROWS >= least
        assert max([*own, *precise]) < min(quantized) <= max(quantized) <= MAX_GRAPH_ROWS
        # At most an eighth of a pass is padding, or 128 rows.
        between = [max([*own, *precise]), *quantized]
        for before, size in zip(between, quantized, strict=False):
            assert size - before <= max(256, before / 8)
    assert MARGIN >= FEW_ROWS
