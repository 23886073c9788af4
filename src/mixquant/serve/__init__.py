"""Topologies on top of stock vLLM: one colocated server, or prefill and decode engines."""
