"""What ``vlmeff eval`` is asked for, and which part of it is one process's. Nothing here needs torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmeff.errors import ConfigError, UnknownNameError
from vlmeff.evaluation.benchmarks import check_limit
from vlmeff.pictures import MAX_PIXELS

CONTROLS = ("random", "downsample", "blank")
TIMED = 32  # documents of --perf latency, and those that are timed where the others are answered in batches
MOST_PIXELS = 1024**3 // 4 // 3  # above it Pillow takes a picture for a decompression bomb


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What ``vlmeff eval`` was asked for. ``limit``: groups (int) or a share of them (float).

    ``perf``: "accuracy" measures no times, "latency" takes the first 32 documents only, "both" times all of them, or
    with a ``batch_size`` above 1 the first 32, one by one. ``repeats``: times that a document is timed.
    ``fixed_output``: generate so many tokens, whatever ends the answer.
    ``max_error_rate``: share of documents that may fail. ``rank_timeout``: seconds that rank 0 waits for the others.
    """

    model: str
    output: Path
    presets: tuple[str, ...] = ("fast",)
    benchmarks: tuple[str, ...] = ("easy_vqa",)
    controls: tuple[str, ...] = ("random", "downsample", "blank")
    baseline: bool = True
    revision: str | None = None
    data_root: Path | None = None
    source: str | None = None
    limit: int | float | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    attention: str | None = None
    max_new_tokens: int | None = None
    perf: Literal["accuracy", "latency", "both"] = "both"
    warmup: int = 1
    resume: bool = True
    offline: bool = False
    skip_bad_images: bool = False
    max_error_rate: float = 0.01
    rank_timeout: float = 86_400.0
    max_image_pixels: int = MAX_PIXELS
    batch_size: int = 1
    repeats: int = 1
    fixed_output: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_limit(self.limit)
        if not self.benchmarks:
            raise ConfigError("eval: --benchmarks names none; vlmeff eval --list shows them.")
        if self.warmup < 0:
            raise ConfigError(f"E-USE-02: warmup={self.warmup} must be 0 or more.")
        for name, value in (("repeats", self.repeats), ("batch-size", self.batch_size)):
            if value < 1:
                raise ConfigError(f"E-USE-02: --{name} {value} must be 1 or more.")
        if self.fixed_output is not None and self.fixed_output < 2:
            raise ConfigError(f"E-USE-02: --fixed-output {self.fixed_output} must be 2 or more tokens.")
        if self.perf == "accuracy" and (self.repeats > 1 or self.fixed_output is not None):
            raise ConfigError("E-USE-02: --repeats and --fixed-output are about times; --perf accuracy measures none.")
        if self.perf == "latency" and self.batch_size > 1:
            raise ConfigError(
                f"E-USE-03: --perf latency with --batch-size {self.batch_size}: times are of one document at a time. "
                "Leave --batch-size out, or use --perf both, which times the first documents one by one."
            )
        if not 1 <= self.max_image_pixels <= MOST_PIXELS:
            raise ConfigError(
                f"E-USE-02: --max-image-pixels {self.max_image_pixels} must be 1 to {MOST_PIXELS}, above which Pillow "
                "takes a picture for a decompression bomb."
            )
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"--dtype {self.dtype!r} must be auto, float32, bfloat16 or float16.")
        if self.output.exists() and not self.output.is_dir():
            raise ConfigError(f"--output {str(self.output)!r} is a file; name a folder.")
        if self.data_root is not None and not self.data_root.is_dir():
            raise ConfigError(f"--data-root {str(self.data_root)!r} is no folder.")
        unknown = [name for name in self.controls if name not in CONTROLS]
        if unknown:
            raise UnknownNameError("control", unknown[0], CONTROLS, code="E-USE-01")
        if not 0 <= self.max_error_rate <= 1:
            raise ConfigError(f"max_error_rate={self.max_error_rate} must be a share, 0 to 1.")


@dataclass(frozen=True)
class Shard:
    """Which documents are this process's: those with index % world == rank."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> Shard:
        """As torchrun sets it."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
