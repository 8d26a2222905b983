"""Writes HTML pages of fifty photographs each, the most urgent first, and a summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from refuge.files import write_text

ORDER = ("refer", "ungradable", "no sign", "")  # most urgent first
CARDS = 50  # of a page
BINS = 10
STYLE = """
body { font: 16px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem }
article { border: 1px solid #bbb; border-left-width: .6rem; border-radius: .3rem; margin: 1rem 0;
  padding: 1rem; break-inside: avoid }
article.refer { border-left-color: #b3261e } article.ungradable { border-left-color: #9a6700 }
article.sign { border-left-color: #2e7d32 } h2 { margin: 0; font-size: 1.1rem }
img { max-width: 100% } dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem }
dd { margin: 0 } .counts { font-size: 1.3rem } .warning { color: #b3261e }
td, th { padding: 0 1rem 0 0; text-align: left } rect { fill: #56789a }
"""


@dataclass(frozen=True)
class Card:
    """One photograph on a page.

    Attributes:
        name: Its name.
        picture: Path of the drawing, relative to the page.
        verdict: As in predictions.csv.
        reason: Why it cannot be graded, or "".
        numbers: Values as they are shown, by name.
        risk: What photographs of one verdict are ordered by; NaN if unknown.
    """

    name: str
    picture: str
    verdict: str
    numbers: Mapping[str, str]
    reason: str = ""
    risk: float = math.nan


@dataclass(frozen=True)
class Summary:
    """What stands at the top of every page.

    Attributes:
        facts: Run, version, date and the like, by name.
        how: When a photograph is referred, and how accurate that was and on which photographs.
        warnings: Lines that a reader must see.
        failed: Photographs that could not be read, with the reason.
    """

    facts: Mapping[str, str]
    how: str
    warnings: Sequence[str] = ()
    failed: Sequence[str] = ()


def write_pages(folder: Path, cards: Sequence[Card], summary: Summary) -> list[Path]:
    """Writes `report.html`, `report-2.html` and so on; removes later pages of an earlier call.

    Returns:
        The files.
    """
    ordered = sorted(cards, key=_urgency)
    pages = max(1, -(-len(ordered) // CARDS))
    files = [folder / ("report.html" if n == 0 else f"report-{n + 1}.html") for n in range(pages)]
    links = " ".join(f"<a href='{file.name}'>{n}</a>" for n, file in enumerate(files, 1))
    for number, file in enumerate(files):
        shown = ordered[number * CARDS : (number + 1) * CARDS]
        body = "\n".join(map(_article, shown))
        pager = f"<p>Page {number + 1} of {pages}: {links}</p>\n" if pages > 1 else ""
        whole = _summarise(cards, summary) if number == 0 else ""
        write_text(
            file,
            "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
            f"<title>Glaucoma screening</title><style>{STYLE}</style></head><body>\n"
            f"<h1>Glaucoma screening</h1>\n<p class='counts'>{escape(count(cards, summary))}</p>\n"
            f"{_head(summary)}{whole}{pager}{body}\n{pager}</body></html>\n",
        )
    number = pages + 1
    while (old := folder / f"report-{number}.html").exists():
        old.unlink()
        number += 1
    return files


def count(cards: Sequence[Card], summary: Summary) -> str:
    """Returns the number of photographs by verdict, in one line."""
    verdicts = [card.verdict for card in cards]
    parts = [f"{verdicts.count(name)} {name or 'without a decision'}" for name in ORDER]
    kept = [part for part, name in zip(parts, ORDER, strict=True) if name in verdicts]
    kept += [f"{len(summary.failed)} not readable"] if summary.failed else []
    return f"{len(cards) + len(summary.failed)} photographs: {', '.join(kept)}"


def _urgency(card: Card) -> tuple[int, float, str]:
    risk = -1.0 if math.isnan(card.risk) else card.risk
    return ORDER.index(card.verdict), -risk, card.name


def _head(summary: Summary) -> str:
    warnings = "".join(f"<p class='warning'>{escape(_start(w))}</p>\n" for w in summary.warnings)
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in summary.facts.items())
    return (
        f"{warnings}<p>{escape(_start(summary.how))}</p>\n<dl>{facts}</dl>\n"
        "<p>This is no medical device: it is wrong about some eyes, and it looks for nothing but "
        "glaucoma. Disc solid, cup dashed, fovea a cross; on the right the disc enlarged.</p>\n"
    )


def _summarise(cards: Sequence[Card], summary: Summary) -> str:
    """Lists reasons and unreadable files, and draws a histogram of the risks."""
    reasons: dict[str, int] = {}
    for card in cards:
        if card.reason:
            first = card.reason.split("; ")[0]
            reasons[first] = reasons.get(first, 0) + 1
    rows = "".join(
        f"<tr><td>{escape(reason)}</td><td>{number}</td></tr>"
        for reason, number in sorted(reasons.items(), key=lambda item: -item[1])
    )
    text = f"<table><tr><th>ungradable because</th><th></th></tr>{rows}</table>\n" if rows else ""
    risks = [card.risk for card in cards if not math.isnan(card.risk)]
    if len(risks) > 1:
        bins = [0] * BINS
        for risk in risks:
            bins[min(BINS - 1, int(risk * BINS))] += 1
        highest = max(bins)
        bars = "".join(
            f"<rect x='{30 * n}' y='{100 - 100 * k / highest:.1f}' width='28' "
            f"height='{100 * k / highest:.1f}'><title>{n / BINS:.1f} to {(n + 1) / BINS:.1f}: {k}"
            "</title></rect>"
            for n, k in enumerate(bins)
        )
        text += (
            f"<p>Risks from 0 to 1 in steps of {1 / BINS:.1f}, the highest column {highest} "
            f"photographs:<br><svg width='{30 * BINS}' height='100'>{bars}</svg></p>\n"
        )
    failed = "".join(f"<li>{escape(line)}</li>" for line in summary.failed)
    return text + (f"<p>Not readable:</p><ul>{failed}</ul>\n" if failed else "")


def _article(card: Card) -> str:
    numbers = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in card.numbers.items()
    )
    kind = card.verdict.split()[-1] if card.verdict else "none"
    verdict = card.verdict or "no decision"
    reason = f" ({escape(card.reason)})" if card.reason else ""
    return (
        f"<article class='{kind}'><h2>{escape(card.name)}: {verdict}{reason}</h2>"
        f"<img loading='lazy' src='{quote(card.picture)}' alt='{escape(card.name, quote=True)}'>"
        f"<dl>{numbers}</dl></article>"
    )


def _start(text: str) -> str:
    return text[:1].upper() + text[1:]
