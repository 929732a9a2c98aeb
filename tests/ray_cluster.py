"""vLLM's Ray executor on a machine without GPUs.

vLLM refuses Ray on a CPU only because its platform names no resource of Ray. A platform of the tests' own, a
plugin of vLLM like any other, does: it is the CPU platform, and its devices are called GPU. Ray is told that
it has two.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

PLATFORM = """
from vllm.platforms.cpu import CpuPlatform


def platform():
    return "cpu_for_ray.CpuForRay"


class CpuForRay(CpuPlatform):
    ray_device_key = "GPU"
"""
METADATA = "Metadata-Version: 2.1\nName: cpu-for-ray\nVersion: 1\n"
ENTRY_POINTS = "[vllm.platform_plugins]\ncpu_for_ray = cpu_for_ray:platform\n"


def offer_platform(folder: Path) -> None:
    """Write the platform to a folder, for this process and those that it starts; before vLLM is imported."""
    info = folder / "cpu_for_ray-1.dist-info"
    info.mkdir(parents=True)
    (folder / "cpu_for_ray.py").write_text(PLATFORM)
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    sys.path.insert(0, str(folder))
    inherited = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(Path(__file__).parents[1]), inherited])


@contextlib.contextmanager
def running() -> Iterator[None]:
    """A cluster of this machine alone, with two devices."""
    import ray

    ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
