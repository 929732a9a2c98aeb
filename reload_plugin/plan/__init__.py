"""Stage 2, PLAN: where each checkpoint tensor goes. Holds no storage and touches nothing that is served."""
