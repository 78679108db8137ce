"""What a decode did and what it cost. A leaf module: plain numbers, nothing of torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any


def expected_length(acceptance: float, window: int) -> float:
    """Units per round with roll-back if every draft were accepted independently: (1 - a^(w+1)) / (1 - a)."""
    if acceptance >= 1:
        return float(window + 1)
    return (1 - acceptance ** (window + 1)) / (1 - acceptance)


@dataclass(kw_only=True)
class Stats:
    """Counts of one decode of ``batch`` samples with ``seq_len`` tokens each, in ``steps`` (K) units.

    A *pass* is one call of a trunk, a *row* one sequence in it (with guidance a context is two rows). A sequential run
    of the diffusion head counts its T calls; a teacher-forced evaluation counts one, with T rows for each token. Lists
    have one entry for each sample: ``rounds_of`` speculative rounds, ``drafted_of`` units whose draft or guess was
    looked at in verification, ``accepted_of`` units that were kept because it held, ``rejected_of`` units at which it
    did not. ``lengths`` counts the rounds by the units accepted in them.

    ``drafted`` of the modes with roll-back counts whole blocks, and ``accepted`` their accepted prefix only, so
    ``acceptance_rate`` is the paper's alpha; ``conditional_rate`` leaves out what came behind a rejection.
    """

    mode: str
    steps: int
    batch: int
    seq_len: int
    window: int | None = None
    target_passes: int = 0
    target_rows: int = 0
    draft_passes: int = 0
    draft_rows: int = 0
    target_head_calls: int = 0
    target_head_rows: int = 0
    draft_head_calls: int = 0
    draft_head_rows: int = 0
    prefill_units: int = 0
    prefill_tokens: int = 0
    rounds_of: list[int] = field(default_factory=list)
    drafted_of: list[int] = field(default_factory=list)
    accepted_of: list[int] = field(default_factory=list)
    rejected_of: list[int] = field(default_factory=list)
    lengths: Counter[int] = field(default_factory=Counter)
    residual_draws: int = 0
    residual_exhausted: int = 0
    distance_sum: float = 0.0
    distance_count: int = 0
    distance_max: float = 0.0
    context_gap_max: float | None = None
    wall_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("rounds_of", "drafted_of", "accepted_of", "rejected_of"):
            if not getattr(self, name):
                setattr(self, name, [0] * self.batch)

    def count_round(self, sample: int, *, drafted: int, accepted: int, rejected: int) -> None:
        """Note one round of one sample."""
        self.rounds_of[sample] += 1
        self.drafted_of[sample] += drafted
        self.accepted_of[sample] += accepted
        self.rejected_of[sample] += rejected
        self.lengths[accepted] += 1

    def count_distances(self, distances: list[float]) -> None:
        """Note RMS distances between drafts or guesses and the target's tokens."""
        self.distance_sum += sum(distances)
        self.distance_count += len(distances)
        self.distance_max = max([self.distance_max, *distances])

    def widen_gap(self, gap: float) -> None:
        """Note how far an emitted token is from the one that later contexts were computed with."""
        self.context_gap_max = max(self.context_gap_max or 0.0, gap)

    @property
    def units(self) -> int:
        """Units of all samples together."""
        return self.steps * self.batch

    @property
    def rounds(self) -> int:
        """Speculative rounds of all samples together."""
        return sum(self.rounds_of)

    @property
    def drafted(self) -> int:
        return sum(self.drafted_of)

    @property
    def accepted(self) -> int:
        return sum(self.accepted_of)

    @property
    def rejections(self) -> int:
        return sum(self.rejected_of)

    @property
    def acceptance_rate(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None

    @property
    def acceptance_per_sample(self) -> list[float | None]:
        pairs = zip(self.accepted_of, self.drafted_of, strict=True)
        return [accepted / drafted if drafted else None for accepted, drafted in pairs]

    @property
    def conditional_rate(self) -> float | None:
        looked_at = self.accepted + self.rejections
        return self.accepted / looked_at if looked_at else None

    @property
    def tokens_per_round(self) -> float | None:
        """Tokens behind the prefill over rounds; of plain decoding, tokens over steps."""
        if not self.rounds:
            return self.seq_len / self.steps if self.mode == "plain" else None
        return self.batch * (self.seq_len - self.prefill_tokens) / self.rounds

    @property
    def expected_units_per_round(self) -> float | None:
        """What independent acceptance at ``conditional_rate`` would give with roll-back, to hold against the measured.

        A round of ours draws no bonus unit behind a block that is accepted whole, so one is as long as the block.
        """
        if self.conditional_rate is None or not self.window:
            return None
        return expected_length(self.conditional_rate, self.window - 1)

    @property
    def accepted_length_hist(self) -> dict[int, int]:
        """Rounds (of all samples) by the units accepted in them."""
        return dict(sorted(self.lengths.items()))

    @property
    def distance_mean(self) -> float | None:
        return self.distance_sum / self.distance_count if self.distance_count else None

    def to_dict(self) -> dict[str, Any]:
        """Counts and what follows from them, as plain JSON values."""
        hidden = ("lengths", "distance_sum", "distance_count")
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden}
        derived = (
            "units",
            "rounds",
            "drafted",
            "accepted",
            "rejections",
            "acceptance_rate",
            "acceptance_per_sample",
            "conditional_rate",
            "tokens_per_round",
            "expected_units_per_round",
            "distance_mean",
        )
        out |= {name: getattr(self, name) for name in derived}
        out["accepted_length_hist"] = {str(length): count for length, count in self.accepted_length_hist.items()}
        return out
