"""Bytes from and to files."""
