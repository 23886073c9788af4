"""Products of quantized rows with quantized weights, in the kernels that vLLM has for them."""
