"""Training data: latents of clips with the embeddings of their prompts, kept in a folder of safetensors shards.

A folder holds ``clips-00000.safetensors``, ... with the tensors ``latents.<i>`` [C, F, H, W] and ``prompt.<i>`` [L, D]
(i counts within a shard; rows of zeros at the end of a prompt are cut, the shard's metadata say how long it was), and
``empty_prompt.safetensors`` with ``prompt`` [L, D], what clips are trained with whose condition is dropped.

Shape letters: B clips, C channels, F frames, H x W latent pixels, L prompt tokens, D their width.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmeff.errors import ConfigError, DataError

FORMAT = "vlmeff-clips"
VERSION = "1"
SHARD = "clips-*.safetensors"
EMPTY_PROMPT = "empty_prompt.safetensors"
CLIPS_PER_SHARD = 64


class Clips(Protocol):
    """What training reads: a sequence of (latents [C, F, H, W], prompt [L, D]). A list does."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]: ...


class ClipFolder:
    """Clips of a folder of shards, read one at a time.

    Attributes:
        empty_prompt: [L, D], or None where the folder has none.
    Raises:
        DataError: no shards, or a file that is none of ours or is broken.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"the data folder {str(folder)!r} does not exist; make one with encode_clips.")
        shards = sorted(self.folder.glob(SHARD))
        if not shards:
            raise DataError(f"{str(folder)!r} holds no {SHARD}; make them with encode_clips.")
        self._open = {path: _read(path) for path in shards}
        self._shards = shards
        self._ends = list(accumulate(int(_metadata(path, self._open[path])["clips"]) for path in shards))
        empty = self.folder / EMPTY_PROMPT
        self.empty_prompt = _prompt(_read(empty), empty, "prompt") if empty.exists() else None

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        path = self._shards[number]
        inside = index - (self._ends[number - 1] if number else 0)
        return _tensor(self._open[path], path, f"latents.{inside}"), _prompt(self._open[path], path, f"prompt.{inside}")


def write_clips(
    clips: Iterable[tuple[Tensor, Tensor]],
    folder: str | Path,
    *,
    empty_prompt: Tensor | None = None,
    per_shard: int = CLIPS_PER_SHARD,
) -> int:
    """Write (latents, prompt) pairs as shards; returns how many.

    Raises:
        ConfigError: the folder holds shards already.
        DataError: there are no clips.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob(SHARD)):
        raise ConfigError(f"{str(folder)!r} holds clips already; choose an empty folder.")
    source: Iterator[tuple[Tensor, Tensor]] = iter(clips)
    count = 0
    for number in range(10**5):
        part = list(islice(source, per_shard))
        if not part:
            break
        tensors: dict[str, Tensor] = {}
        lengths = []
        for i, (latents, prompt) in enumerate(part):
            tensors[f"latents.{i}"] = latents.detach().cpu().contiguous()
            tensors[f"prompt.{i}"] = _without_padding(prompt.detach().cpu())
            lengths.append(str(len(prompt)))
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "clips": str(len(part)),
            **{f"prompt.{i}": length for i, length in enumerate(lengths)},
        }
        _save(tensors, folder / f"clips-{number:05d}.safetensors", metadata)
        count += len(part)
    if not count:
        raise DataError("there are no clips to write.")
    if empty_prompt is not None:
        empty = empty_prompt.detach().cpu()
        metadata = {"format": FORMAT, "version": VERSION, "clips": "0", "prompt": str(len(empty))}
        _save({"prompt": _without_padding(empty)}, folder / EMPTY_PROMPT, metadata)
    return count


def split(clips: Clips, held_out: int) -> tuple[list[int], list[int]]:
    """(indices to train on, indices held out): the last clips, at most a fifth of all."""
    held_out = min(held_out, len(clips) // 5)
    return list(range(len(clips) - held_out)), list(range(len(clips) - held_out, len(clips)))


def order(train: list[int], *, step: int, batch_size: int, seed: int) -> list[int]:
    """The clips of a step: a new permutation each epoch, a pure function of the step."""
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, len(train))
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        chosen.append(train[int(torch.randperm(len(train), generator=generator)[place])])
    return chosen


def collate(clips: Clips, indices: list[int]) -> tuple[Tensor, Tensor]:
    """Stack clips: (latents [B, C, F, H, W], prompts [B, L, D]).

    Raises:
        DataError: a clip's tensors have another shape than the first's, or hold NaN.
    """
    pairs = [clips[index] for index in indices]
    for index, (latents, prompt) in zip(indices, pairs, strict=True):
        if latents.ndim != 4 or prompt.ndim != 2:
            raise DataError(
                f"clip {index}: latents must be [C, F, H, W] and prompts [L, D], got {tuple(latents.shape)} and "
                f"{tuple(prompt.shape)}."
            )
        if latents.shape != pairs[0][0].shape or prompt.shape != pairs[0][1].shape:
            raise DataError(
                f"clips {indices[0]} and {index} of one batch differ in shape: {tuple(pairs[0][0].shape)}, "
                f"{tuple(pairs[0][1].shape)} and {tuple(latents.shape)}, {tuple(prompt.shape)}. Encode all clips at "
                "one size, or train with batch_size=1."
            )
        if not bool(torch.isfinite(latents).all()) or not bool(torch.isfinite(prompt).all()):
            raise DataError(f"clip {index} holds NaN or infinities; encode it again (in float32, if it was float16).")
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    part = path.with_suffix(".part")  # an interrupted write leaves no half shard
    save_file(tensors, part, metadata=metadata)
    part.replace(path)


def _without_padding(prompt: Tensor) -> Tensor:
    """Rows of zeros at the end are padding (Wan's prompts have 512 rows, most of them zero)."""
    used = (prompt != 0).any(dim=1).nonzero()
    return prompt[: int(used[-1]) + 1 if len(used) else 0].clone()


def _read(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}") from error


def _metadata(path: Path, file: Any) -> dict[str, str]:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise DataError(f"{str(path)!r} is not a file of clips; make one with encode_clips.")
    if metadata.get("version") != VERSION:
        raise DataError(f"{str(path)!r} is of version {metadata.get('version')!r}; this release reads {VERSION!r}.")
    return metadata


def _tensor(file: Any, path: Path, name: str) -> Tensor:
    try:
        return file.get_tensor(name)
    except SafetensorError as error:
        raise DataError(f"{str(path)!r} has no tensor {name!r}: {error}") from error


def _prompt(file: Any, path: Path, name: str) -> Tensor:
    prompt = _tensor(file, path, name)
    length = int(_metadata(path, file)[name])
    return F.pad(prompt, (0, 0, 0, length - len(prompt)))
