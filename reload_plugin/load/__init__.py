"""Stage 4, LOAD: from a stream of (name, tensor) to layers that are complete in load format."""
