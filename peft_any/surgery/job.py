"""Carrying a planned merge out: every shard in turn, the side files, and the receipt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from peft_any._typing import Shape
from peft_any.errors import TargetError, UsageError
from peft_any.io._faults import StrPath, reporting
from peft_any.io._header import RANK, byte_size
from peft_any.io._threads import Behind, nothing
from peft_any.io._writer import PlacedWriter
from peft_any.io.checkpoint import INDEX, Checkpoint, output_directory, output_file
from peft_any.io.safetensors import SafetensorsFile
from peft_any.receipt import Change, Clock, Receipt, peak_memory
from peft_any.surgery.beside import (
    RECEIPT,
    changed_config,
    copy_side_files,
    described,
    receipt_path,
    write_index,
    write_json,
)
from peft_any.surgery.compute import Surgeon
from peft_any.surgery.journal import Journal, Ledger, task_of
from peft_any.surgery.output import Output, fill
from peft_any.surgery.plan import Plan
from peft_any.surgery.shards import Piece, ShardItem, Spec, packed
from peft_any.surgery.sources import Kinds

if TYPE_CHECKING:
    from peft_any.io._outgoing import Outgoing

_TOGETHER = 16
"""Files that the same workers write: few enough for any system to have them open."""
Progress: TypeAlias = Callable[[int, int, str], None]
"""Called with bytes done, all bytes, and the tensor at hand."""
Elsewhere: TypeAlias = Callable[[list[ShardItem], Callable[[ShardItem, Piece], None]], None]
"""Has other processes do shards, and calls back with each."""


@dataclass
class Job:
    """One merge under way."""

    plan: Plan
    surgeon: Surgeon
    out: Path | str | None
    min_kept: float | None
    progress: Progress | None = None
    resume: bool = False
    full_hash: bool = False
    kinds: Kinds = None
    elsewhere: Elsewhere | None = None
    threads: int = 1
    max_shard: int | None = None
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.changes: list[Change] = []
        self.copied = 0
        self.total = 0
        self.done = 0

    @property
    def base(self) -> Checkpoint:
        """The base."""
        return self.plan.base

    @property
    def to_file(self) -> bool:
        """Whether the output is one file."""
        return str(self.out).endswith(".safetensors")

    def refuse_lone_file(self) -> None:
        """Refuse outputs that one file cannot hold."""
        if not self.to_file:
            return
        if self.max_shard is not None:
            raise UsageError(
                f"{self.out}: a single file cannot be divided by max_shard_size: give a directory"
            )
        if len(self.base.shards) > 1:
            raise UsageError(
                f"{self.out}: a single file cannot hold {len(self.base.shards)} shards: give a "
                "directory"
            )
        if self.plan.untied:
            raise TargetError(
                f"{self.out}: {' and '.join(self.plan.untied)} are tied, and the adapter parts "
                "them: a single file cannot say so; give a directory, where config.json does"
            )

    def specs(self, shard: SafetensorsFile) -> list[Spec]:
        """List what an output shard holds, in order, with dtypes and shapes."""
        names: list[str] = []
        for name in shard:
            names.append(name)
            names += [new for new, old in self.plan.added.items() if old == name]
        specs: list[Spec] = []
        for name in names:
            source = self.plan.source(name)
            if source is not None:
                shape = tuple(self.plan.view.info(source).shape)
                specs.append((name, self.surgeon.dtype_of(source), shape))
            else:
                info = self.base.info(self.plan.added.get(name, name))
                specs.append((name, info.dtype, tuple(info.shape)))
        if [s[1] for s in specs] != [shard.info(n).dtype for n in shard]:
            # Wider elements first, as the safetensors library has it: each stays aligned.
            specs.sort(key=lambda spec: RANK[spec[1]])
        return specs

    @cached_property
    def layout(self) -> dict[str, list[Spec]]:
        """What each file of the output holds: the base's files, or those of `max_shard` bytes."""
        shards = self.base.named_shards
        if self.max_shard is None:
            return {name: self.specs(shard) for name, shard in shards.items()}
        every = (spec for shard in shards.values() for spec in self.specs(shard))
        return packed(every, self.max_shard, self._index_name.removesuffix(INDEX))

    @property
    def _index_name(self) -> str:
        path = self.base.index_path
        return f"model{INDEX}" if path is None else path.name

    @staticmethod
    def _size(_: str, dtype: str, shape: tuple[int, ...]) -> int:
        return byte_size(dtype, shape) or 0

    @contextmanager
    def run(
        self,
        folder: Path | None,
        names: dict[str, str] | None = None,
        journal: Ledger | None = None,
        sent: Outgoing | None = None,
    ) -> Iterator[None]:
        """Compute everything, and write it into `folder`, or have it `sent`, if there is either.

        Within the block all is written, and reaches the device until it ends.
        """
        sizes = {
            name: sum(self._size(*spec) for spec in specs) for name, specs in self.layout.items()
        }
        self.total = sum(sizes.values())
        shards: list[ShardItem] = [(n, None if sent is None else sent.url_of(n)) for n in sizes]
        if folder is not None:
            shards = [(n, folder.absolute() / (names or {}).get(n, n)) for n in sizes]
        found: dict[str, Piece] = {} if journal is None else self._finished(journal, sizes)
        rest = nothing if journal is None else journal.write

        def synced(item: ShardItem, piece: Piece) -> None:
            if journal is not None:
                journal.add(item[0], piece.changes, piece.copied, piece.mark)

        def ticked(item: ShardItem, piece: Piece) -> None:
            found[item[0]] = piece
            synced(item, piece)
            rest()
            self._tick(item[0], sizes[item[0]])

        left = [item for item in shards if item[0] not in found]
        with ExitStack() as stack:
            if self.elsewhere is not None:
                self.elsewhere(left, ticked)
                left = []
            for start in range(0, len(left), _TOGETHER):
                stack.close()
                pieces = self.pieces(left[start : start + _TOGETHER], synced, rest)
                found |= {item[0]: piece for item, piece in stack.enter_context(pieces)}
            for name in sizes:
                self.changes += found[name].changes
                self.copied += found[name].copied
            yield

    def _finished(self, journal: Ledger, sizes: dict[str, int]) -> dict[str, Piece]:
        """Count the shards that an earlier run finished."""
        found = {}
        for name, size in sizes.items():
            if (known := journal.finished.get(name)) is not None:
                found[name] = Piece(known.changes, known.copied)
                self._tick(name, size)
        return found

    @contextmanager
    def pieces(
        self,
        items: Sequence[ShardItem],
        synced: Callable[[ShardItem, Piece], None] = lambda _, __: None,
        rest: Callable[[], None] = nothing,
    ) -> Iterator[Iterator[tuple[ShardItem, Piece]]]:
        """Compute shards, and write those that have a path, or send them to their URLs.

        They come when they are written, and are on the device when the block ends, or `synced`
        is called, on a thread, with one after another; and `rest` when no other waits for that.
        """

        def tick(tensor: str, dtype: str, shape: Shape) -> None:
            self._tick(tensor, self._size(tensor, dtype, shape))

        if any(isinstance(place, str) for _, place in items):
            from peft_any.surgery.sent import all_sent  # noqa: PLC0415 - URLs alone need it

            yield all_sent(self.pieces, items, synced, rest)
            return
        with ExitStack() as stack:
            outputs = [
                Output(self.layout[item[0]], stack.enter_context(self._writer(*item)))
                for item in items
            ]
            behind = stack.enter_context(Behind(rest))
            filled = stack.enter_context(closing(fill(self.surgeon, outputs, self.threads, tick)))

            def written() -> Iterator[tuple[ShardItem, Piece]]:
                # Not strict: the processes that are at their end are not waited for yet.
                for item, output, changes in zip(items, outputs, filled, strict=False):
                    piece = Piece(changes, len(output.specs) - len(changes))
                    if output.writer is not None:
                        behind.add(output.writer.close)
                    behind.add(partial(synced, item, piece))
                    yield item, piece

            yield written()

    def _writer(
        self, name: str, path: Path | str | None
    ) -> AbstractContextManager[PlacedWriter | None]:
        if not isinstance(path, Path):
            return nullcontext()
        with reporting(path, "be written"):
            for folder in reversed(path.parents[: len(Path(name).parts) - 1]):
                folder.mkdir(exist_ok=True)  # and not the output's own, which may be gone
        shard = self.base.named_shards.get(name, self.base.shards[0])
        return PlacedWriter(path, self.layout[name], shard.metadata)

    def _tick(self, name: str, size: int) -> None:
        self.done += size
        if self.progress is not None:
            self.progress(self.done, self.total, name)

    def finish(self, made: Receipt, out: dict[str, Any] | None = None) -> Receipt:
        """Complete the receipt, and refuse what kept too little, or was made of changing files."""
        self.base.refuse_changes()
        done = replace(
            made,
            changes=tuple(self.changes),
            copied=self.copied,
            out=out or {},
            warnings=tuple(self.plan.warnings),
            seconds=self.clock.lap("merge"),
            peak_memory=peak_memory(),
        )
        done.check(self.min_kept)
        return done

    def write(self, made: Receipt, overwrite: bool) -> Receipt:
        """Write the output and its receipt."""
        assert self.out is not None  # noqa: S101 - told from dry runs by the caller
        inputs: list[StrPath] = [self.base.source]
        inputs += [source.path for source in self.plan.sources if source.path is not None]
        if isinstance(self.out, str):
            from peft_any.io._outgoing import outgoing  # noqa: PLC0415 - URLs alone need it
            from peft_any.surgery.sent import Sent  # noqa: PLC0415 - likewise

            with outgoing(self.out, overwrite, inputs=inputs, resume=self.resume) as sent:
                task = task_of(made, self.plan, self.kinds)
                ledger = Sent(sent, task, resume=self.resume)
                self.plan.warnings.extend(ledger.notes)
                with self.run(None, journal=ledger, sent=sent):
                    done = self._completed(sent.mirror, made)
                return self._synced(done, Path(sent.mirror) / RECEIPT)
        if self.to_file:
            beside = output_file(receipt_path(self.out), overwrite=True, inputs=inputs, alone=False)
            with beside as text, output_file(self.out, overwrite, inputs=inputs) as whole:
                names = dict.fromkeys(self.base.named_shards, whole.name)
                with self.run(whole.parent, names):
                    with SafetensorsFile(whole) as written:
                        out = described(self.out, written, self.full_hash)
                    done = self.finish(made, out)
                return self._synced(done, text)
        directory = output_directory(self.out, overwrite, inputs=inputs, resume=self.resume)
        with directory as folder:
            task = task_of(made, self.plan, self.kinds)
            journal = Journal(folder, task, str(self.out), whole=self.resume)
            self.plan.warnings.extend(journal.notes)
            with self.run(folder, journal=journal):
                done = self._completed(folder, made)
            return self._synced(done, folder / RECEIPT)

    def _completed(self, folder: StrPath, made: Receipt) -> Receipt:
        """Put beside the shards what belongs there, and the receipt."""
        place = Path(folder)
        self._side_files(place)
        with Checkpoint(folder) as written:
            out = described(str(self.out), written, self.full_hash)
        return self.finish(made, out)

    def _synced(self, done: Receipt, path: Path) -> Receipt:
        """Write the receipt, with the time that the shards took to reach the device."""
        done = replace(done, seconds=self.clock.lap("sync"))
        path.write_text(done.to_json() + "\n", encoding="utf-8")
        return done

    def _side_files(self, folder: Path) -> None:
        base = self.base
        copy_side_files(base, folder, without=RECEIPT)
        if (base.index is not None) if self.max_shard is None else (len(self.layout) > 1):
            self._index(folder / self._index_name, base.index or {})
        changed = changed_config(self.plan)
        if changed is not None:
            write_json(folder / "config.json", changed)

    def _index(self, path: Path, index: dict[str, Any]) -> None:
        weight_map = index.get("weight_map", {})
        if self.plan.added or self.max_shard is not None:
            homes = {spec[0]: name for name, specs in self.layout.items() for spec in specs}
            weight_map = dict(sorted(homes.items()))
        write_index(path, index, weight_map, self.total)
