"""Fused kernels for GPUs, in Triton."""

FEW_ROWS = 16
"""Rows that the kernel `few_rows` multiplies at most; known without Triton."""
