"""Stage 6, COMMIT: the new kernel-format values become the served ones."""
