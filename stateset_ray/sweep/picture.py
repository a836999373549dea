"""A sweep as a picture, written as SVG by hand: every trial as a line through its values, and its curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stateset_ray.sweep.space import Dimension, Space, Values

__all__ = ["Curve", "picture"]

_AXIS, _HEIGHT, _LEFT, _TOP = 150, 200, 70, 58
_CURVES = 200  # height of the lower panel
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#333;paint-order:stroke;stroke:#fff;stroke-width:3px}"
    ".name{font-weight:600}"
    ".title{font-weight:600;font-size:13px}"
    ".axis{stroke:#999}.grid{stroke:#e4e4e4}.trial{fill:none;stroke-width:1.3;opacity:.75}"
    ".best{fill:none;stroke:#c2410c;stroke-width:2.6}"
)
_OFF = "not set"


@dataclass(frozen=True)
class Curve:
    """What the picture shows of a trial.

    Attributes:
        values: what it set, by key.
        steps: (step, value of what is compared).
        value: the last one.
        best: it is drawn in another colour.
    """

    values: Values
    steps: Sequence[tuple[int, float]]
    value: float
    best: bool


def picture(space: Space, trials: Sequence[Curve], metric: str, title: str) -> str:
    """SVG.

    Args:
        metric: what is compared, in words.
        title: stands above.
    """
    known = [t.value for t in trials if math.isfinite(t.value)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    axes = [_Axis.of(space, key) for key in dict.fromkeys(d.key for d in space.dimensions)]
    last = _Axis(metric, low, high)
    width = _LEFT + len(axes) * _AXIS + 110
    below = _TOP + _HEIGHT + 66
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {below + _CURVES + 40}" '
        f'width="{width}" height="{below + _CURVES + 40}" role="img"><title>{_escaped(title)}</title>'
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{below + _CURVES + 40}" fill="#fff"/>',
        f'<text x="14" y="22" class="title">{_escaped(title)}</text>',
    ]
    shown = sorted(trials, key=lambda t: (t.best, t.value if math.isfinite(t.value) else -math.inf))
    for trial in shown:
        heights = [axis.height(trial.values.get(axis.name)) for axis in axes]
        if math.isfinite(trial.value):
            heights.append(last.height(trial.value))
        points = " ".join(f"{_LEFT + i * _AXIS},{_TOP + y:.1f}" for i, y in enumerate(heights))
        parts.append(f'<polyline {_look(trial, low, high)} points="{points}"/>')
    for place, axis in enumerate([*axes, last]):
        parts += axis.drawn(_LEFT + place * _AXIS)
    parts += _curves(shown, metric, low, high, below, width - _LEFT - 60)
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Axis:
    """One setting as an axis: a range, by its logarithm or not, or options side by side.

    Args:
        name: the setting's key.
        low: end of the range.
        high: other end.
        log: the range is drawn by its logarithm.
        options: instead of a range.
        off: some trials do not set it.
    """

    def __init__(
        self, name: str, low: float = 0.0, high: float = 1.0, *, log: bool = False,
        options: Sequence[Any] = (), off: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self._low, self._high, self._log = low, high, log
        self._options = [repr(option) for option in options]
        self._off = off

    @classmethod
    def of(cls, space: Space, key: str) -> _Axis:
        """The axis of a key; where it varies in several ways, of all of them."""
        ways: list[Dimension] = [d for d in space.dimensions if d.key == key]
        off = any(way.when for way in ways)
        if any(way.kind in ("choice", "grid") for way in ways):
            options = {repr(v): v for way in ways for v in way.values}
            return cls(key, options=list(options.values()), off=off)
        ends = [float(v) for way in ways for v in way.values]
        log = all(way.kind == "loguniform" for way in ways)
        return cls(key, min(ends), max(ends), log=log, off=off)

    def height(self, value: Any) -> float:
        """Pixels from the top."""
        whole = _HEIGHT - (30 if self._off else 0)
        if value is None:
            return float(_HEIGHT)
        if self._options:
            place = self._options.index(repr(value)) if repr(value) in self._options else 0
            return whole * (1 - (place + 0.5) / len(self._options))
        if self._high <= self._low:
            return whole / 2
        low, high = self._low, self._high
        if self._log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return whole * (1 - min(1.0, max(0.0, (value - low) / (high - low))))

    def drawn(self, x: int) -> list[str]:
        """The line, its name and its ticks."""
        section, _, name = self.name.rpartition(".")
        parts = [
            f'<line class="axis" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_TOP + _HEIGHT}"/>',
            f'<text x="{x}" y="{_TOP - 20}" text-anchor="middle">{_escaped(section)}</text>',
            f'<text x="{x}" y="{_TOP - 7}" text-anchor="middle" class="name">{_escaped(name)}</text>',
        ]
        middle = math.sqrt(self._low * self._high) if self._log else (self._low + self._high) / 2
        ticks = [(o.strip("'"), self._tick(i)) for i, o in enumerate(self._options)] or [
            (f"{value:.3g}", self.height(value)) for value in (self._low, middle, self._high)
        ]
        ticks += [(_OFF, float(_HEIGHT))] if self._off else []
        for text, y in ticks:
            parts.append(
                f'<text x="{x - 5}" y="{_TOP + y + 4:.1f}" text-anchor="end">{_escaped(text)}</text>'
            )
        return parts

    def _tick(self, place: int) -> float:
        whole = _HEIGHT - (30 if self._off else 0)
        return whole * (1 - (place + 0.5) / len(self._options))


def _curves(
    trials: Sequence[Curve], metric: str, low: float, high: float, top: int, width: int
) -> list[str]:  # fmt: skip
    """The lower panel: what is compared, step by step."""
    points = [(s, v) for t in trials for s, v in t.steps if math.isfinite(v)]
    if not points:
        return []
    longest = max(2, max(s for s, _ in points))
    ends = min(v for _, v in points), max(v for _, v in points)
    spread = ends[1] - ends[0] or 1.0

    def at(step: int, value: float) -> str:
        x = _LEFT + (step - 1) / (longest - 1) * width
        return f"{x:.1f},{top + (ends[1] - value) / spread * _CURVES:.1f}"

    parts = [f'<text x="14" y="{top - 10}" class="name">{_escaped(metric)} by step</text>']
    for share in (0, 0.5, 1):
        y = top + share * _CURVES
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + width}" y1="{y}" y2="{y}"/>')
        value = ends[1] - share * spread
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
    for step in dict.fromkeys((1, (1 + longest) // 2, longest)):
        x = _LEFT + (step - 1) / (longest - 1) * width
        parts.append(f'<text x="{x:.1f}" y="{top + _CURVES + 16}" text-anchor="middle">{step}</text>')
    for trial in trials:
        line = " ".join(at(s, v) for s, v in trial.steps if math.isfinite(v))
        if " " in line:
            parts.append(f'<polyline {_look(trial, low, high)} points="{line}"/>')
        elif line:
            across, _, down = line.partition(",")
            parts.append(f'<circle cx="{across}" cy="{down}" r="2.5" fill="#888"/>')
    return parts


def _look(trial: Curve, low: float, high: float) -> str:
    """Grey to blue by what was reached; the best stands out."""
    if trial.best:
        return 'class="best"'
    share = (trial.value - low) / (high - low) if high > low and math.isfinite(trial.value) else 0.0
    red, green, blue = (round(a + (b - a) * share) for a, b in ((190, 31), (190, 111), (190, 180)))
    return f'class="trial" stroke="rgb({red},{green},{blue})"'


def _escaped(text: Any) -> str:
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
