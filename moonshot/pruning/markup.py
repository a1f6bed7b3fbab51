"""Text and tables as HTML in which nothing from outside is markup."""

from collections.abc import Iterable, Sequence
from html import escape


def printable(text: str) -> str:
    """The text with all but lines of printable characters written out."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text
    )


def text(value: object) -> str:
    """What a value says, without markup."""
    return escape(printable(str(value)))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """head: text; rows: cells of `cell`, `number` or `bar`."""
    titles = "".join(f"<th>{text(title)}</th>" for title in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(value: object) -> str:
    return f"<td>{text(value)}</td>"


def number(value: object) -> str:
    return f'<td class="number">{text(value)}</td>'


def bar(value: object, share: float) -> str:
    """A number on a bar. share: of its full length, 0 to 1."""
    percent = 100 * min(max(share, 0.0), 1.0) if share == share else 0.0
    return f'<td class="number bar" style="--length:{percent:.1f}">{text(value)}</td>'
