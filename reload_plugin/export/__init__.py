"""Weights out: what a model or an engine holds, written as a checkpoint that loads elsewhere.

``outputs`` plans files over what will be written, before a byte is; ``planned_files`` writes tensors, whole
or in parts, at their offsets; ``target`` and ``replacement`` let the new folder appear whole or not at all;
``writer`` does these in order, one group of tensors at a time.
"""
