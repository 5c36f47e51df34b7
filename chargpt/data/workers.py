"""Other processes that run functions of this package. They import no torch.

They are started as ``python -m chargpt.data.workers``, not forked or spawned: a fork copies the
locks of running threads, and a spawned process would run the user's script a second time.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Full, Queue
from threading import Event
from typing import IO, Any

from chargpt.base.errors import UserError

_READ_AHEAD = 8  # results of one job that wait to be used
_RESULT, _ERROR, _END = range(3)
_Message = tuple[int, Any]


def available_cores() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Processes that run jobs at the same time; with a `count` of 1, this process runs them.

    To be used in a ``with`` statement, which ends the processes.
    """

    def __init__(self, count: int) -> None:
        can_start = bool(sys.executable) and not getattr(sys, "frozen", False)
        self.count = count if can_start else 1
        self._threads = ThreadPoolExecutor(self.count)  # one waits for each process
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: Queue[subprocess.Popen[bytes]] = Queue()
        self._stopped = Event()

    def __enter__(self) -> Workers:
        """Start no process yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes and whatever they are doing."""
        self._stopped.set()
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(OSError):  # a job that was never read
                    pipe.close()
        self._threads.shutdown(cancel_futures=True)

    def map(
        self, function: Callable[..., Iterator[Any]], jobs: Iterable[tuple[Any, ...]]
    ) -> Iterator[Iterator[Any]]:
        """Yield what ``function(*job)`` yields, an iterator for each job, in the order of the jobs.

        Each iterator must be used up before the next one. A few jobs run ahead, and each waits
        when many of its results are unused: memory stays bounded.
        """
        if self.count < 2:
            yield from (function(*job) for job in jobs)
            return
        if not self._processes:
            self._processes = [_start_process() for _ in range(self.count)]
            for process in self._processes:
                self._idle.put(process)
        ahead: deque[Queue[_Message]] = deque()
        for job in jobs:
            results: Queue[_Message] = Queue(_READ_AHEAD)
            self._threads.submit(self._run, (function, job), results)
            ahead.append(results)
            if len(ahead) == 2 * self.count:
                yield _taken(ahead.popleft())
        while ahead:
            yield _taken(ahead.popleft())

    def _run(self, call: tuple[Any, ...], results: Queue[_Message]) -> None:
        """Let an idle process run a job, in a thread of this process."""
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        kind: int | None = None
        try:
            _send(call, process.stdin)
            while kind not in (_ERROR, _END):
                kind, value = pickle.load(process.stdout)
                self._put((kind, value), results)
        except (OSError, EOFError, pickle.UnpicklingError, ValueError):
            process.kill()  # perhaps it has only closed its pipe
            reason = f"a process that reads the text ended (exit code {process.wait()})"
            remedy = "free some memory, and start again: what is done is kept"
            self._put((_ERROR, UserError(f"{reason}: {remedy}")), results)
        self._idle.put(process)

    def _put(self, message: _Message, results: Queue[_Message]) -> None:
        while not self._stopped.is_set():
            with suppress(Full):
                results.put(message, timeout=0.2)
                return


def _start_process() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],  # -P: no module of the current folder
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
    )


def _taken(results: Queue[_Message]) -> Iterator[Any]:
    while True:
        kind, value = results.get()
        if kind == _END:
            return
        if kind == _ERROR:
            raise value
        yield value


def _send(message: Any, pipe: IO[bytes]) -> None:
    pickle.dump(message, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def main() -> None:
    """Run the jobs that arrive, until the process that sends them ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that sends the jobs
    jobs, results = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what is printed must not come between the results
    try:
        while True:
            function, arguments = pickle.load(jobs)
            try:
                for result in function(*arguments):
                    _send((_RESULT, result), results)
            except BrokenPipeError:
                raise
            except Exception as error:
                _send((_ERROR, error), results)
            else:
                _send((_END, None), results)
            _return_memory()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # without flushing into a pipe that is closed


def _return_memory() -> None:
    """Give freed memory back to the system, where the C library would keep and fragment it."""
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
