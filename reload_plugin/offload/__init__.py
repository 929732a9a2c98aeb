"""Weights that live elsewhere than their modules say: models that Accelerate has dispatched or offloaded."""
