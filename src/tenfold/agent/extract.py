"""A page to readable text: HTML, Markdown, PDF and plain text, without what a reader would not see.

Pages are written by strangers. Elements that are hidden from the eye and characters that have no width are taken out,
because they are where instructions to a language model hide. What stays is data, whatever it says; that it is shown to
the model as data is the protocol's task.
"""

from __future__ import annotations

import html
import io
import re
from dataclasses import dataclass
from typing import Any

from tenfold.agent.hidden import UNSEEN, UNSEEN_XPATH, mark_unseen
from tenfold.core.console import UserError

# A main text shorter than this is not one: the next extractor of the chain is asked.
_SHORT_CHARACTERS = 200
# trafilatura reads about half a megabyte a second: larger pages go to the fast extractor at once.
_SLOW_EXTRACTOR_BYTES = 1_000_000
# In deeper trees the search for the main text takes quadratic time; real pages have less than a hundred levels.
_DEEPEST_TAGS = 400
_LARGEST_BYTES = 64_000_000
_MOST_PAGES = 5_000
_MOST_TEXT_CHARACTERS = 20_000_000
# Navigation of documentation sets: it repeats on every page and answers nothing.
_NAVIGATION = (
    "nav, [role=navigation], .sphinxsidebar, div.related, .navheader, .navfooter, a.headerlink, "
    "#toc.toc, .printfooter, .mw-editsection"
)
# Format and control characters: zero-width spaces and joiners, direction overrides, soft hyphens, byte order marks,
# tag characters (letters without a glyph), fillers, and half surrogates; tab and line feed stay.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


@dataclass(frozen=True)
class Extracted:
    """The readable text of a page. `date` is ISO 8601 where the page states one."""

    title: str
    text: str
    date: str | None = None


def clean(text: str) -> str:
    """Text without characters that are not seen, with line feeds as line ends and at most one empty line in a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n")
    text = _INVISIBLE.sub("", text.replace("\x0b", "\n").replace("\x0c", "\n"))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def extract(content: bytes, kind: str, url: str = "", web: bool = False) -> Extracted:
    """The readable text of a file or page.

    Args:
        content: the bytes.
        kind: media type (`text/html; charset=...`) or suffix (`.html`).
        url: where it came from, for messages.
        web: take the main text of a page of the open web and leave out its menus and notices; a local document is
            taken whole, but for navigation.

    Raises:
        UserError: too large, encrypted, damaged, not text.
    """
    if len(content) > _LARGEST_BYTES:
        raise UserError(f"{url}: {len(content) // 1_000_000} MB are too large for one document: split it")
    name, _, parameters = kind.lower().partition(";")
    name = name.strip()
    if content[:5] == b"%PDF-" or name in ("application/pdf", ".pdf"):
        return pdf_to_text(content, url)
    charset = re.search(r"charset=[\"']?([\w.:-]+)", parameters)
    markup = name in ("text/html", "application/xhtml+xml", ".html", ".htm", ".xhtml")
    text = decode(content, charset[1] if charset else None, url, markup)
    if markup:
        return html_to_text(text, main_text=web)
    if name in ("text/markdown", ".md", ".markdown"):
        return markdown_to_text(text)
    return plain_to_text(text)


def decode(content: bytes, charset: str | None = None, url: str = "", markup: bool = False) -> str:
    """Bytes to text by the stated encoding, a byte order mark, the page's own statement, or a guess.

    Raises:
        UserError: it is no text at all.
    """
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    sample = content[:4096]
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    controls = sum(byte < 9 or 13 < byte < 27 or 27 < byte < 32 for byte in sample)
    if not wide and (b"\x00" in sample[:1024] or controls > len(sample) // 20) and not markup:
        raise UserError(f"{url}: not text (its first bytes are {content[:8].hex(' ')})")
    if wide:
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")  # nearly every page; the others cost the guess below
    except UnicodeDecodeError:
        pass
    try:
        guess = charset or detect_encoding(content, from_html_meta=markup) or "utf-8"
        return bytes_to_str(content, guess)
    except (LookupError, ValueError):
        return content.decode("utf-8", "replace")


# A heading of reStructuredText: a line, and below it one of at least four equal marks; :mod:`re` in it stands for `re`.
_UNDERLINED = re.compile(r"^(\S[^\n]{0,200})\n([=\-*~^#])\2{3,}$", re.MULTILINE)
_ROLE = re.compile(r":[\w:+.-]+:`([^`]*)`")


def plain_to_text(text: str) -> Extracted:
    """Plain text; its title is its first underlined line (reStructuredText), or its first line that is not empty."""
    text = clean(text)
    underlined = _UNDERLINED.search(text[:20_000])
    first = underlined[1] if underlined is not None else text.partition("\n")[0].strip(" #=-*")
    first = " ".join(_ROLE.sub(r"\1", first).split())
    return Extracted(first[:200], text)


def markdown_to_text(source: str) -> Extracted:
    """Markdown as its reader sees it: rendered, so that comments and hidden HTML in it go the way of a page's."""
    from markdown_it import MarkdownIt

    source = re.sub(r"\A---\n.*?\n---\n", "", source, flags=re.DOTALL)  # the front matter of site generators
    try:
        rendered = MarkdownIt("commonmark").enable("table").render(source)
    except RecursionError:
        return plain_to_text(source)
    found = html_to_text(rendered)
    heading = re.search(r"<h[1-3][^>]*>(.*?)</h[1-3]>", rendered, re.DOTALL)
    title = clean(re.sub(r"<[^>]+>", "", heading[1])) if heading else found.text.partition("\n")[0]
    return Extracted(" ".join(html.unescape(title).split())[:200], found.text)


def html_to_text(source: str, main_text: bool = False) -> Extracted:
    """HTML to text, with line ends between blocks, and lists, tables and preformatted text kept apart.

    Args:
        source: the page.
        main_text: only its main text, as Resiliparse or trafilatura find it; the whole page where neither does.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    source = mark_unseen(source.replace("\x00", ""))
    tree = HTMLTree.parse(source)
    title = " ".join(clean(tree.title or "").split())[:300]
    root = tree.document
    if root is None or tree.body is None:
        return Extracted(title, "")
    shown = {"preserve_formatting": True, "alt_texts": False}
    whole = clean(extract_plain_text(tree, main_content=False, skip_elements=[UNSEEN, _NAVIGATION], **shown))
    if not whole:  # a page that is one big menu: an index of terms, a table of contents
        whole = clean(extract_plain_text(tree, main_content=False, skip_elements=[UNSEEN], **shown))
    text = whole
    if main_text and _depth(source) <= _DEEPEST_TAGS:
        # On documentation pages Resiliparse keeps more of what must be kept than trafilatura, and is some thirty times
        # as fast; but now and then it keeps nearly nothing.
        least = max(_SHORT_CHARACTERS, len(whole) // 5)
        text = clean(extract_plain_text(tree, main_content=True, skip_elements=[UNSEEN], **shown))
        if len(text) < least <= len(whole):
            text = clean(_by_trafilatura(source) or "")
        if len(text) < min(least, len(whole)):
            text = whole
    return Extracted(title or whole.partition("\n")[0][:200], text, _date(root))


def _by_trafilatura(source: str) -> str | None:
    import trafilatura

    if len(source) > _SLOW_EXTRACTOR_BYTES:
        return None
    try:
        return trafilatura.extract(
            source, include_comments=False, include_tables=True, favor_recall=True, prune_xpath=UNSEEN_XPATH
        )
    except Exception:  # its many parts raise nearly anything on broken pages, and the chain has a next link
        return None


# Elements without an end, and those whose end may be left out, which therefore do not pile up.
_FLAT = "area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr|p|li|td|th|tr|thead|tbody|dt|dd|option"
_TAG = re.compile(rf"<(/?)(?!(?:{_FLAT})\b)[a-z]", re.IGNORECASE)


def _depth(source: str) -> int:
    """About how many elements of a page are open at once."""
    depth = deepest = 0
    for end in _TAG.findall(source):
        depth += -1 if end else 1
        deepest = max(deepest, depth)
    return deepest


def _date(root: Any) -> str | None:
    """The date that a page states of itself, changed rather than published."""
    for name in ("article:modified_time", "last-modified", "dcterms.modified", "article:published_time", "date"):
        node = root.query_selector(f'meta[property="{name}"], meta[name="{name}"]')
        found = re.match(r"\d{4}-\d{2}-\d{2}", (node["content"] if node is not None else "") or "")
        if found:
            return found[0]
    return None


def pdf_to_text(content: bytes, url: str = "") -> Extracted:
    """The text of a PDF, page by page; pages that cannot be read are passed over.

    Raises:
        UserError: encrypted with a password, damaged, or pictures of pages only.
    """
    import logging

    from pypdf import PdfReader
    from pypdf.errors import DependencyError, PyPdfError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it reports every oddity of a file it copes with
    try:
        reader = PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UserError(f"{url}: the PDF is encrypted: remove its password first (for example with qpdf --decrypt)")
        number = len(reader.pages)
        title = str((reader.metadata.title if reader.metadata else None) or "")
    except DependencyError:
        raise UserError(f"{url}: the PDF is encrypted: remove its encryption first (qpdf --decrypt)") from None
    except UserError:
        raise
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError) as error:
        raise UserError(f"{url}: a damaged PDF ({str(error).partition(chr(10))[0][:120]}): fetch it again") from None
    pages = []
    length = 0
    for position in range(min(number, _MOST_PAGES)):
        try:
            pages.append(reader.pages[position].extract_text())
        except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError):
            continue
        length += len(pages[-1])
        if length > _MOST_TEXT_CHARACTERS:
            break
    text = clean("\n\n".join(pages))
    if not text:
        raise UserError(f"{url}: the PDF has no text, only pictures of pages: run text recognition on it first")
    return Extracted(clean(title)[:300] or text.partition("\n")[0][:200], text)
