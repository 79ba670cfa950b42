"""What a command prints: tables, a progress bar, and lines where there is no terminal.

Nothing here may end a run: a closed or broken output is noticed once and then ignored.
Text that comes from data is shown through `printable`, so that no row can move the
cursor or recolour the terminal.
"""

import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

BAR_WIDTH = 24
REDRAW_SECONDS = 0.1

Cell = str | int | float | None


def say(text: str = "", *, stream: TextIO | None = None, end: str = "\n") -> None:
    """Prints a line at once; a reader that has gone away is no error."""
    out = stream or sys.stdout
    try:
        out.write(text + end)
        out.flush()
    except UnicodeEncodeError:
        encoding = out.encoding or "ascii"
        plain = text.encode(encoding, "replace").decode(encoding)
        say(plain, stream=stream, end=end)
    except (OSError, ValueError):
        _hush(out)


def warn(text: str) -> None:
    """Prints one `warning:` line to standard error."""
    say(f"warning: {text}", stream=sys.stderr)


def _hush(out: TextIO) -> None:
    """Sends what is still to come to nowhere, also what Python flushes at exit."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, out.fileno())
        os.close(null)
    except (OSError, ValueError):
        # A closed stream, or one with no file behind it: replacing it is enough.
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is out:
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def printable(text: str) -> str:
    """`text` with control and invisible direction characters spelt out."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char)[0] != "C" else _spelt(char)
        for char in text
    )


def _spelt(char: str) -> str:
    # Joiners and soft hyphens belong to ordinary text; the rest of 'Cf' reorders it.
    if unicodedata.category(char) == "Cf" and char in "\u200c\u200d\u00ad":
        return char
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def width(text: str) -> int:
    """Terminal columns that `text` takes."""
    return sum(
        0
        if unicodedata.combining(char)
        else 2
        if unicodedata.east_asian_width(char) in "WF"
        else 1
        for char in text
    )


def count(n: float) -> str:
    """A count to three figures: 950, 12.3k, 6.74B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,950 would round to 1000.0k
        if abs(n) >= size * 0.9995:
            scaled = n / size
            return f"{scaled:.{max(0, 2 - _digits(scaled))}f}{unit}"
    return f"{n:.0f}" if float(n).is_integer() else f"{n:.1f}"


def _digits(x: float) -> int:
    return len(str(int(abs(x) + 0.005))) - 1


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.8s, 42s, 3m 05s, 2h 10m."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f}s"
    if seconds < 59.5:
        return f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m"


def table(
    rows: Iterable[Sequence[Cell]],
    headers: Sequence[str] = (),
    *,
    wrap: int | None = None,
) -> str:
    """Aligned plain text; numbers to the right, everything else to the left.

    Args:
      rows: cells as text or numbers; ints get thousands separators, floats four
        figures, None is an empty cell. Line breaks in a cell are kept.
      headers: one per column, underlined; none at all for a table without.
      wrap: columns wider than this are broken into lines at spaces.
    """
    cells = [[_text(cell) for cell in row] for row in rows]
    grid = [list(headers), *cells] if headers else cells
    if not grid:
        return ""
    columns = max(map(len, grid))
    grid = [row + [""] * (columns - len(row)) for row in grid]
    lines_of = [[_wrapped(cell, wrap) for cell in row] for row in grid]
    widths = [
        max((width(line) for row in lines_of for line in row[j]), default=0)
        for j in range(columns)
    ]
    first = 1 if headers else 0
    right = [
        any(row[j] for row in grid[first:])
        and all(_is_number(row[j]) for row in grid[first:])
        for j in range(columns)
    ]
    out = []
    for i, row in enumerate(lines_of):
        for k in range(max(map(len, row))):
            line = [
                _padded(cell[k] if k < len(cell) else "", widths[j], right[j])
                for j, cell in enumerate(row)
            ]
            out.append("  ".join(line).rstrip())
        if headers and i == 0:
            out.append("  ".join("-" * w for w in widths))
        elif wrap and i + 1 < len(lines_of) and any(len(cell) > 1 for cell in row):
            out.append("")
    return "\n".join(out)


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool | str):
        return printable(str(cell)).expandtabs(4)
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}" if abs(cell) < 1e4 else f"{cell:,.0f}"


def _is_number(text: str) -> bool:
    bare = text.strip().rstrip("%kMBTs").replace(",", "").strip()
    try:
        float(bare)
    except ValueError:
        return text.strip() in ("", "-")
    return True


def _padded(text: str, columns: int, right: bool) -> str:
    gap = " " * (columns - width(text))
    return gap + text if right else text + gap


def _wrapped(text: str, wrap: int | None) -> list[str]:
    lines = text.split("\n")
    if wrap is None:
        return lines
    return [piece for line in lines for piece in _broken(line, wrap)]


def _broken(line: str, limit: int) -> list[str]:
    """`line` in pieces of at most `limit` columns, at spaces where there are any."""
    pieces, piece, used, space = [], "", 0, -1
    for char in line:
        step = width(char)
        if used + step > limit and char == " ":
            pieces.append(piece)
            piece, used, space = "", 0, -1
            continue
        if used + step > limit:
            cut = space if space > 0 else len(piece)
            pieces.append(piece[:cut].rstrip())
            piece = piece[cut:].lstrip()
            used, space = width(piece), piece.rfind(" ")
        if char == " ":
            space = len(piece)
        piece, used = piece + char, used + step
    return [*pieces, piece]


class Progress:
    """A bar on a terminal, one plain line per update elsewhere.

    Args:
      total: the last step.
      start: the step that was already done (resume).
      unit: what is counted.
      stream: standard output by default.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        unit: str = "step",
        stream: TextIO | None = None,
    ):
        self.total, self.unit = total, unit
        self._stream, self._step = stream or sys.stdout, start
        self._bar = _is_terminal(self._stream)
        self._drawn, self._shown, self._line = 0.0, 0, ""

    def update(
        self,
        step: int,
        values: Mapping[str, float] | None = None,
        tokens_per_s: float | None = None,
        eta_s: float | None = None,
    ) -> None:
        """Shows where the run is; on a terminal it redraws the bar.

        The first of the values tells most, and comes first; the others come last.
        """
        self._step = step
        said = [
            f"{name} {value:{'.4g' if i else '.4f'}}"
            for i, (name, value) in enumerate((values or {}).items())
        ]
        parts = said[:1]
        if tokens_per_s is not None:
            parts.append(f"{count(tokens_per_s)} tokens/s")
        if eta_s is not None:
            parts.append(f"{duration(eta_s)} left")
        parts += said[1:]
        if not self._bar:
            head = f"{self.unit} {step:>{len(str(self.total))}}/{self.total}"
            say("  ".join([head, *parts]), stream=self._stream)
            return
        self._line = "  ".join([self._drawing(step), *parts])
        now = time.monotonic()
        if now - self._drawn >= REDRAW_SECONDS or step >= self.total:
            self._drawn = now
            self._draw()

    def note(self, text: str) -> None:
        """Prints lines of their own (an evaluation, a save) above the bar."""
        if self._bar and self._shown:
            say("\r" + " " * self._shown + "\r", stream=self._stream, end="")
            self._shown = 0
        say(text, stream=self._stream)
        if self._bar and self._line:
            self._draw()

    def close(self) -> None:
        """Leaves the bar as it is and starts a new line."""
        if self._bar and self._line:
            self._draw()
            say("", stream=self._stream)
            self._line, self._shown = "", 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drawing(self, step: int) -> str:
        done = min(max(step / self.total, 0.0), 1.0) if self.total else 1.0
        eighths = int(done * BAR_WIDTH * 8)
        encoding = (self._stream.encoding or "").lower().replace("-", "")
        if encoding.startswith("utf"):
            full, part = divmod(eighths, 8)
            bar = "█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")
        else:
            bar = "#" * (eighths // 8)
        return f"{done:4.0%} |{bar:<{BAR_WIDTH}}| {step}/{self.total}"

    def _draw(self) -> None:
        room = shutil.get_terminal_size().columns - 1
        line = self._line[:room]
        blank = " " * max(self._shown - len(line), 0)
        self._shown = len(line)
        say(f"\r{line}{blank}", stream=self._stream, end="")


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    except ValueError:
        return False
