"""What vLLM calls in this package, and how it is put there."""
