"""Stage 5, PROCESS: process_weights_after_loading on one group of layers."""
