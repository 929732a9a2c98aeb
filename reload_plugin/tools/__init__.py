"""Conversions and trainers' helpers that need no engine."""
