"""The command line without receipts: nothing is measured, digested or told (`receipts.py`).

``python tests/benchmarks/bare.py PASS merge …``: PASS is a compiled pass that measures nothing, or
``-`` for the command line as it is.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any


def strip(compiled: str) -> None:
    """Take the receipt's work out of this process."""
    name = "peft_any.surgery._sums"
    spec = importlib.util.spec_from_file_location(name, compiled)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])

    from peft_any.receipt import Receipt
    from peft_any.surgery import beside, patches, sources
    from peft_any.surgery.measure import Moments
    from peft_any.surgery.sums import Sums

    both = Sums.rounded

    def unmeasured(base: Any, *_: Any, **__: Any) -> Moments:
        return Moments(size=base.size)

    def rounded(*given: Any) -> tuple[Any, Moments]:
        return both(*given)[0], Moments(1.0, 1.0)  # neither faint nor unseen

    def undigested(*_: Any, **__: Any) -> str:
        return ""

    for module, function, instead in [
        (patches, "measure", unmeasured),
        (Sums, "rounded", rounded),
        (beside, "fingerprint", undigested),
        (sources, "_digest", undigested),
        (Receipt, "to_json", lambda _: "{}"),
    ]:
        assert hasattr(module, function), function
        setattr(module, function, instead)


def main() -> None:
    """Run the command line."""
    compiled, *args = sys.argv[1:]
    if compiled != "-":
        strip(compiled)
    from peft_any.cli import main as command

    command(args)


if __name__ == "__main__":
    main()
