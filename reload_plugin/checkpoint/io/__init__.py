"""Bytes of checkpoint files: where tensors lie, how they are read and written, and whether a file changed.

``stamps`` recognises changed files, ``json_files`` parses their tables, ``locations`` says where tensors lie.
``read_batches`` groups them into requests, ``reading`` makes one pass over them; ``readahead`` (threads) and
``vectored`` (one system call for many destinations) exist for speed on a CPU only. ``writing`` writes
safetensors.
"""
