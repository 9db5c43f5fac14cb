"""HTML by construction: whatever is not made by :func:`tag` is text, and is escaped."""

from __future__ import annotations

import html

__all__ = ["Html", "join", "tag", "text"]

LONGEST = 1000
_VOID = ("meta", "input", "wbr")


class Html(str):
    """Markup; every other string is text."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. ``class_`` is ``class``, ``data_v`` is ``data-v``; None leaves an attribute out.

    Example:
        >>> from wn_surgery.reporting.html import tag
        >>> tag("p", tag("b", "a<b"), "c", class_='"')
        '<p class="&quot;"><b>a&lt;b</b>c</p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>" + ("" if name in _VOID else f"{join(*children)}</{name}>"))


def join(*children: object) -> Html:
    """Markup as it is, everything else as text."""
    return Html("".join(map(text, children)))


def text(value: object) -> Html:
    """The text, escaped. What cannot be seen, or turns the text around it, shows as an escape."""
    if isinstance(value, Html):
        return value
    shown = str(value)
    if len(shown) > LONGEST:
        shown = f"{shown[:700]} … {shown[-200:]} ({len(shown):,} characters)"
    if not shown.isprintable():
        shown = "".join(
            each if each.isprintable() else each.encode("unicode_escape").decode() for each in shown
        )
    return Html(html.escape(shown))
