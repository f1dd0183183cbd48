"""The picture of stratified masks and ranks: ``python -m simulations.pages.masks``.

Draws masks of the library itself (drop rate 3/4, 32 elements, one key) into docs/plots/masks.svg.
"""

from __future__ import annotations

from pathlib import Path

from dare_agg.codec.mask import Mask, parse_drop_rate

OUT = Path(__file__).parents[2] / "docs" / "plots" / "masks.svg"
ELEMENTS, RATE, CLIENTS = 32, "0.75", 4
RUN = 4  # 1/(1 - p)
KEY = bytes(range(16))
CELL, LEFT, TOP, STEP = 20, 128, 58, 28
# Legible in light and dark, and apart for those who see colours otherwise.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
GREY = "#8a8a8a"


def picture() -> str:
    """The SVG, the same on each machine."""
    parts: list[str] = []
    bottom = _panel(parts, "stratified", TOP, "Stratified masks (the default)")
    _text(parts, LEFT, bottom + 20, "Each run of 4 neighbours keeps exactly one element a client.")
    _text(parts, LEFT, bottom + 38, "The rank shifts the choice: no two clients keep the same one.")
    second = bottom + 108
    end = _panel(parts, "bernoulli", second, "Bernoulli masks (the paper's)")
    _text(
        parts, LEFT, end + 20, "Each element is kept by a draw of its own: runs keep none, one or"
    )
    _text(parts, LEFT, end + 38, "several, and the number sent is not known beforehand.")
    width, height = LEFT + ELEMENTS * CELL + 24, end + 56
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="14" role="img" aria-labelledby="t">\n'
        f'<title id="t">Which of {ELEMENTS} elements four clients keep at p = {RATE}</title>\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _panel(parts: list[str], kind: str, top: int, title: str) -> int:
    _text(parts, LEFT, top - 30, title, bold=True)
    for rank in range(CLIENTS):
        y = top + rank * STEP
        _text(parts, 10, y + 15, f"client {rank + 1}, rank {rank}")
        kept = set(_kept(kind, rank))
        for place in range(ELEMENTS):
            colour = COLOURS[rank] if place in kept else "#eeeeee"
            parts.append(
                f'<rect x="{LEFT + place * CELL}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" '
                f'rx="3" fill="{colour}" stroke="{GREY}" stroke-width=".5"/>'
            )
    bottom = top + CLIENTS * STEP
    if kind == "stratified":
        for place in range(0, ELEMENTS + 1, RUN):
            x = LEFT + place * CELL - 1
            parts.append(
                f'<path d="M{x} {top - 12}V{bottom}" stroke="{GREY}" stroke-dasharray="3 3"/>'
            )
    return bottom


def _kept(kind: str, rank: int) -> list[int]:
    mask = Mask(kind, ELEMENTS, parse_drop_rate(RATE), KEY, rank)
    return [int(place) for place in mask.indices(0, ELEMENTS)]


def _text(parts: list[str], x: int, y: int, text: str, *, bold: bool = False) -> None:
    weight = ' font-weight="bold"' if bold else ""
    parts.append(f'<text x="{x}" y="{y}" fill="#222222"{weight}>{text}</text>')


def main() -> None:
    """Entry point."""
    OUT.write_text(picture(), encoding="utf-8")
    print(OUT)


if __name__ == "__main__":
    main()
