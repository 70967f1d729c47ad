"""Where a benchmark ran, and on what."""

import os
import platform
import time
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


def _fields(path):
    "The fields of a process's stat file after its name, which may have spaces."
    return path.read_text().rpartition(")")[2].split()


def _own(root):
    "Processor seconds of a process and of all its descendants, of those that ended too."
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = _fields(path)
        except OSError:  # it ended meanwhile
            continue
        pid = int(path.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    family, more = set(), {root}
    while more:
        family |= more
        more = {pid for pid, parent in parents.items() if parent in more} - family
    return sum(ticks.get(pid, 0) for pid in family) / os.sysconf("SC_CLK_TCK")


def _all():
    "Processor seconds of everything that runs on this machine, and of others on its host (steal)."
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Neighbours:
    "How many cores others use, from when this is made: everything that runs, less this process and its children."

    def __init__(self):
        self.known = Path("/proc/stat").is_file()
        self.start = self._now() if self.known else None

    def _now(self):
        return time.perf_counter(), _all(), _own(os.getpid())

    def cores(self):
        "Cores used by others on average; None where the system does not tell."
        if not self.known:
            return None
        seconds, everything, own = (now - then for now, then in zip(self._now(), self.start))
        return max(0.0, everything - own) / max(seconds, 1e-9)


QUIET = 0.2  # cores that others may use while something is measured


def undisturbed(measure, tries):
    "The figures that `measure` gives, with the cores that others used; measured again where they used too many."
    for again in range(tries):
        neighbours = Neighbours()
        found = measure()
        others = neighbours.cores()
        if others is None or others <= QUIET:
            break
    return {**found, "others": others, "again": again}
