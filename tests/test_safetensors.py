"""safetensors files: round trips, the reference library's bytes, and everything malformed."""

from __future__ import annotations

import errno
import json
import mmap
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_any.errors import FormatError, PeftError, ShapeError, StorageError, UsageError
from peft_any.io._header import DTYPES, HEADER_LIMIT
from peft_any.io.safetensors import (
    SafetensorsFile,
    StreamWriter,
    read_metadata,
    read_safetensors,
    write_safetensors,
)
from peft_any.testing.strategies import hostile_bytes, hostile_safetensors

WHOLE = sorted(dtype.name for dtype in DTYPES.values() if dtype.bits % 8 == 0)
NUMPY = [name for name in WHOLE if not name.startswith(("bfloat", "float8"))]


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy's or ml_dtypes' dtype of a name."""
    return np.dtype(getattr(ml_dtypes, name, name))


def filled(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """An array of any dtype with arbitrary bits."""
    dtype = dtype_of(name)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return (raw % 2 if name == "bool" else raw).view(dtype).reshape(shape)


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, in dtype and in shape."""
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


def container(header: object, payload: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, JSON text or an object, whatever it says."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + payload


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    """A header's entry for one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a test may put one file."""
    return tmp_path / "x.safetensors"


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
specs = st.dictionaries(names, st.tuples(st.sampled_from(WHOLE), shapes), max_size=6)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)


class TestRoundTrip:
    """What is written is read."""

    @given(specs=specs, metadata=st.none() | st.dictionaries(texts, texts, max_size=3))
    def test_any_dtype_and_shape(
        self, tmp_path: Path, specs: dict[str, Any], metadata: dict[str, str] | None
    ) -> None:
        path = tmp_path / "x.safetensors"
        tensors = {
            name: filled(spec[0], spec[1], i) for i, (name, spec) in enumerate(specs.items())
        }
        write_safetensors(path, tensors, metadata, overwrite=True)
        back = read_safetensors(path)
        assert set(back) == set(tensors)
        assert all(same(back[name], tensors[name]) for name in tensors)
        assert read_metadata(path) == (metadata or {})

    @given(specs=specs)
    def test_loading_and_saving_again_changes_nothing(
        self, tmp_path: Path, specs: dict[str, Any]
    ) -> None:
        one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
        tensors = {name: filled(*spec) for name, spec in specs.items()}
        write_safetensors(one, tensors, {"format": "pt"}, overwrite=True)
        write_safetensors(two, read_safetensors(one), read_metadata(one), overwrite=True)
        assert one.read_bytes() == two.read_bytes()

    def test_views_are_read_only_and_outlive_the_file(self, file: Path) -> None:
        write_safetensors(file, {"w": filled("bfloat16", (3, 4))})
        with SafetensorsFile(file) as opened:
            view = opened["w"]
            base: Any = view
            while isinstance(base, np.ndarray):
                base = base.base
            assert isinstance(base.obj, mmap.mmap)
        assert not view.flags.writeable
        assert same(view, filled("bfloat16", (3, 4)))
        with pytest.raises(StorageError, match="closed"):
            opened["w"]
        opened.close()

    def test_arrays_read_whole_are_ones_own(self, file: Path) -> None:
        write_safetensors(file, {"w": np.zeros(3)})
        assert read_safetensors(file)["w"].flags.writeable

    def test_info_and_mapping(self, file: Path) -> None:
        write_safetensors(file, {"b": np.zeros(3, np.float32), "a": filled("float8_e4m3fn", (2,))})
        opened = SafetensorsFile(file)
        assert list(opened) == ["b", "a"]
        assert len(opened) == 2
        assert opened.info("a").dtype == "float8_e4m3fn"
        assert (opened.info("b").shape, opened.info("b").nbytes) == ((3,), 12)
        assert opened.info("a").stop == file.stat().st_size
        assert opened.get("none") is None
        assert "a" in opened
        assert "2 tensors" in repr(opened)
        with pytest.raises(KeyError, match="nearest: 'a'"):
            opened.info("model.a")

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: x.T,
            lambda x: x[::-2, 1:],
            lambda x: x.astype(">f4"),
            np.asfortranarray,
            lambda x: x[0, 0],
        ],
    )
    def test_any_memory_layout(self, file: Path, change: Callable[[Any], Any]) -> None:
        x = np.asarray(change(np.arange(12, dtype=np.float32).reshape(3, 4)))
        write_safetensors(file, {"x": x})
        np.testing.assert_array_equal(read_safetensors(file)["x"], x)

    def test_unaligned_views(self, file: Path) -> None:
        payload = b"\x01" + np.arange(3.0).tobytes()
        header = {"a": entry("U8", [1], [0, 1]), "b": entry("F64", [3], [1, 25])}
        file.write_bytes(container(header, payload))
        np.testing.assert_array_equal(SafetensorsFile(file)["b"] * 2, [0.0, 2.0, 4.0])

    def test_packed_elements_are_kept_as_bytes(self, file: Path, tmp_path: Path) -> None:
        file.write_bytes(container({"q": entry("F4", [2, 3], [0, 3])}, b"\x12\x34\x56"))
        opened = SafetensorsFile(file)
        assert bytes(opened.raw("q")) == b"\x12\x34\x56"
        with pytest.raises(FormatError, match="packed"):
            opened["q"]
        with StreamWriter(tmp_path / "y", [("q", "float4_e2m1fn", (2, 3))]) as writer:
            writer.copy("q", opened)
        assert bytes(SafetensorsFile(tmp_path / "y").raw("q")) == b"\x12\x34\x56"

    def test_arrays_of_other_libraries(self, file: Path) -> None:
        torch = pytest.importorskip("torch")
        x = torch.arange(6, dtype=torch.float32).reshape(2, 3).bfloat16().requires_grad_()
        write_safetensors(file, {"x": x})
        back = read_safetensors(file)["x"]
        assert back.dtype == ml_dtypes.bfloat16
        assert back.astype(np.float32).tolist() == [[0, 1, 2], [3, 4, 5]]


class TestReference:
    """The bytes of the safetensors library itself."""

    @given(
        specs=st.dictionaries(names, st.tuples(st.sampled_from(NUMPY), shapes), max_size=6),
        metadata=st.none() | st.dictionaries(texts, texts, min_size=1, max_size=1),
    )
    def test_written_alike(
        self, tmp_path: Path, specs: dict[str, Any], metadata: dict[str, str] | None
    ) -> None:
        theirs = pytest.importorskip("safetensors.numpy")
        tensors = {name: filled(*spec) for name, spec in specs.items()}
        path = tmp_path / "x.safetensors"
        write_safetensors(path, tensors, metadata, overwrite=True)
        assert path.read_bytes() == theirs.save(tensors, metadata)

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
    def test_every_dtype_of_torch(self, file: Path, metadata: dict[str, str] | None) -> None:
        torch = pytest.importorskip("torch")
        theirs = pytest.importorskip("safetensors.torch")
        tensors = {
            f"{9 - i % 10}.{name}": torch.from_numpy(filled("uint8", (16,), i) % 2).view(
                getattr(torch, name)
            )
            for i, name in enumerate(WHOLE)
        }
        theirs.save_file(tensors, file, metadata)
        ours = file.with_name("ours")
        write_safetensors(ours, read_safetensors(file), read_metadata(file) or None)
        assert ours.read_bytes() == file.read_bytes()
        stream = file.with_name("stream")
        source = SafetensorsFile(file)
        infos = [(name, source.info(name).dtype, source.info(name).shape) for name in source]
        with StreamWriter(stream, infos, source.metadata or None) as writer:
            for name in source:
                writer.copy(name, source)
        assert stream.read_bytes() == file.read_bytes()

    def test_it_reads_ours(self, file: Path) -> None:
        theirs = pytest.importorskip("safetensors.numpy")
        tensors = {'é"\\\n': filled("float32", (2, 0)), "b": filled("int64", ())}
        write_safetensors(file, tensors, {"k": "\x01\x7f→"})
        back = theirs.load_file(file)
        assert all(same(back[name], tensors[name]) for name in tensors)


DEEP = b"[" * 2000
BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "empty"),
    "shorter than a length": (b"\x08\0\0", "3 bytes long"),
    "only a length": ((8).to_bytes(8, "little"), "0 follow"),
    "truncated header": (container({"a": entry()})[:30], "truncated"),
    "truncated data": (container({"a": entry()}, b"1234567"), "truncated"),
    "absurd header length": (container({}, length=2**63), f"{HEADER_LIMIT} is the limit"),
    "header beyond the file": (container({}, length=2**20), "follow"),
    "zero header length": (container({}, length=0), "follow|header"),
    "not UTF-8": (container(b'{"\xff\xfe":1}'), "byte 10 is not UTF-8"),
    "not JSON": (container(b"{nonsense}"), "a key of the header"),
    "array for a header": (container([1, 2]), "not a JSON object"),
    "number for a header": (container(b"42"), "not a JSON object"),
    "cut JSON": (container(b'{"a":{"dtype":"F32"'), "'a' is not an object"),
    "no colon": (container(b'{"a"{}}'), "':' is missing"),
    "no comma": (container(b'{"__metadata__":{"a":"b" "c":"d"}}'), "'}' is missing"),
    "trailing comma": (container(b'{"__metadata__":{},}'), "a key of the header"),
    "two objects": (container(b"{}{}"), "something follows"),
    "duplicate names": (
        container(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
        "repeat a key: 'a'",
    ),
    "duplicate metadata": (container(b'{"__metadata__":{"k":"1","k":"2"}}'), "repeat a key: 'k'"),
    "two metadata": (container(b'{"__metadata__":{},"__metadata__":{}}'), "repeat a key"),
    "duplicate field": (
        container(b'{"a":{"dtype":"F32","shape":[],"shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        "'shape', 'shape'",
    ),
    "deep JSON": (container(b'{"a":{"dtype":' + DEEP + b"}}"), "nested too deeply"),
    "very deep JSON": (container(b'{"a":' * 50_000), "'a' is not an object"),
    "deep and long JSON": (container(b'{"a":{"dtype":' + b"[" * 10**6 + b"}}"), "not an object"),
    "half a character": (container(b'{"\\ud800":{}}'), "not a valid string"),
    "endless name": (container({"a" * 10**6: entry("F99")}), "is not one of"),
    "control character": (container(b'{"a\nb":{}}'), "not a valid string"),
    "entry is no object": (container({"a": 1}), "'a' is not an object"),
    "field missing": (container({"a": {"dtype": "F32", "shape": []}}), "for dtype, shape and"),
    "field unknown": (container({"a": entry() | {"x": 1}}, b"\0" * 8), "for dtype, shape and"),
    "unknown dtype": (container({"a": entry("F128")}, b"\0" * 8), "'F128' is not one of"),
    "dtype is no string": (container({"a": entry(["F32"])}, b"\0" * 8), "is not one of"),
    "negative size": (container({"a": entry(shape=[-2])}, b"\0" * 8), r"\[-2\] is not a list"),
    "fractional size": (container({"a": entry(shape=[2.0])}, b"\0" * 8), r"\[2.0\] is not a list"),
    "true for a size": (container({"a": entry(shape=[True, 2])}, b"\0" * 8), "is not a list"),
    "text for a size": (container({"a": entry(shape=["2"])}, b"\0" * 8), "is not a list"),
    "number for a shape": (container({"a": entry(shape=2)}, b"\0" * 8), "is not a list"),
    "NaN shape": (container({"a": entry(shape=[float("nan")])}, b"\0" * 8), "NaN"),
    "infinite shape": (container({"a": entry(shape=[float("inf")])}, b"\0" * 8), "Infinity"),
    "number of 4000 digits": (
        container(b'{"a":{"dtype":"U8","shape":[%b],"data_offsets":[0,1]}}' % (b"9" * 4000)),
        "is not a list",
    ),
    "65 dimensions": (container({"a": entry(shape=[1] * 64 + [2])}, b"\0" * 8), "at most 64"),
    "size beyond 64 bits": (container({"a": entry(shape=[2**64])}), "is not a list"),
    "overflowing product": (container({"a": entry(shape=[2**32, 2**32])}), "too large"),
    "product overflowing to its size": (
        container({"a": entry("U8", [2**62, 2**62, 0], [0, 0])}), "too large",
    ),
    "offsets backwards": (container({"a": entry(offsets=[8, 0])}, b"\0" * 8), "do not lie within"),
    "offset negative": (container({"a": entry(offsets=[-8, 0])}, b"\0" * 8), "two positions"),
    "offset fractional": (container({"a": entry(offsets=[0, 8.0])}, b"\0" * 8), "two positions"),
    "three offsets": (container({"a": entry(offsets=[0, 8, 8])}, b"\0" * 8), "two positions"),
    "offset out of range": (container({"a": entry(offsets=[0, 99])}, b"\0" * 8), "0 to 99"),
    "size is not the shape's": (container({"a": entry(shape=[3])}, b"\0" * 8), "does not take"),
    "half bytes": (container({"a": entry("F4", [3], [0, 1])}, b"\0"), "does not take"),
    "overlap": (
        container({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12),
        "cannot overlap: 'a' ends",
    ),
    "same bytes twice": (container({"a": entry(), "b": entry()}, b"\0" * 8), "cannot overlap"),
    "hole": (
        container({"a": entry(), "b": entry(offsets=[16, 24])}, b"\0" * 24),
        "leave a hole: 'a' ends",
    ),
    "hole in front": (container({"a": entry(offsets=[8, 16])}, b"\0" * 16), "the header"),
    "trailing bytes": (container({"a": entry()}, b"\0" * 9), "1 bytes cannot follow"),
    "no tensor but bytes": (container({}, b"\0" * 9), "9 bytes cannot follow"),
    "metadata is no object": (container({"__metadata__": "pt"}), "'{' is missing"),
    "metadata value is no text": (container({"__metadata__": {"a": 1}}), "is not a string"),
    "metadata nested": (container({"__metadata__": {"a": {"b": "c"}}}), "is not a string"),
    "pickle": (pickle.dumps({"a": list(range(99))}, protocol=4), "weights_only=True"),
    "pickle 2": (pickle.dumps({"a": list(range(99))}, protocol=2), "looks like a pickle"),
    "GGUF": (b"GGUF\x03" + b"\0" * 40, "GGUF"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 40, "HDF5"),
    "npy": (b"\x93NUMPY\x01\0" + b"\0" * 40, "npy"),
    "gzip": (b"\x1f\x8b\x08\0" + b"\1" * 40, "gzip"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "JSON": (b'{"weight_map": {}}', "JSON file"),
    "zeros": (b"\0" * 64, "not a JSON object"),
}  # fmt: skip


class TestMalformed:
    """Each malformed file is refused with its own message."""

    @pytest.mark.parametrize("case", BAD)
    def test_refused(self, file: Path, case: str) -> None:
        contents, message = BAD[case]
        file.write_bytes(contents)
        with pytest.raises(FormatError, match=message) as caught:
            SafetensorsFile(file)
        assert str(file) in str(caught.value)
        assert len(str(caught.value).partition("\n")[0]) < 500
        assert caught.value.exit_code == 5

    def test_torch_archive(self, file: Path) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
        with pytest.raises(FormatError, match=r"(?s)zip archive.*save_file"):
            SafetensorsFile(file)

    def test_missing(self, file: Path) -> None:
        with pytest.raises(StorageError, match="no such file"):
            SafetensorsFile(file)

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="it is a directory"):
            SafetensorsFile(tmp_path)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
    def test_pipe_does_not_hang(self, file: Path) -> None:
        os.mkfifo(file)
        with pytest.raises(StorageError, match="not a regular file"):
            SafetensorsFile(file)

    def test_impossible_name(self) -> None:
        with pytest.raises(StorageError, match="null"):
            SafetensorsFile("a\0b")

    def test_unreadable(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_safetensors(file, {})

        def denied(*_: Any, **__: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("builtins.open", denied)
        with pytest.raises(StorageError, match="permission is denied"):
            SafetensorsFile(file)


def valid() -> bytes:
    """A small file with several dtypes and metadata."""
    header = {
        "__metadata__": {"format": "pt", "note": "{é}"},
        "a": entry("F32", [2, 2], [0, 16]),
        "b": entry("BF16", [3], [16, 22]),
        "c": entry("U8", [0], [22, 22]),
        "d": entry("BOOL", [], [22, 23]),
    }
    return container(header, bytes(range(22)) + b"\1")


VALID = valid()
MUTATED = hostile_bytes(VALID) | hostile_safetensors(VALID)


@settings(max_examples=400)
@given(data=MUTATED | st.binary(max_size=80) | st.binary(max_size=60).map(container))
def test_mutated_files_are_refused_or_read_in_full(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    try:
        tensors = read_safetensors(path)
    except (FormatError, StorageError):
        return
    length = int.from_bytes(data[:8], "little")
    with SafetensorsFile(path) as file:
        sizes = [file.info(name).nbytes for name in tensors]
        assert sum(sizes) == len(data) - 8 - length
        assert sizes == [tensors[name].nbytes for name in tensors]


class TestStreamWriter:
    """Tensor after tensor, in the order announced."""

    specs = (("a", "float32", (2, 2)), ("b", "bfloat16", (3,)), ("c", "int8", (0, 5)))

    def test_arrays_and_buffers(self, file: Path) -> None:
        a, b = filled("float32", (2, 2)), filled("bfloat16", (3,))
        with StreamWriter(file, self.specs, {"format": "pt"}) as writer:
            writer.write("a", a)
            writer.write("b", b.tobytes())
            writer.write("c", memoryview(b""))
        back = read_safetensors(file)
        assert list(back) == ["a", "b", "c"]
        assert same(back["a"], a)
        assert same(back["b"], b)
        assert read_metadata(file) == {"format": "pt"}

    def test_order_given_is_kept(self, file: Path) -> None:
        with StreamWriter(file, [("b", "int8", (1,)), ("a", "float64", (1,))]) as writer:
            writer.write("b", np.ones(1, np.int8))
            writer.write("a", np.ones(1))
        assert list(SafetensorsFile(file)) == ["b", "a"]
        np.testing.assert_array_equal(SafetensorsFile(file)["a"], [1.0])

    def test_out_of_turn(self, file: Path) -> None:
        with pytest.raises(UsageError, match="'a' is next"), StreamWriter(file, self.specs) as w:
            w.write("b", b"\0" * 6)
        assert not file.exists()

    def test_once_too_often(self, file: Path) -> None:
        with pytest.raises(UsageError, match="all are written"), StreamWriter(file, []) as writer:
            writer.write("a", b"")
        assert not file.exists()

    @pytest.mark.parametrize("data", [b"\0" * 15, np.zeros(4, np.float32), np.zeros((2, 2))])
    def test_wrong_size(self, file: Path, data: Any) -> None:
        with (
            pytest.raises(ShapeError, match="'a' cannot be written"),
            StreamWriter(file, self.specs) as writer,
        ):
            writer.write("a", data)
        assert not file.exists()

    def test_wrong_source(self, file: Path, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "source", {"a": np.zeros(4, np.float32)})
        source = SafetensorsFile(tmp_path / "source")
        with (
            pytest.raises(ShapeError, match="'a' cannot be copied"),
            StreamWriter(file, self.specs) as writer,
        ):
            writer.copy("a", source)
        assert not file.exists()

    def test_incomplete(self, file: Path) -> None:
        with (
            pytest.raises(UsageError, match="'b' was not written"),
            StreamWriter(file, self.specs) as writer,
        ):
            writer.write("a", np.zeros((2, 2), np.float32))
        assert not file.exists()

    def test_closed(self, file: Path) -> None:
        with StreamWriter(file, [("a", "int8", (0,))]) as writer:
            writer.write("a", b"")
        writer.close()
        with pytest.raises(UsageError, match="was closed"):
            writer.write("a", b"")
        assert file.exists()
        writer.discard()
        assert not file.exists()

    def test_existing_file_is_left_alone(self, file: Path) -> None:
        file.write_bytes(b"precious")
        with pytest.raises(StorageError, match="it exists"):
            StreamWriter(file, [])
        assert file.read_bytes() == b"precious"

    @pytest.mark.parametrize(
        ("specs", "message"),
        [
            ([("a", "float32", (1,))] * 2, "twice"),
            ([("__metadata__", "float32", (1,))], "cannot name"),
            ([("a", "complex128", (1,))], "complex128 cannot be stored"),
            ([("a", "float4_e2m1fn", (3,))], "whole bytes"),
            ([("a", "float32", (-1,))], "whole bytes"),
            ([("\ud800", "float32", (1,))], "UTF-8"),
        ],
    )
    def test_impossible_specs(self, file: Path, specs: Any, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            StreamWriter(file, specs)
        assert not file.exists()

    def test_impossible_metadata(self, file: Path) -> None:
        with pytest.raises(UsageError, match="'n'"):
            StreamWriter(file, [], {"n": 1})  # type: ignore[dict-item]

    def test_header_too_long(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("peft_any.io._header.HEADER_LIMIT", 64)
        with pytest.raises(UsageError, match="at most 64"):
            StreamWriter(file, self.specs)


@pytest.fixture(params=["kernel", "unsupported", "absent", "replaced", "short"])
def copying(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways in which bytes get from file to file."""

    def unsupported(*_: Any) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if request.param == "unsupported":
        monkeypatch.setattr(os, "copy_file_range", unsupported, raising=False)
    elif request.param == "absent":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    elif request.param == "short":
        monkeypatch.setattr(os, "copy_file_range", lambda *_: 0, raising=False)
    return str(request.param)


class TestCopy:
    """Untouched tensors go as bytes."""

    def test_every_way_gives_the_same(self, tmp_path: Path, copying: str) -> None:
        write_safetensors(tmp_path / "in", {"x": filled("bfloat16", (7, 9)), "y": np.ones(3)})
        source = SafetensorsFile(tmp_path / "in")
        if copying == "replaced":
            write_safetensors(tmp_path / "in", {"z": np.zeros(99)}, overwrite=True)
        with StreamWriter(
            tmp_path / "out", [("y", "float64", (3,)), ("renamed", "bfloat16", (7, 9))]
        ) as writer:
            writer.copy("y", source)
            writer.copy("renamed", source, "x")
        back = read_safetensors(tmp_path / "out")
        assert same(back["renamed"], filled("bfloat16", (7, 9)))
        np.testing.assert_array_equal(back["y"], np.ones(3))

    def test_source_gone(self, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "in", {"x": np.arange(5)})
        source = SafetensorsFile(tmp_path / "in")
        (tmp_path / "in").unlink()
        with StreamWriter(tmp_path / "out", [("x", "int64", (5,))]) as writer:
            writer.copy("x", source)
        np.testing.assert_array_equal(read_safetensors(tmp_path / "out")["x"], np.arange(5))

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_safetensors(tmp_path / "in", {"x": np.arange(5)})

        def full(*_: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "copy_file_range", full, raising=False)
        with (
            pytest.raises(StorageError, match="no space is left") as caught,
            StreamWriter(tmp_path / "out", [("x", "int64", (5,))]) as writer,
        ):
            writer.copy("x", SafetensorsFile(tmp_path / "in"))
        assert caught.value.errno == errno.ENOSPC
        assert [child.name for child in tmp_path.iterdir()] == ["in"]


class TestFailedWrites:
    """Nothing half-made is left behind."""

    def test_full_disk(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write, written = os.write, 0

        def full(handle: int, data: Any) -> int:
            nonlocal written
            if written > 100:
                raise OSError(errno.ENOSPC, "No space left on device")
            done = write(handle, data[:50])
            written += done
            return done

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(StorageError, match=r"x\.safetensors: cannot be written: no space"):
            write_safetensors(file, {"x": np.zeros(100)})
        assert list(file.parent.iterdir()) == []

    def test_written_in_pieces(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:7]))
        write_safetensors(file, {"x": np.arange(100)})
        np.testing.assert_array_equal(read_safetensors(file)["x"], np.arange(100))

    def test_size_limit_of_the_process(self, file: Path) -> None:
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            with pytest.raises(StorageError, match="size limit"):
                write_safetensors(file, {"x": np.zeros(10_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(file.parent.iterdir()) == []

    def test_failing_sync(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises(StorageError, match="input/output error"):
            write_safetensors(file, {"x": np.zeros(3)})
        assert list(file.parent.iterdir()) == []

    def test_interrupt_between_tensors(self, file: Path) -> None:
        class Interrupting:
            dtype, shape = np.dtype(np.float32), (2,)

        with pytest.raises((PeftError, TypeError)):
            write_safetensors(file, {"a": np.zeros(2), "b": Interrupting()})
        assert list(file.parent.iterdir()) == []

    def test_existing_file(self, file: Path) -> None:
        write_safetensors(file, {"x": np.zeros(3)})
        before = file.read_bytes()
        with pytest.raises(StorageError, match="it exists"):
            write_safetensors(file, {"x": np.ones(3)})
        assert file.read_bytes() == before
        with pytest.raises(UsageError, match="complex128"):
            write_safetensors(file, {"x": np.ones(3, complex)}, overwrite=True)
        assert file.read_bytes() == before
        write_safetensors(file, {"x": np.ones(3)}, overwrite=True)
        np.testing.assert_array_equal(read_safetensors(file)["x"], np.ones(3))
        assert len(list(file.parent.iterdir())) == 1
