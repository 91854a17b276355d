"""One run for each output, and what runs that were killed leave behind."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import peft_any
from peft_any.errors import StorageError
from peft_any.io import _leftovers, _lock
from peft_any.io.checkpoint import output_directory, output_file
from peft_any.io.safetensors import write_safetensors

ENV = {**os.environ, "PYTHONPATH": str(Path(peft_any.__file__).parents[1])}


def writer(out: Path, code: str = "time.sleep(60)", **options: object) -> subprocess.Popen[str]:
    """Start a process that writes an output, and wait until it is at it."""
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from peft_any.io.checkpoint import output_directory, output_file\n"
        "from peft_any.io.safetensors import write_safetensors\n"
        f"with output_directory({str(out)!r}, **{options!r}) as partial:\n"
        "    write_safetensors(partial / 'model.safetensors', {})\n"
        "    print('writing', flush=True)\n"
        f"    {code}\n"
    )
    command = [sys.executable, "-c", program]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENV, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "writing\n"
    return running


def kill(running: subprocess.Popen[str]) -> None:
    running.kill()
    running.communicate()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(params=["flock", "no flock"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """File systems with and without locks."""
    if request.param == "no flock":
        monkeypatch.setattr(_lock, "_flock", lambda _: None)
    return request.param


class TestLock:
    """A second run is refused, a dead one is not in the way."""

    def test_a_second_run_is_refused(self, tmp_path: Path, locks: str) -> None:
        first = writer(tmp_path / "out")
        try:
            message = rf"out: the output cannot go here: process {first.pid}, since .* wait for it"
            for output in (output_directory, output_file):
                with pytest.raises(StorageError, match=message), output(tmp_path / "out"):
                    pass
            assert len([n for n in names(tmp_path) if n.endswith(".partial")]) == 1
        finally:
            kill(first)

    def test_other_outputs_beside_it_are_not(self, tmp_path: Path, locks: str) -> None:
        with output_directory(tmp_path / "a") as one, output_directory(tmp_path / "b") as two:
            (one / "x").touch()
            (two / "x").touch()
        assert names(tmp_path) == ["a", "b"]

    def test_within_one_process(self, tmp_path: Path, locks: str) -> None:
        with output_file(tmp_path / "x") as partial:
            partial.touch()
            with pytest.raises(StorageError, match=r"\(this one\)"), output_file(tmp_path / "x"):
                pass
        assert names(tmp_path) == ["x"]

    def test_files_that_need_not_be_alone(self, tmp_path: Path) -> None:
        with output_file(tmp_path / "x", overwrite=True, alone=False) as one:
            one.write_text("1")
            with output_file(tmp_path / "x", overwrite=True, alone=False) as two:
                two.write_text("2")
        assert (tmp_path / "x").read_text() == "1"

    def test_of_many_one_at_a_time(self, tmp_path: Path, locks: str) -> None:
        inside, most, made, refused = 0, 0, 0, 0
        count = threading.Lock()

        def work() -> None:
            nonlocal inside, most, made, refused
            for _ in range(20):
                try:
                    with _lock.claimed(tmp_path / "x"):
                        with count:
                            inside += 1
                            most, made = max(most, inside), made + 1
                        time.sleep(0.001)
                        with count:
                            inside -= 1
                except StorageError:
                    with count:
                        refused += 1

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == 1
        assert made + refused == 80
        assert names(tmp_path) == []

    @pytest.mark.parametrize("owner", ["", "{", "[]", '{"pid": "x"}'])
    def test_a_lock_that_says_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str
    ) -> None:
        (tmp_path / ".x.lock").write_text(owner)
        with output_file(tmp_path / "x") as partial:
            partial.touch()
        assert names(tmp_path) == ["x"]

    def test_a_dead_run_is_not_in_the_way(self, tmp_path: Path, locks: str) -> None:
        kill(writer(tmp_path / "out"))
        assert ".out.lock" in names(tmp_path)
        with (
            pytest.warns(UserWarning, match=r"removed what a killed run left.*partial"),
            output_directory(tmp_path / "out") as partial,
        ):
            (partial / "x").touch()
        assert names(tmp_path) == ["out"]
        assert names(tmp_path / "out") == ["x"]

    def test_a_number_given_out_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_lock, "_flock", lambda _: None)
        mine = {"pid": os.getpid(), "host": _lock._host(), "began": "1", "since": "today"}
        (tmp_path / ".x.lock").write_text(json.dumps(mine))
        if _lock._began(os.getpid()) is None:
            pytest.skip("the system does not tell when a process began")
        with _lock.claimed(tmp_path / "x"):
            assert json.loads((tmp_path / ".x.lock").read_text())["began"] != "1"

    def test_another_machine_is_believed(self, tmp_path: Path, locks: str) -> None:
        theirs = {"pid": 1, "host": "node17", "began": "1", "since": "yesterday"}
        (tmp_path / ".x.lock").write_text(json.dumps(theirs))
        message = r"process 1 on node17, since yesterday, .* remove .*\.x\.lock"
        with pytest.raises(StorageError, match=message), output_file(tmp_path / "x"):
            pass
        assert json.loads((tmp_path / ".x.lock").read_text()) == theirs

    def test_a_request_to_stop_at_any_line(self, tmp_path: Path) -> None:
        """It comes once, as the command line has it, and no lock is left."""

        def at(moment: int) -> bool:
            count = 0

            def trace(frame: Any, event: str, _: Any) -> Any:
                nonlocal count
                if frame.f_code.co_filename != _lock.__file__:
                    return None
                if event == "line" or (event == "return" and frame.f_code.co_name == "_open"):
                    count += 1
                    if count == moment:
                        raise KeyboardInterrupt
                return trace

            others = sys.gettrace()  # such as what measures coverage
            sys.settrace(trace)
            try:
                with _lock.claimed(tmp_path / "out"):
                    pass
            except KeyboardInterrupt:
                return True
            finally:
                sys.settrace(others)
            return count >= moment

        moment = 1
        while at(moment):
            gc.collect()  # the block's own generator, where it was cut short in entering it
            assert names(tmp_path) == [], f"line {moment}"
            moment += 1
        assert moment > 30

    def test_file_systems_without_locks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fcntl = pytest.importorskip("fcntl")

        def unsupported(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", unsupported)
        assert _lock._flock(0) is None


class TestLeftovers:
    """Whenever a run is killed, the next one finds everything in order."""

    def test_previous_output_set_aside(self, tmp_path: Path) -> None:
        aside = tmp_path / ".out.123-0123abcd.old"
        aside.mkdir()
        write_safetensors(aside / "model.safetensors", {})
        with (
            pytest.warns(UserWarning, match="it has its name again"),
            pytest.raises(StorageError, match="it exists"),
            output_directory(tmp_path / "out"),
        ):
            pass
        assert names(tmp_path) == ["out"]
        assert names(tmp_path / "out") == ["model.safetensors"]

    def test_outputs_within_outputs(self, tmp_path: Path) -> None:
        code = (
            "write_safetensors(partial / 'x', {})\n"
            "    with output_directory(partial / '..' / partial.name, overwrite=True):\n"
            "        os.kill(os.getpid(), 9)"
        )
        writer(tmp_path / "out", code).communicate(timeout=60)
        assert len(names(tmp_path)) == 4
        with (
            pytest.warns(UserWarning, match="removed what a killed run left"),
            output_directory(tmp_path / "out") as partial,
        ):
            (partial / "x").touch()
        assert names(tmp_path) == ["out"]

    def test_files_of_others_are_left_alone(self, tmp_path: Path) -> None:
        for name in (
            ".out.partial",
            ".out.1-zz.partial",
            ".outer.1-0123abcd.partial",
            ".out.x.old",
        ):
            (tmp_path / name).touch()
        with output_directory(tmp_path / "out") as partial:
            (partial / "x").touch()
        assert len(names(tmp_path)) == 5

    @pytest.mark.parametrize("step", ["rename", "exchange", "rmtree", "unlink"])
    @pytest.mark.parametrize("swap", [True, False], ids=["exchanged", "renamed"])
    def test_killed_while_taking_the_place(self, tmp_path: Path, step: str, swap: bool) -> None:
        """Either output stands there, whole, or is put back."""
        out = tmp_path / "out"
        out.mkdir()
        write_safetensors(out / "old.safetensors", {})
        change = (
            "import signal, shutil; from peft_any.io import _atomic; "
            f"swap = {swap!r} and _atomic.exchange; _atomic.exchange = swap or (lambda *a: False)\n"
            "    def after(f):\n"
            "        def g(*a, **k):\n"
            "            done = f(*a, **k); os.kill(os.getpid(), signal.SIGKILL)\n"
            "        return g\n"
            f"    home = dict(rename=os, exchange=_atomic, rmtree=shutil, unlink=Path)[{step!r}]\n"
            f"    setattr(home, {step!r}, after(getattr(home, {step!r})))"
        )
        running = writer(out, change, overwrite=True)
        running.communicate(timeout=60)
        assert running.returncode in (0, -signal.SIGKILL)
        found = [p for p in tmp_path.rglob("*.safetensors") if p.parent.name != "out"]
        assert out.exists() or any(p.name == "old.safetensors" for p in found)
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # it may, or may not, have left something
            partial = stack.enter_context(output_directory(out, overwrite=True))
            assert names(out) in (["old.safetensors"], ["model.safetensors"])
            write_safetensors(partial / "new.safetensors", {})
        assert names(tmp_path) == ["out"]
        assert names(out) == ["new.safetensors"]

    def test_exchange(self, tmp_path: Path) -> None:
        one, two = tmp_path / "one", tmp_path / "two"
        one.mkdir()
        two.touch()
        if not _leftovers.exchange(one, two):
            pytest.skip("the system cannot exchange two names")
        assert one.is_file()
        assert two.is_dir()
        assert not _leftovers.exchange(one, tmp_path / "three")
