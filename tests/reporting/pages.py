"""Pages as a parser sees them, and models whose names attack one."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser
from typing import Any

from torch import nn

__all__ = ["HOSTILE", "Page", "named"]

HOSTILE = [
    "<script>pwned=1</script>",
    "</script><script>pwned=1</script>",
    '"><img src=x onerror=pwned=1>',
    "'onmouseover='pwned=1",
    "<!--",
    "]]>",
    "</style><style>*{display:none}</style>",
    "</title><b>",
    "&lt;b&gt;",
    "${pwned}",
    "a\nb\r\0",
    "a\u202egnp\u2066\u200f",
    "\udc80",
    "\u0301" * 50,
    "x" * 5000,
    " ",
]
VOID = {"meta", "input", "wbr"}


class Page(HTMLParser):
    """The elements of a page, each of which has to be closed, and the texts in them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def skeleton(self) -> list[tuple[str, tuple[str, ...]]]:
        """The elements and the names of their attributes, without anything that a name can say."""
        return [(tag, tuple(given)) for tag, given in self.elements]

    def within(self, tag: str) -> list[str]:
        """The texts directly in elements of this kind."""
        return [text for inside, text in self.texts if inside == tag]

    def text(self) -> str:
        """All text that is shown."""
        return "".join(text for inside, text in self.texts if inside not in ("script", "style"))

    def count(self, tag: str, **attributes: str) -> int:
        """How many elements of this kind have these attributes."""
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        return sum(name == tag and wanted.items() <= given.items() for name, given in self.elements)

    def classes(self) -> Counter[str]:
        """How often each class is used."""
        return Counter(
            name for _, given in self.elements for name in (given.get("class") or "").split()
        )


def named(names: list[str]) -> nn.Module:
    """A model whose modules, and their classes, have these names."""
    model = nn.Module()
    for number, name in enumerate(names, 2):
        kind = type(name.replace("\0", "").replace("\udc80", "\u202e"), (nn.Linear,), {})
        model._modules[name] = kind(2, number)
    return model
