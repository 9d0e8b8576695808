"""Processes that compute together: ranks of torch.distributed, on the CPU, that are kept for many tests.

A job is a function of a module of tests/ that each rank calls, with arguments that can be pickled:

    first, second = ranks.call(2, job, argument)

One process, the nursery, imports torch and the package, which takes seconds. It forks ranks, which takes none of that:
so a test may spoil a group, and the next test gets another one. Neither a rank that hangs nor one that dies keeps a
test waiting for longer than the ``timeout`` of its job.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple

#: Seconds: how long a rank waits for another one, unless a test says so; how long a job may take; and a start.
GROUP_TIMEOUT, JOB_TIMEOUT, START_TIMEOUT = 20.0, 60.0, 60.0


class Outcome(NamedTuple):
    """What came of a job on a rank."""

    value: Any = None
    #: The type and the message of what the job raised, as "ValueError: ..."; "died", or "hangs". Empty if it returned.
    error: str = ""
    traceback: str = ""
    seconds: float = 0.0


def call(size: int, job: Callable[..., Any], *arguments: Any, timeout: float = JOB_TIMEOUT) -> list[Any]:
    """What ``job`` returns on each of ``size`` ranks. Errors of ranks are an AssertionError with their tracebacks."""
    try:
        return _values(job, outcomes(size, job, *arguments, timeout=timeout))
    except AssertionError:
        forget(size)  # its ranks may be out of step
        raise


def _values(job: Callable[..., Any], found: Sequence[Outcome]) -> list[Any]:
    failed = [f"rank {rank}: {each.error}\n{each.traceback}" for rank, each in enumerate(found) if each.error]
    assert not failed, f"{job.__name__} of {len(found)} ranks failed\n" + "\n".join(failed)
    return [each.value for each in found]


def outcomes(size: int, job: Callable[..., Any], *arguments: Any, timeout: float = JOB_TIMEOUT) -> list[Outcome]:
    """What becomes of ``job`` on each of ``size`` ranks, for jobs that may fail. The group stays, if all ranks do."""
    if size not in _groups:
        _groups[size] = Group(size)
    found = _groups[size].outcomes(job, *arguments, timeout=timeout)
    if _groups[size].closed:
        forget(size)
    return found


def forget(size: int) -> None:
    """End the shared group of this size. The next call starts another one."""
    if size in _groups:
        _groups.pop(size).close()


class Group:
    """Ranks of their own, for a test that ends them: ``with Group(2, group_timeout=3) as group: ...``"""

    def __init__(self, size: int, group_timeout: float = GROUP_TIMEOUT) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        store = str(Path(self._folder.name) / "store")
        self._ranks = [_fork(rank=rank, size=size, store=store, timeout=group_timeout) for rank in range(size)]
        self._pids: list[int] = []
        started = self._receive(START_TIMEOUT)
        if self.closed:
            raise RuntimeError(f"ranks do not start: {[each.error for each in started]}\n{_said()}")
        self._pids = [each.value for each in started]

    def call(self, job: Callable[..., Any], *arguments: Any, timeout: float = JOB_TIMEOUT) -> list[Any]:
        """See :func:`call`."""
        return _values(job, self.outcomes(job, *arguments, timeout=timeout))

    def outcomes(self, job: Callable[..., Any], *arguments: Any, timeout: float = JOB_TIMEOUT) -> list[Outcome]:
        """See :func:`outcomes`."""
        assert not self.closed, "these ranks have ended"
        # Not by Connection.send, which would share the memory of tensors.
        message = pickle.dumps((job, arguments))
        for rank in self._ranks:
            with contextlib.suppress(OSError):  # one that has died says so below
                rank.send_bytes(message)
        return self._receive(timeout)

    def _receive(self, timeout: float) -> list[Outcome]:
        """An outcome of each rank. If a rank died or hangs, all of them are ended."""
        end = time.monotonic() + timeout
        found: dict[Connection, Outcome] = {}
        while len(found) < len(self._ranks):
            ready = wait([each for each in self._ranks if each not in found], max(0.0, end - time.monotonic()))
            if not ready:
                break
            for each in ready:
                assert isinstance(each, Connection)
                try:
                    found[each] = Outcome(*pickle.loads(each.recv_bytes()))
                except (EOFError, OSError):
                    found[each] = Outcome(error="died", traceback=_said())
        late = Outcome(error="hangs", seconds=timeout)
        outcomes = [found.get(each, late) for each in self._ranks]
        if any(each.error in ("died", "hangs") for each in outcomes):
            self.close()
        return outcomes

    @property
    def closed(self) -> bool:
        return not self._ranks

    def close(self) -> None:
        for each in self._ranks:
            each.close()
        for pid in self._pids if self._ranks else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._ranks = []
        self._folder.cleanup()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


#: The groups that tests share, by their size.
_groups: dict[int, Group] = {}


# --- the nursery ------------------------------------------------------------------------------------------------------


class _Nursery(NamedTuple):
    process: subprocess.Popen[bytes]
    control: socket.socket
    log: Path


_nursery: list[_Nursery] = []


def _fork(**settings: Any) -> Connection:
    """The connection to a new rank, which sends its process id once it has met the others."""
    if not _nursery:
        _nursery.append(_open_nursery())
    mine, theirs = Pipe()
    socket.send_fds(_nursery[0].control, [json.dumps(settings).encode()], [theirs.fileno()])
    theirs.close()
    return mine


def _open_nursery() -> _Nursery:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor, log = tempfile.mkstemp(prefix="ranks", suffix=".log")
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)
    process = subprocess.Popen(
        # As a module of its own name, since the two processes exchange its objects.
        [sys.executable, "-W", "ignore", "-c", f"import ranks; ranks._nurse({theirs.fileno()})"],
        stdin=subprocess.DEVNULL,
        stdout=descriptor,
        stderr=descriptor,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        pass_fds=[theirs.fileno()],
    )
    os.close(descriptor)
    theirs.close()
    atexit.register(_close)
    return _Nursery(process, mine, Path(log))


def _close() -> None:
    for size in list(_groups):
        forget(size)
    for process, control, log in _nursery:
        control.close()
        process.wait(START_TIMEOUT)
        log.unlink()


def _said() -> str:
    """The end of what all ranks have printed."""
    return _nursery[0].log.read_text(errors="replace")[-5000:]


def _nurse(descriptor: int) -> None:
    """Forks ranks until nobody is left who could ask for them; then it ends all of them, whatever they do."""
    import torch.distributed.tensor  # noqa: F401

    import monosoftmax.distributed  # noqa: F401

    # A fork has one thread, and the locks of all.
    assert len(os.listdir("/proc/self/task")) == 1, "importing has started threads"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a rank
    control, children = socket.socket(fileno=descriptor), []
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not message:
            break
        child = os.fork()
        if child == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _be_rank(Connection(descriptors[0]), **json.loads(message))
        children.append(child)
        os.close(descriptors[0])
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _be_rank(connection: Connection, rank: int, size: int, store: str, timeout: float) -> None:
    """Does jobs until nobody is left who could ask for one."""
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    connection.send_bytes(pickle.dumps(Outcome(os.getpid())))
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send_bytes(_do(connection.recv_bytes()))
    os._exit(0)


def _do(message: bytes) -> bytes:
    start = time.monotonic()
    try:
        job, arguments = pickle.loads(message)
        return pickle.dumps(Outcome(job(*arguments), seconds=time.monotonic() - start))
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        return pickle.dumps(Outcome(None, words, traceback.format_exc(), time.monotonic() - start))
