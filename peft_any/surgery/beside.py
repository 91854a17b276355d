"""What stands beside a model's weights: side files, the index of its shards, its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_any.errors import PeftError
from peft_any.io._faults import StrPath, reading, reporting
from peft_any.io._json import read_json
from peft_any.io.checkpoint import Checkpoint, fingerprint
from peft_any.io.safetensors import SafetensorsFile
from peft_any.surgery.heads import labelled
from peft_any.surgery.plan import Plan

RECEIPT = "merge_receipt.json"


def copy_side_files(base: Checkpoint, folder: Path, *, without: str) -> None:
    """Copy configuration, tokenizer and the like into a new directory, but not files so called."""
    import shutil  # noqa: PLC0415 - while others are at work

    for relative in base.side_files:
        if relative.name == without:
            continue
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        given = base.root / relative
        with reporting(given, "be copied"), reading(given) as source, target.open("xb") as copy:
            shutil.copyfileobj(source, copy)


def write_index(
    path: Path, index: Mapping[str, Any], weight_map: Mapping[str, str], total: int
) -> None:
    """Write an index of shards: another one's, with other files and another size."""
    metadata = index.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    written = {**index, "metadata": {**metadata, "total_size": total}}
    written["weight_map"] = dict(weight_map)
    write_json(path, written)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file as Hugging Face's libraries lay it out."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def receipt_path(out: Path) -> Path:
    """Name the receipt of a single file: another file's receipt beside it is left alone."""
    path = out.with_name(RECEIPT)
    if path.exists():
        try:
            known = read_json(path)["out"]["path"]
        except (PeftError, KeyError, TypeError):
            known = None
        if known is None or Path(known).name != out.name:
            return out.with_name(f"{out.stem}.{RECEIPT}")
    return path


def changed_config(plan: Plan) -> dict[str, Any] | None:
    """Give the changed config.json; None where it stays as it is."""
    before = plan.base.config
    config = json.loads(json.dumps(before))
    inner = config.get("text_config")
    places = [config, inner] if isinstance(inner, dict) else [config]
    if plan.untied:
        config["tie_word_embeddings"] = False
        for place in places:
            if "tie_word_embeddings" in place:
                place["tie_word_embeddings"] = False
    for name, array in plan.view.grown.items():
        rows = len(plan.view.stored(name))
        for place in places:
            if place.get("vocab_size") == rows:
                place["vocab_size"] = len(array)
    labelled(config, [plan.view.grown[name] for name in plan.view.heads])
    return None if config == before else config


def described(
    path: StrPath, written: Checkpoint | SafetensorsFile, full: bool = False
) -> dict[str, Any]:
    """Say which checkpoint it is, and how large; with a digest of all its bytes if `full`."""
    found = {
        "path": str(path),
        "fingerprint": fingerprint(written),
        "tensors": len(written),
        "bytes": sum(written.info(name).nbytes for name in written),
    }
    return found | ({"sha256": fingerprint(written, full=True)} if full else {})
