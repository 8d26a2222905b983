"""Writes an HTML page with a card for each photograph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from refuge.files import write_text

ORDER = ("refer", "ungradable", "no sign", "")  # most urgent first
STYLE = """
body { font: 16px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem }
article { border: 1px solid #bbb; border-left-width: .6rem; border-radius: .3rem; margin: 1rem 0;
  padding: 1rem; break-inside: avoid }
article.refer { border-left-color: #b3261e } article.ungradable { border-left-color: #9a6700 }
article.sign { border-left-color: #2e7d32 } h2 { margin: 0; font-size: 1.1rem }
img { max-width: 100% } dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem }
dd { margin: 0 }
"""


@dataclass(frozen=True)
class Card:
    """One photograph on the page.

    Attributes:
        name: Name of its file.
        picture: Path of the drawing, relative to the page.
        verdict: As in predictions.csv.
        numbers: Values by name; NaN where one is unknown.
    """

    name: str
    picture: str
    verdict: str
    numbers: Mapping[str, float]


def write_page(file: Path, cards: Sequence[Card], source: str, how: str) -> None:
    """Writes the page, referred photographs first."""
    ordered = sorted(cards, key=lambda card: ORDER.index(card.verdict))
    body = "\n".join(map(_article, ordered))
    write_text(
        file,
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>Glaucoma screening"
        f"</title><style>{STYLE}</style></head><body>\n<h1>Glaucoma screening</h1>\n"
        f"<p>{escape(how[:1].upper() + how[1:])}</p>\n"
        f"<p>The network was trained on {escape(source)}. This is no medical device: it is wrong "
        "about some eyes, and it looks for nothing but glaucoma. Disc solid, cup dashed, fovea a "
        f"cross; on the right the disc enlarged.</p>\n{body}\n</body></html>\n",
    )


def _article(card: Card) -> str:
    numbers = "".join(
        f"<dt>{escape(name)}</dt><dd>{'-' if math.isnan(value) else f'{value:.2f}'}</dd>"
        for name, value in card.numbers.items()
    )
    kind = card.verdict.split()[-1] if card.verdict else "none"
    said = card.verdict or "no decision"
    return (
        f"<article class='{kind}'><h2>{escape(card.name)}: {said}</h2>"
        f"<img src='{quote(card.picture)}' alt='{escape(card.name, quote=True)}'>"
        f"<dl>{numbers}</dl></article>"
    )
