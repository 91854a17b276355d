"""A project of somebody else, installed as pip would, in a directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
METHOD = '''
"""Row scaling, of nobody: written for a test."""

from peft_any import Tuner


class RowsConfig(Tuner, peft_type="ROWS", prefix="rows_"):
    """W' = diag(1 + v) W, with v (n_out,)."""

    def shapes(self, site):
        return {"rows_v": (site.n_out,)}

    def init(self, site, new):
        return {"rows_v": new.zeros((site.n_out,))}

    def merge(self, p, base):
        return base.replace(weight=base.weight * (1.0 + p["rows_v"])[:, None])

    def unmerge(self, p, merged):
        return merged.replace(weight=merged.weight / (1.0 + p["rows_v"])[:, None])
'''
ENTRIES = {"ROWS": "acme_adapters:RowsConfig"}


def install(
    site: Path,
    source: str = METHOD,
    entries: Mapping[str, str] = ENTRIES,
    *,
    name: str = "acme-adapters",
    version: str = "1.2",
) -> Path:
    """Write a distribution of one module into a directory, with its metadata."""
    module = name.replace("-", "_")
    info = site / f"{module}-{version}.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(source)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata)
    lines = [f"{peft_type} = {value}" for peft_type, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[peft_any.methods]", *lines, ""]))
    return site


def run_tests(site: Path, files: Mapping[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    """Write a project's tests beside its distribution, and run them with no plugin unasked for."""
    project = site.parent / "project"
    for name, text in files.items():
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (project / "pytest.ini").write_text("[pytest]\n")
    command = "-m", "pytest", "-q", "-p", "no:cacheprovider", *args
    return run(site, *command, cwd=project, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")


def run(
    site: Path, *command: str, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with the distribution installed."""
    path = os.pathsep.join(map(str, (site, ROOT)))
    env = {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": "", "PYTHONDONTWRITEBYTECODE": "1"}
    env |= variables
    given = [sys.executable, *command]
    return subprocess.run(given, cwd=cwd, env=env, capture_output=True, text=True, check=False)
