"""One reader per checkpoint format: a ``FileSource`` that fills ``stamps`` and ``_locations`` from headers.

To add one: a file here, and its file names or first bytes in ``detect``. What is known and not read stands in
``refused``.
"""
