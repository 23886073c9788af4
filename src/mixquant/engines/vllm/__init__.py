"""The vLLM engine: an out-of-tree plugin for unmodified vLLM, `--quantization mixquant`."""
