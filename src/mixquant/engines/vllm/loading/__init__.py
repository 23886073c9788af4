"""What happens while vLLM loads a model."""
