"""Everything about hardware. ``ops.DeviceOps`` is what the rest of the package asks of a device.

``cpu`` and ``accelerator`` implement it. ``uploads`` (host memory to a device) and ``host_copies`` (the way
back) go through rings of pinned blocks that each engine owns; threads fill and empty them (``pinned``).

These files exist for the CPU alone, where a reload competes with kernels for cores and memory bandwidth, and
freshly mapped pages cost more than the copy into them:

- ``host_memory``: the pool that staging is reused from (law: memory stays within one layer and a budget), and
  malloc's thresholds, so that what processing frees is reused for the next layer and unmapped at the end.
- ``openmp``: reads and hashes on the kernels' own threads, which would otherwise spin beside ours.
- ``output_reuse``: served memory as the output of packing kernels, through ``torch.empty_like``; saves fresh
  pages and a copy a layer where served values may be overwritten anyway.
- ``gc_pause``: no garbage collection of 30 to 70 ms while a reload makes many objects and no garbage.
- ``shared_setting``: puts back what the last two change in the process, in any order of leaving.

``available_memory`` asks the system and the control groups; ``default_device`` keeps torch's factories on the
CPU while weights are loaded; ``hashing`` and ``value_hashes`` make digests on every device.
"""
