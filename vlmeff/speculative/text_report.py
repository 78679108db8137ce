"""What text speculation did in one ``generate`` call."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TextStatistics:
    """Counts of one call; ``tokens == target_passes + accepted`` whenever anything was generated.

    ``target_passes`` forward passes of the model, the prompt's included (as one); ``rounds`` those of them that
    verified a draft; ``drafted`` tokens in them, of all branches; ``accepted`` tokens that needed no pass of their own;
    ``tokens`` emitted. ``draft_time_s`` includes everything a drafter does, an assistant's prefill too; ``wall_s`` is
    the decoding loop, prefill included. ``shape``: "chain" or "tree", None when nothing was drafted.
    ``fallback``: why the call was decoded plainly; None when it was not.
    """

    drafter: str
    target_passes: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    draft_time_s: float = 0.0
    wall_s: float = 0.0
    shape: str | None = None
    fallback: str | None = None

    @property
    def tokens_per_pass(self) -> float:
        """Mean accepted tokens (MAT): 1.0 is plain decoding."""
        return self.tokens / self.target_passes if self.target_passes else 1.0

    @property
    def accept_rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_pass": self.tokens_per_pass, "accept_rate": self.accept_rate}

    def rows_of_text(self) -> list[tuple[str, str, str]]:
        """(what, value, how it was got), for ``Report``."""
        if self.fallback is not None:
            return [("text speculation", f"none: {self.fallback}", "")]
        kind = self.drafter + (f", {self.shape}" if self.shape else "")
        passes = f"{self.target_passes} for {self.tokens} tokens ({self.tokens_per_pass:.2f} per pass)"
        taken = f"{self.accepted} of {self.drafted} ({self.accept_rate:.0%}) in {self.rounds} rounds"
        return [
            ("text speculation", kind, ""),
            ("target passes", passes, "measured"),
            ("drafted tokens accepted", taken, "measured"),
            ("drafting ms", f"{1000 * self.draft_time_s:.1f}", "measured"),
        ]
