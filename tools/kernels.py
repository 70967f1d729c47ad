"""Jupyter kernels that are forked from a process which has imported the large libraries already.

Each page runs in a process of its own, as ever; what is saved are the seconds in which each of them would import torch,
transformers and bittensor once more. The package itself is imported by the page.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from importlib import import_module

from jupyter_client.manager import AsyncKernelManager

# not pyplot and the inline backend: as they are imported they look for the kernel that shows their pictures
LIBRARIES = ("ipykernel.kernelapp", "matplotlib.figure", "matplotlib.backends.backend_agg", "torch", "transformers", "bittensor",
             "jsonargparse", "docstring_parser", "scipy.stats", "sklearn.isotonic", "httpx", "tqdm.auto",
             "torch._dynamo",  # which the first step of a torch optimiser imports, with sympy
             "accelerate", "torchtyping", "safetensors.torch", "tokenizers", "transformers.models.auto.modeling_auto",
             "transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2",
             "aiohttp", "redis.asyncio", "starlette.applications", "uvloop", "httptools", "prometheus_client")


class Forked:
    "A process that another one has forked, with the methods of `subprocess.Popen` that a kernel's manager uses."

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid = pid

    def poll(self) -> int | None:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:  # its parent does not keep the status
            return 0
        return None

    def wait(self) -> int:
        return 0  # is called once it is gone

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    terminate = kill


class Nursery:
    "The process that forks kernels; it ends with the one that started it."

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def start(self, command: list[str], cwd: str, env: dict[str, str]) -> Forked:
        "Fork a kernel: it takes the arguments of a launch command, a folder and an environment."
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                self.process = subprocess.Popen([sys.executable, __file__], env=env, start_new_session=True, **pipes)
            line = json.dumps({"argv": command[command.index("-f"):], "cwd": str(cwd), "env": env})
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            return Forked(int(self.process.stdout.readline()))


NURSERY = Nursery()


class ForkedKernelManager(AsyncKernelManager):
    "Starts its kernel by a fork."

    async def _async_launch_kernel(self, kernel_cmd: list[str], **more) -> None:
        process = NURSERY.start(kernel_cmd, more.get("cwd") or os.getcwd(), more["env"])
        self.provisioner.process, self.provisioner.pid, self.provisioner.pgid = process, process.pid, process.pid
        self._reconcile_connection_info(self.provisioner.connection_info)


def become_kernel(argv: list[str], cwd: str, env: dict[str, str]) -> None:
    "Run a kernel in this process, which has just been forked."
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # the pipe to the process that asked is not for what a page prints
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    argv = [*argv, f"--IPKernelApp.parent_handle={os.getppid()}"]  # it ends with that process
    sys.argv = ["ipykernel_launcher", *argv]
    import_module("ipykernel.kernelapp").launch_new_instance(argv=argv)


def serve() -> None:
    "Fork a kernel for each line on the standard input, and answer with its process id."
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != os.path.dirname(os.path.abspath(__file__))]
    for name in LIBRARIES:
        import_module(name)
    gc.freeze()  # what is here already is no garbage of a page
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a kernel ended
    for line in sys.stdin:
        ready, tell = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                os.setsid()  # so that a signal to its group reaches what the page has started, and nobody else
                os.write(tell, b"!")
                become_kernel(**json.loads(line))
            finally:
                os._exit(0)
        os.read(ready, 1)
        os.close(ready)
        os.close(tell)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
