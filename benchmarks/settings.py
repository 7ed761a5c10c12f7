"""The command line and the conditions that all scripts share."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.make_checkpoint import SHAPES, make_checkpoint, weight_files
from benchmarks.report import ROOT, disk_of

__all__ = ["BLOCK_BYTES", "READER_COUNTS", "Settings", "parse_settings"]

# The raw reference: the best of these counts.
READER_COUNTS = (1, 2, 4)
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one run of a script measures, and where.

    Attributes:
        shape: a key of SHAPES.
        path: the checkpoint's folder.
        tiny: the folder of a checkpoint of the same architecture that loads at once.
        files: the checkpoint's weight files.
        num_bytes: their size.
        num_rounds: runs of each candidate.
        only: parts of the script that are run; empty for all.
        results: where the result files go; None prints only.
        scratch: a folder on the same disk for what peers write.
    """

    shape: str
    path: Path
    tiny: Path
    files: tuple[Path, ...]
    num_bytes: int
    num_rounds: int
    only: frozenset[str]
    results: Path | None
    scratch: Path

    def runs(self, part: str) -> bool:
        return not self.only or part in self.only

    @property
    def configuration(self) -> dict[str, Any]:
        """For the report."""
        shape = SHAPES[self.shape]
        return {
            "checkpoint": (
                f"{self.shape}: {self.num_bytes / 1e9:.2f} GB bf16 in {len(self.files)} files, {shape.layers} layers, "
                f"hidden {shape.hidden}, intermediate {shape.intermediate}, vocabulary {shape.vocabulary}, untied"
            ),
            "disk": disk_of(self.path),
            "rounds": self.num_rounds,
        }


def parse_settings(description: str, parts: tuple[str, ...]) -> Settings:
    """Read the command line and make the checkpoints that are not there yet."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", choices=sorted(SHAPES), default="1.3b")
    parser.add_argument("--quick", action="store_true", help="a small shape, two rounds, nothing written: does it run?")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(tempfile.gettempdir()) / "bm_ckpt",
        help="cache folder of the checkpoints, on the disk to measure (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, help="runs of each candidate (default: 5)")
    parser.add_argument("--only", choices=parts, action="append", default=[], help="run these parts; may be repeated")
    parser.add_argument("--results", type=Path, help="folder for the result files (default: benchmarks/results)")
    arguments = parser.parse_args()
    shape = "quick" if arguments.quick else arguments.checkpoint
    path = make_checkpoint(shape, arguments.out)
    files = tuple(weight_files(path))
    return Settings(
        shape=shape,
        path=path,
        tiny=make_checkpoint("tiny", arguments.out),
        files=files,
        num_bytes=sum(file.stat().st_size for file in files),
        num_rounds=arguments.rounds or (2 if arguments.quick else 5),
        only=frozenset(arguments.only),
        results=arguments.results or (None if arguments.quick else ROOT / "benchmarks" / "results"),
        scratch=arguments.out,
    )
