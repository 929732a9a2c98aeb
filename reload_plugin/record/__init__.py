"""Stage 1, RECORD: the load format of a model, what PWAL changes in it, and the inverse of that."""
