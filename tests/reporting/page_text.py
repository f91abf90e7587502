"""A page as its reader gets it: parsed strictly, by section, table and attribute."""

from html.parser import HTMLParser

VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Raises an AssertionError for an element that is not closed where it should be."""

    def __init__(self, html: str):
        super().__init__()
        self.texts: dict[str, str] = {}
        """By section, "" for the head: its text."""
        self.tables: dict[str, list[list[list[str]]]] = {}
        """By section: its tables, as rows of cells."""
        self.attributes: list[tuple[str, str, str]] = []
        """(element, attribute, value) of all elements."""
        self._open: list[str] = []
        self._section = ""
        self._row: list[str] | None = None
        self.feed(html)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), attrs
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"]
        elif tag == "table":
            self.tables.setdefault(self._section, []).append([])
        elif tag == "tr":
            self._row = []
            self.tables[self._section][-1].append(self._row)
        elif tag in ("td", "th"):
            self._row.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open[-1:] == [tag], (self._open[-3:], tag, self.getpos())
        self._open.pop()
        if tag == "section":
            self._section = ""
        elif tag == "tr":
            self._row = None

    def handle_data(self, data):
        self.texts[self._section] = self.texts.get(self._section, "") + data
        if self._row:
            self._row[-1] += data

    def values(self, element: str, attribute: str) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == (element, attribute)]
