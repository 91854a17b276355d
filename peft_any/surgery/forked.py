"""Work on several processes that this one forks: NumPy's calls do not wait for one another there.

On threads they do: each of the many short ones takes Python's lock again when it is done.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from mmap import mmap
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from peft_any.receipt import Host

T = TypeVar("T")
_WORD = 8
_TRIM, _MMAP, _KEPT = -1, -3, 1 << 25
"""Of mallopt(3): the sizes from which memory is given back, and is mapped on its own."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
_KILLED = "a process that worked for this one was killed: is memory short?"
_OTHERS = {"torch", "jax", "cupy", "distributed"}
"""Libraries that keep threads of their own, which a forked process would miss."""


def may_fork() -> bool:
    """Whether this process is one that can be forked: Linux, and no threads but daemons."""
    threads = [t for t in threading.enumerate() if not t.daemon]
    alone = threads == [threading.main_thread()] == [threading.current_thread()]
    return sys.platform == "linux" and alone and not _OTHERS & sys.modules.keys()


def forked(
    tasks: Sequence[Callable[[], T]],
    workers: int,
    keep: Sequence[int] = (),
    files: Sequence[int] = (),
    heard: Callable[[int, T], None] = lambda _, __: None,
) -> Generator[T]:
    """Carry tasks out on forked processes, and give their results in the order of the tasks.

    Parameters
    ----------
    tasks : sequence of callables
        Their results and errors are pickled.
    workers : int
    keep : sequence of int
        Descriptors that the tasks use; all others are closed, locks among them.
    files : sequence of int
        How many tasks, one after another, write to each file: processes keep to files of their
        own as far as they can, since a file can be written by one at a time.
    heard : callable (place, result)
        Called with each result when it comes, whosever turn it is.

    Examples
    --------
    >>> [*forked([lambda: 1, lambda: 2, lambda: 3], 2)] if may_fork() else [1, 2, 3]
    [1, 2, 3]
    """
    turns, pipes = os.pipe(), {}
    cuts = _cuts(files or [len(tasks)], workers)
    try:
        shared = np.frombuffer(mmap(-1, (2 * len(cuts) - 1) * _WORD), np.int64)
        shared[1:] = cuts[:-1] + cuts[1:]
        os.write(turns[1], b"0")
        with _deaf():
            for _ in range(workers):
                results, to = os.pipe()
                turn, used = _Turns(turns, shared).take, {*keep, *turns, to}
                try:
                    pid = _fork()
                except OSError:
                    os.close(results)
                    raise
                else:
                    if not pid:
                        _work(tasks, turn, to, used)
                finally:
                    os.close(to)
                pipes[results] = pid
        yield from _gathered(len(tasks), pipes, heard)
    finally:
        for handle, pid in pipes.items():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
            os.close(handle)
        for handle in turns:
            os.close(handle)


@contextmanager
def _deaf() -> Iterator[None]:
    """Hear no signal while processes are begun: they would act on it as this one, and be lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: see `may_fork`
        return os.fork()


def _gathered(
    count: int, pipes: dict[int, int], heard: Callable[[int, Any], None]
) -> Generator[Any]:
    """Give results as their turn comes; processes that have ended are no more among `pipes`."""
    found: dict[int, tuple[bool, Any]] = {}
    texts = {handle: bytearray() for handle in pipes}
    poll = select.poll()
    for handle in pipes:
        poll.register(handle, select.POLLIN)
    for place in range(count):
        while place not in found:
            if not pipes:
                raise MemoryError(_KILLED)
            for handle, _ in poll.poll():
                more = os.read(handle, 1 << 16)
                texts[handle] += more
                for at, (fine, result) in _messages(texts[handle]).items():
                    found[at] = fine, result
                    if fine:
                        heard(at, result)
                if not more:
                    poll.unregister(handle)
                    os.close(handle)
                    _refuse_killed(pipes.pop(handle))
        fine, result = found.pop(place)
        if not fine:
            raise result
        yield result


def _refuse_killed(pid: int) -> None:
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:  # where nobody is told how processes end
        return
    if os.waitstatus_to_exitcode(status):
        raise MemoryError(_KILLED)


def _messages(heard: bytearray) -> dict[int, tuple[bool, Any]]:
    """Take the complete messages out of what was heard."""
    found = {}
    while len(heard) >= _WORD:
        end = _WORD + int.from_bytes(heard[:_WORD], "little")
        if len(heard) < end:
            break
        place, fine, result = pickle.loads(bytes(heard[_WORD:end]))  # noqa: S301 - of our own
        found[place] = fine, result
        del heard[:end]
    return found


def _work(
    tasks: Sequence[Callable[[], Any]], turn: Callable[[], int | None], to: int, keep: set[int]
) -> NoReturn:
    """Take one task after another, in turn with the others; never comes back."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        _keep_memory()
        for path in [*Path("/proc/self/fd").iterdir()]:
            if int(path.name) not in {0, 1, 2, *keep}:
                with suppress(OSError):
                    os.close(int(path.name))
        while (place := turn()) is not None:
            try:
                said = pickle.dumps((place, True, tasks[place]()))
            except BaseException as error:  # noqa: BLE001 - the parent raises it
                said = _error(place, error)
            _send(to, len(said).to_bytes(_WORD, "little") + said)
    except BaseException:  # noqa: BLE001 - the parent is gone
        os._exit(1)
    os._exit(0)


def _keep_memory() -> None:
    """Have glibc keep what is freed: fresh pages cost more than what is done with them."""
    with suppress(OSError, AttributeError):
        tune = ctypes.CDLL(None).mallopt
        for option in (_TRIM, _MMAP):
            tune(option, _KEPT)


class _Turns:
    """What processes share: of each range of tasks the next one and its end, and those not begun.

    The byte in the pipe is whose turn it is: who has taken it may look and write.
    """

    def __init__(self, pipe: tuple[int, int], shared: Host) -> None:
        self.pipe, self.begun = pipe, shared[:1]
        self.next, self.stop = shared[1:].reshape(2, -1)
        self.at: int | None = None

    def take(self) -> int | None:
        """Take the next task of this process's range, or of a new one, or the last of another's."""
        turn, place = os.read(self.pipe[0], 1), None
        while self.at is None or self.next[self.at] >= self.stop[self.at]:
            if self.begun[0] == len(self.next):
                self.at = None
                break
            self.at = int(self.begun[0])
            self.begun += 1
        if self.at is not None:
            place = int(self.next[self.at])
            self.next[self.at] += 1
        elif (self.next < self.stop).any():
            most = np.argmax(self.stop - self.next)
            self.stop[most] -= 1
            place = int(self.stop[most])
        os.write(self.pipe[1], turn)
        return place


def _cuts(files: Sequence[int], workers: int) -> list[int]:
    """Say where ranges of tasks begin and end: whole files, if each process gets as many of them.

    Of those that it would not, equal shares, one after another: a file that is cut is the end of
    one share and the beginning of the next, and so has one process at a time.

    Examples
    --------
    >>> _cuts([4, 4, 4, 4], 2), _cuts([4, 4, 4], 2), _cuts([4], 2)
    ([0, 4, 8, 12, 16], [0, 6, 12], [0, 2, 4])
    """
    stops = [0, *accumulate(files)]
    rounds, over = divmod(len(files), workers)
    whole = max(rounds - 1, 0) * workers if over else len(files)
    first, left = stops[whole], stops[-1] - stops[whole]
    shares = [first + left * i // workers for i in range(1, workers + 1)] if over else []
    return stops[: whole + 1] + shares


def _send(to: int, said: bytes) -> None:
    rest = memoryview(said)
    while rest:
        rest = rest[os.write(to, rest) :]


def _error(place: int, error: BaseException) -> bytes:
    try:
        said = pickle.dumps((place, False, error))
        pickle.loads(said)  # noqa: S301 - some can be written and not read
    except Exception:  # noqa: BLE001 - whatever an exception's own code raises
        said = pickle.dumps((place, False, RuntimeError(f"{type(error).__name__}: {error}")))
    return said
