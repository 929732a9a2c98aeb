"""Stage 7, VERIFY: slots, ignore rules, the digest of what is served."""
