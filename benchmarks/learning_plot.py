"""The curves as a picture: a panel per arm, mean and spread over seeds, the control in grey. Writes SVG by
hand, so that the benchmark needs no plotting library and the picture in the documents can be compared."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.learning_curves import Record, smoothed, whole

__all__ = ["picture"]

_WIDTH, _HEIGHT = 240, 170
_LEFT, _TOP, _GAP = 52, 46, 18
_COLUMNS = 3
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#333}.name{font-weight:600;font-size:12px}"
    ".grid{stroke:#ddd}.control{stroke:#888;fill:none;stroke-dasharray:4 3}"
    ".control-band{fill:#888;opacity:.2}"
    ".mean{stroke:#1f6fb4;stroke-width:1.8;fill:none}.band{fill:#1f6fb4;opacity:.22}"
)


def picture(arms: Mapping[str, Sequence[Record]], control: Sequence[Record], title: str) -> str:
    """SVG.

    Args:
        arms: the runs of each arm.
        control: runs that must stay flat, drawn into every panel; may be empty.
        title: stands above.
    """
    bands = {name: _band(records) for name, records in arms.items() if records}
    grey = _band(control) if control else None
    scale = _Scale([*bands.values(), *([grey] if grey else [])])
    columns = min(_COLUMNS, len(bands))
    rows = -(-len(bands) // columns)
    width = _LEFT + columns * (_WIDTH + _GAP)
    height = _TOP + rows * (_HEIGHT + _GAP + 26) + 18
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img"><title>{_escaped(title)}</title><style>{_STYLE}</style>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="20" class="name">{_escaped(title)}</text>',
    ]
    for place, (name, band) in enumerate(bands.items()):
        row, column = divmod(place, columns)
        x, y = _LEFT + column * (_WIDTH + _GAP), _TOP + row * (_HEIGHT + _GAP + 26)
        parts.append(f'<g transform="translate({x},{y})">')
        parts += scale.axes(left=column == 0)
        parts.append(f'<text x="2" y="-5" class="name">{_escaped(name)}</text>')
        if grey:
            parts += scale.drawn(grey, "control-band", "control")
        parts += [*scale.drawn(band, "band", "mean"), "</g>"]
    note = "step → training reward, mean over seeds, band of one standard deviation"
    note += "; dashed: rewards shuffled inside the group" if grey else ""
    parts.append(f'<text x="{_LEFT}" y="{height - 8}">{note}</text></svg>')
    return "\n".join(parts) + "\n"


_Band = Sequence[tuple[float, float]]
"""Mean and standard deviation at each step."""


def _band(records: Sequence[Record]) -> _Band:
    curves = [smoothed(whole(record)) for record in records]
    return [
        (statistics.fmean(step), statistics.stdev(step) if len(step) > 1 else 0.0)
        for step in zip(*curves, strict=True)
    ]


class _Scale:
    """From steps and rewards to a panel."""

    def __init__(self, bands: Sequence[_Band]) -> None:
        self._steps = max(2, *map(len, bands)) if bands else 2
        ends = [value for band in bands for mean, std in band for value in (mean - std, mean + std)]
        self._low, self._high = _outwards(min(ends, default=0.0)), -_outwards(-max(ends, default=1.0))

    def _x(self, step: int) -> float:
        return round(step / (self._steps - 1) * _WIDTH, 1)

    def _y(self, value: float) -> float:
        return round((self._high - value) / (self._high - self._low) * _HEIGHT, 1)

    def axes(self, *, left: bool) -> list[str]:
        """Grid lines and their numbers."""
        parts = []
        ticks = round((self._high - self._low) / 0.25)
        for i in range(0, ticks + 1, 1 if ticks <= 6 else 2):
            value = self._low + i * 0.25
            y = self._y(value)
            parts.append(f'<line class="grid" x1="0" x2="{_WIDTH}" y1="{y}" y2="{y}"/>')
            if left:
                parts.append(f'<text x="-6" y="{y + 4}" text-anchor="end">{value:.2f}</text>')
        for step in range(0, self._steps, 10 * -(-self._steps // 60)):
            parts.append(f'<text x="{self._x(step)}" y="{_HEIGHT + 14}" text-anchor="middle">{step}</text>')
        return parts

    def drawn(self, band: _Band, area: str, line: str) -> list[str]:
        """The area of a standard deviation, and the mean."""
        upper = [f"{self._x(i)},{self._y(mean + std)}" for i, (mean, std) in enumerate(band)]
        lower = [f"{self._x(i)},{self._y(mean - std)}" for i, (mean, std) in enumerate(band)]
        middle = [f"{self._x(i)},{self._y(mean)}" for i, (mean, _) in enumerate(band)]
        return [
            f'<polygon class="{area}" points="{" ".join([*upper, *reversed(lower)])}"/>',
            f'<polyline class="{line}" points="{" ".join(middle)}"/>',
        ]


def _outwards(value: float) -> float:
    """Down to a multiple of 0.25."""
    return value // 0.25 * 0.25


def _escaped(text: Any) -> str:
    return str(text).replace("&", "&amp;").replace("<", "&lt;")
