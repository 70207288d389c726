"""Pieces of the page's HTML; everything that comes from a user goes through `escape` on its way here."""

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["cells", "escape", "figure", "folded", "note", "section", "table", "texts"]


def section(title: str, *parts: str) -> str:
    """A part of the page; nothing where all of its parts are empty."""
    return f"<section><h2>{escape(title)}</h2>\n{''.join(parts)}</section>" if any(parts) else ""


def note(words: str) -> str:
    """A paragraph in small print."""
    return f"<p class=note>{escape(words)}</p>"


def figure(chart: str, words: str, *further: str) -> str:
    """A chart with what there is to say of it."""
    return f"<figure class=chart>{chart}{''.join(further)}<figcaption>{escape(words)}</figcaption></figure>"


def table(heads: str, rows: Iterable[str], kind: str = "") -> str:
    """A table of rows `<tr>` under a head of `<tr>`, which scrolls by itself where it is too wide."""
    head = f"<thead>{heads}</thead>" if heads else ""
    body = "\n".join(rows)
    return f'<div class=wide><table class="{kind}">{head}<tbody>{body}</tbody></table></div>\n'


def cells(tag: str, words: Iterable[str], kind: str = "") -> str:
    """Cells of escaped words."""
    attribute = f' class="{kind}"' if kind else ""
    return "".join(f"<{tag}{attribute}>{escape(word)}</{tag}>" for word in words)


def texts(first: str, *further: str) -> str:
    """A row of texts, the first one its head."""
    return f"<tr><th>{escape(first)}</th>{cells('td', further, 'text')}</tr>"


def folded(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A table of two columns behind its title; nothing where it is empty."""
    if not rows:
        return ""
    made = [
        f"<tr><th>{escape(key)}</th><td class='text hash'>{escape(value)}</td></tr>" for key, value in rows
    ]
    return f"<details><summary>{escape(title)} ({len(rows)})</summary>{table('', made)}</details>"
