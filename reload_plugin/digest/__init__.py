"""Stage 7, VERIFY: the digest of what is served."""
