"""Two charts as inline SVG, drawn in the page's own colours.

They know numbers, not verdicts.
"""

import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 400, 220, 44, 34, 18


def _svg(title: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
    return "\n".join([head, *parts, "</svg>"])


def _text(x: float, y: float, words: object, anchor: str = "middle") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'


def histogram(counts: Mapping[int, int], title: str, link: str = "") -> str:
    """Draw a bar a value, with its count over it.

    Args:
        counts: by value, in the order of the bars.
        title: what is counted.
        link: a key of the page's address that a click on a bar sets to its value.
    """
    base, slot = HEIGHT - BOTTOM, WIDTH / len(counts)
    most = max(counts.values()) or 1
    parts = []
    for number, (value, count) in enumerate(counts.items()):
        height = (base - TOP) * count / most
        x = number * slot
        bar = f'<rect x="{x + slot * 0.12:.1f}" y="{base - height:.1f}" width="{slot * 0.76:.1f}" '
        bar += f'height="{height:.1f}"/>' + _text(x + slot / 2, base - height - 4, f"{count:,}")
        bar += _text(x + slot / 2, base + 14, value)
        parts.append(f'<a href="#{link}={value}">{bar}</a>' if link else bar)
    return _svg(title, [*parts, _text(WIDTH / 2, HEIGHT - 4, title)])


def _ticks(low: float, high: float) -> list[int]:
    """List the numbers 1, 2, 5, 10, 20 ... in a range; of many only the powers of ten."""
    exponents = range(int(math.log10(high)) + 1)
    ticks = [m * 10**e for e in exponents for m in (1, 2, 5) if low <= m * 10**e <= high]
    powers = [tick for tick in ticks if str(tick).strip("0") == "1"]
    return powers if len(ticks) > 7 else ticks


def scatter(points: Sequence[tuple[float, int]], title: str) -> str:
    """Draw grades against positive numbers on a logarithmic axis.

    Grades are whole numbers: points are spread around theirs, or a thousand would look like one.
    """
    low = min((x for x, _ in points), default=1.0) / 1.2
    high = max((x for x, _ in points), default=10.0) * 1.2
    base, row = HEIGHT - BOTTOM, (HEIGHT - BOTTOM - 4) / 5

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - 8) * math.log(x / low) / math.log(high / low)

    parts = []
    for grade in range(1, 6):
        y = base - (grade - 0.5) * row
        parts += [f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - 8}"/>']
        parts += [_text(LEFT - 10, y + 4, grade, "end")]
    parts += [_text(across(tick), base + 14, f"{tick:,}") for tick in _ticks(low, high)]
    # One path of dots for all: ten thousand elements would make the page slow.
    dots = []
    for number, (x, grade) in enumerate(points):
        spread = (number * 0.618034) % 1 - 0.5  # the golden ratio: even, and the same each time
        dots.append(f"M{across(x):.1f} {base - (grade - 0.5 + 0.7 * spread) * row:.1f}h0")
    parts.append(f'<path class="dots" d="{"".join(dots)}"/>')
    return _svg(title, [*parts, _text(WIDTH / 2, HEIGHT - 4, title)])
