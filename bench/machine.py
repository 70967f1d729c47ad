"""Where a benchmark ran, and on what."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def processor():
    "The name of the processor, as far as the system tells it."
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def cores():
    "How many cores this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine(*packages):
    "Processor, cores and system, and the versions of Python and of some packages."
    return {"processor": processor(), "cores": cores(), "system": platform.system(), "python": platform.python_version(),
            **{name: version(name) for name in packages}}
