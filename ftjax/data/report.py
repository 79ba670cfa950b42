"""What became of the rows: read, kept, dropped and why, lengths and trained tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ftjax.data.words import clip, visible

PLACES = 3  # how many places are named per reason
BINS = 24
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass
class Tally:
    """How many rows share a fate, and the first places where."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.places) < PLACES:
            self.places.append(where)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.places) else ""
        return f"{self.count:,} ({', '.join(self.places)}{more})"


@dataclass
class DataReport:
    """The account of one data set.

    Attributes:
      source: its name; split: what it is for (`train`, `eval`).
      read: rows that were read, bad ones included.
      windows: of all kept rows, where they are cut into windows.
      dropped: by reason; skipped: bad rows by reason, with on_bad_row=skip.
      schemas: rows by schema, with the first place of each.
      conversations: rows that went through the chat template.
      ignored: columns that were not used, with the rows that have them.
      identical: pairs whose chosen and rejected text are the same.
      joined: pairs made of halves in different rows; imitated: chosen answers that
        found no rejected one, and are imitated.
      kinds: of what is kept of a mixture: pairs, answers and texts.
      lengths: tokens of each kept example; tokens, trained: their sums.
      rows: (rows an epoch, slots a row, share of slots filled), once a loader exists.
      warnings: sentences for the reader.
    """

    source: str
    split: str
    max_length: int
    read: int = 0
    kept: int = 0
    windows: int = 0
    truncated: int = 0
    lost: int = 0
    duplicates: int = 0
    dropped: dict[str, Tally] = field(default_factory=dict)
    skipped: dict[str, Tally] = field(default_factory=dict)
    schemas: dict[str, Tally] = field(default_factory=dict)
    conversations: int = 0
    ignored: dict[str, Tally] = field(default_factory=dict)
    identical: Tally = field(default_factory=Tally)
    joined: int = 0
    imitated: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    tokens: int = 0
    trained: int = 0
    rows: tuple[int, int, float] | None = None
    warnings: list[str] = field(default_factory=list)

    def drop(self, reason: str, where: str) -> None:
        self.dropped.setdefault(reason, Tally()).add(where)

    def skip(self, reason: str, where: str) -> None:
        self.skipped.setdefault(reason, Tally()).add(where)

    @property
    def dropped_rows(self) -> int:
        return sum(tally.count for tally in self.dropped.values())

    @property
    def skipped_rows(self) -> int:
        return sum(tally.count for tally in self.skipped.values())

    def quantiles(self) -> dict[str, int]:
        """Tokens per example: shortest, quantiles and longest."""
        if not len(self.lengths):
            return {}
        names = {
            "min": 0.0,
            "p25": 0.25,
            "p50": 0.5,
            "p75": 0.75,
            "p95": 0.95,
            "max": 1.0,
        }
        values = np.quantile(self.lengths, list(names.values()), method="lower")
        return {name: int(value) for name, value in zip(names, values, strict=True)}

    def counts(self) -> str:
        """The fate of the rows, one a line; an empty data set's error shows it."""
        lines = [f"{self.read:,} rows read, {self.kept:,} kept"]
        for fate, tallies in (("dropped", self.dropped), ("skipped", self.skipped)):
            lines += [f"{fate}: {reason}: {t}" for reason, t in tallies.items()]
        return visible("\n".join(lines))

    def text(self) -> str:
        """The whole report for the console."""
        rows = [("source", clip(self.source, 200)), ("rows read", f"{self.read:,}")]
        mixed = len(self.schemas) > 1
        rows += [
            ("  read as", f"{name}: {t}" if mixed else name)
            for name, t in self.schemas.items()
        ]
        rows.append(("rows kept", f"{self.kept:,}"))
        rows += [(f"  kept as {name}", f"{n:,}") for name, n in self.kinds.items() if n]
        if self.joined:
            rows.append(("  pairs joined", f"{self.joined:,}, of halves apart"))
        if self.imitated:
            rows.append(("  chosen alone", f"{self.imitated:,}, to imitate"))
        rows += [(f"  dropped, {r}", str(t)) for r, t in self.dropped.items()]
        rows += [
            (f"  skipped, {clip(r, 100)}", str(t)) for r, t in self.skipped.items()
        ]
        if self.truncated:
            share = self.lost / (self.tokens + self.lost)
            lost = f"{self.truncated:,} rows; {self.lost:,} tokens lost, {share:.0%}"
            rows.append((f"  cut at {self.max_length:,} tokens", lost))
        if self.windows:
            rows.append((f"  in windows of {self.max_length:,}", f"{self.windows:,}"))
        if self.duplicates:
            rows.append(("  seen before", f"{self.duplicates:,} (kept)"))
        if self.identical.count:
            rows.append(("  chosen = rejected", str(self.identical)))
        if self.ignored:
            names = ", ".join(clip(name, 40) for name in self.ignored)
            rows.append(("columns not used", names))
        if self.kept:
            rows += self._tokens()
        width = min(max(len(name) for name, _ in rows), 60)
        lines = [f"{self.split} data"]
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return visible("\n".join(lines))

    def _tokens(self) -> list[tuple[str, str]]:
        quantiles = "  ".join(f"{k} {v:,}" for k, v in self.quantiles().items())
        table = [("tokens", f"{self.tokens:,}")]
        if self.trained:  # of prompts to answer none is
            share = self.trained / self.tokens
            table.append(("  trained on", f"{self.trained:,} ({share:.1%})"))
        table += [("tokens per row", quantiles), ("", histogram(self.lengths))]
        if self.rows is not None:
            count, length, fill = self.rows
            of = f"{count:,} of {length:,} tokens, {1 - fill:.1%} of them padding"
            table.append(("rows an epoch", of))
        return table


def histogram(lengths: Sequence[int] | np.ndarray) -> str:
    """A one-line picture of how lengths are spread, shortest left."""
    low, high = int(np.min(lengths)), int(np.max(lengths))
    if low == high:
        return f"all {low:,}"
    counts, _ = np.histogram(lengths, bins=min(BINS, high - low), range=(low, high))
    # Any bin that is not empty shows.
    heights = np.ceil(counts / counts.max() * (len(_BARS) - 1)).astype(int)
    bars = "".join(_BARS[h] for h in heights)
    return f"{low:,} |{bars}| {high:,}"
