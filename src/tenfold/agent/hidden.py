"""What a page keeps from its reader's eye: elements that its own styles hide are marked, so that nobody reads them.

Hidden text is how a page speaks to a language model behind its user's back. A page's own attributes and style sheets
are judged; what a script or a sheet in another file would hide cannot be known here.
"""

from __future__ import annotations

import html
import re

_MARK = "data-unseen"
_TAGS = ("template", "script", "style", "noscript", "iframe", "object", "embed", "svg", "datalist")

# What an extractor has to pass over after `mark_unseen`, as a selector and as a path.
UNSEEN = f"[{_MARK}], [hidden], dialog:not([open]), {', '.join(_TAGS)}"
UNSEEN_XPATH = f"//*[@{_MARK} or @hidden] | //dialog[not(@open)] | //{' | //'.join(_TAGS)}"

# Declarations that hide, in a style whose white space, comments and escapes have been resolved.
_HIDING = re.compile(
    r"(?:^|;)(?:display:none|visibility:(?:hidden|collapse)|content-visibility:hidden|opacity:0*\.?0*%?(?:;|!|$)"
    r"|font(?:-size)?:0*\.?0*(?:px|em|rem|pt|%|ex|ch|vw|vh)?(?:;|!|/|$)"
    r"|(?:left|top|right|bottom|text-indent|margin-left|margin-top):-\d{3,}"
    r"|clip:rect\(0|clip:rect\(1px,?1px|clip-path:(?:inset\((?:50|100)%|circle\(0)"
    r"|(?:max-)?(?:height|width):[01]?(?:px)?;(?:.*;)?overflow:hidden|overflow:hidden;(?:.*;)?(?:max-)?(?:height|width):"
    r"[01]?(?:px)?(?:;|$)|color:transparent|color:rgba\(\d+,\d+,\d+,0\)|transform:scale\(0\))"
)
_COLOUR = re.compile(r"(?:^|;)color:([^;!]+)")
_BACKGROUND = re.compile(r"(?:^|;)background(?:-color)?:([^;!]+)")
# Rules of a page that are looked at; more of them, all hiding, are not found on pages for readers.
_MOST_RULES = 500
_STYLE_ATTRIBUTE = re.compile(r"style\s*=\s*", re.IGNORECASE)
_LONGEST_STYLE = 4_000
_LARGEST_SHEET = 1_000_000


def mark_unseen(source: str) -> str:
    """A page in which every element that its own styles hide carries the attribute that UNSEEN names.

    Most pages hide nothing and come back as they are, without having been parsed.
    """
    selectors = [selector for sheet in _sheets(source) for selector in _hiding_selectors(sheet)]
    attributes = _may_hide_by_attribute(source)
    if not selectors and not attributes:
        return source
    from selectolax.lexbor import LexborHTMLParser, SelectolaxError

    # Resiliparse takes quadratic time over many matches of a selector, which a page could use; selectolax does not.
    # Marking rather than removing leaves no node that points to one that is gone.
    tree = LexborHTMLParser(source.encode("utf-8", "replace"))
    unseen = [node for node in tree.css("[style]") if hides(node.attributes.get("style") or "")] if attributes else []
    for selector in selectors[:_MOST_RULES]:
        try:
            unseen += tree.css(selector)
        except (SelectolaxError, ValueError):
            continue  # a selector beyond the parser
    for node in unseen:
        if node.tag not in ("html", "body"):
            node.attrs[_MARK] = ""
    return tree.html or ""


def _may_hide_by_attribute(source: str) -> bool:
    """Whether a style attribute of a page hides. Text that looks like one counts as well, which does no harm."""
    seen = set()
    for found in _STYLE_ATTRIBUTE.finditer(source):
        start = found.end()
        quote = source[start : start + 1]
        if quote in ("'", '"'):
            end = source.find(quote, start + 1, start + _LONGEST_STYLE)
            value = source[start + 1 : end if end >= 0 else start + _LONGEST_STYLE]
        else:
            value = re.split(r"[\s>]", source[start : start + _LONGEST_STYLE], maxsplit=1)[0]
        if value not in seen and hides(html.unescape(value)):
            return True
        seen.add(value)
    return False


def hides(style: str) -> bool:
    """Whether a style attribute or the body of a rule keeps an element from being seen."""
    style = _without_comments(style[:_LONGEST_STYLE])
    style = re.sub(r"\\([0-9a-fA-F]{1,6})\s?", lambda found: _character(found[1]), style)
    style = "".join(style.split()).lower()
    if _HIDING.search(style):
        return True
    ink, paper = _COLOUR.search(style), _BACKGROUND.search(style)
    return ink is not None and paper is not None and ink[1] == paper[1]


def _character(code: str) -> str:
    number = int(code, 16)
    return chr(number) if 0 < number < 0x110000 else ""


# What follows reads text that was perhaps made to be slow to read: each function passes over it once.


def _sheets(source: str) -> list[str]:
    """The style sheets in a page."""
    lower = source.lower()
    if len(lower) != len(source):  # a letter whose small form is two: positions would not agree
        lower = source
    sheets = []
    start = lower.find("<style")
    while start >= 0:
        first = lower.find(">", start) + 1
        end = lower.find("</style", first)
        if first <= 0 or end < 0:
            break
        sheets.append(source[first:end])
        start = lower.find("<style", end)
    return sheets


def _without_comments(sheet: str) -> str:
    kept = []
    position = 0
    while (start := sheet.find("/*", position)) >= 0:
        kept.append(sheet[position:start])
        end = sheet.find("*/", start + 2)
        if end < 0:
            return "".join(kept)
        position = end + 2
    return "".join(kept) + sheet[position:]


def _hiding_selectors(sheet: str) -> list[str]:
    """Selectors of a style sheet whose rules hide; rules for other media, such as print, are not looked at."""
    selectors = []
    opened: list[str] = []
    text = ""
    for piece in re.split(r"([{}])", _without_comments(sheet[:_LARGEST_SHEET])):
        if piece == "{":
            opened.append(text.rpartition(";")[2].strip())
        elif piece == "}":
            selector = opened.pop() if opened else ""
            at_rule = any(outer.startswith("@") for outer in (*opened, selector))
            if selector and not at_rule and ":" not in selector and hides(text):
                selectors.append(selector)
        text = "" if piece in ("{", "}") else piece
    return selectors
