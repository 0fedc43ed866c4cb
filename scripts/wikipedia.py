"""Clean English prose from a MediaWiki XML export (bz2), by this rule:

* Pages: namespace 0 that are no redirects, in the order of the export.
* Removed with their content: comments, references, formulas, code, galleries, tables, files, categories,
  links to other languages, and every template except the few below that stand for words of the sentence.
* Kept as plain words: the label of a link, the text inside other HTML tags, `{{convert|5|km|mi}}` as "5 km",
  and the last positional argument of `{{nowrap|..}}`, `{{transl|..}}` and their like.
* A paragraph is one line of the source. It is dropped when it is a heading, a list item or an indented line, when
  it stands in an appendix ("References", "See also", ..), when something that can't be said in words was cut out
  of it (a formula, a fraction), when it has fewer than 80 characters, or when it doesn't begin and end as a sentence
  does.
* One paragraph per line, UTF-8, one newline at the end of each.
* Of the articles that still have text, every tenth (the 10th, 20th, ..) is held out; the rest is for calibration.
  No article is in both.

The text is that of the English Wikipedia's authors, under CC BY-SA.
"""

import bz2
import html
import re
import xml.etree.ElementTree as ElementTree

MIN_CHARACTERS = 80
HELD_OUT_EVERY = 10

# Stands where something was cut that a reader would miss: U+FFFC, the object replacement character.
HOLE = "\ufffc"

APPENDICES = {
    "additional references", "bibliography", "citations", "external links", "filmography", "footnotes",
    "further reading", "notes", "notes and references", "publications", "references", "references and further reading",
    "see also", "selected bibliography", "selected works", "sources", "works cited",
}

# Templates that show their last positional argument.
SHOWS_LAST_ARGUMENT = {
    "angbr", "big", "keypress", "large", "linktext", "nihongo", "nobold", "nowrap", "quote", "sc", "script", "sic",
    "small", "smaller", "ss", "tooltip", "transl", "vanchor", "vr",
}
# Templates that stand for a character or two.
STANDS_FOR = {
    "'": "'", "'s": "'s", "' \"": "'\"", "circa": "c.", "mdashb": "—", "nbsp": " ", "ndash": "–", "snd": " – ",
    "snds": " – ", "spaced ndash": " – ", "thinsp": " ", "·": "·", "!": "|", "=": "=",
}
# Templates whose removal would leave a sentence without a number, a formula or a name.
CANNOT_BE_SAID = {
    "age", "chem", "e", "eqm", "format price", "frac", "hms", "inflation", "ipa", "lang", "nuclide2", "railgauge",
    "sfrac", "simplenuclide2", "sup", "uss", "val",
}

COMMENT = re.compile(r"<!--.*?-->", re.S)
EMPTY_REFERENCE = re.compile(r"<ref\b[^<>]*/>", re.I)
DROPPED_ELEMENT = re.compile(r"<(ref|references|gallery|poem)\b[^<>]*>.*?</\1\s*>", re.S | re.I)
FORMULA = re.compile(r"<(math|code|source)\b[^<>]*>.*?</\1\s*>", re.S | re.I)
TEMPLATE = re.compile(r"\{\{((?:[^{}]|(?<!\{)\{(?!\{)|(?<!\})\}(?!\}))*)\}\}")
TABLE = re.compile(r"^[ :*]*\{\|(?:(?!^[ :*]*\{\|).)*?^\s*\|\}", re.S | re.M)
LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
EXTERNAL_LINK = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\]]+\s*([^\]]*)\]|\[mailto:[^\]]*\]", re.I)
BARE_URL = re.compile(r"\bhttps?://[^\s\]]+", re.I)
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
HEADING = re.compile(r"^(=+)\s*(.*?)\s*\1\s*$")
SENTENCE = re.compile(r"[^a-z,;.)].*[.!?][\"'”’)]*")
UNBALANCED = re.compile(r"\[\[|\]\]|\{\{|\}\}|\|\|")
# Bold and italic quotes, invisible characters, footnote numbers; then the gaps that removed foreign names and
# pronunciations leave, mostly in parentheses: "( , )", "(; born 1809)", " ,".
TIDY = (
    (re.compile(r"'{2,}"), ""),
    (re.compile(r"[\u200b-\u200f\ufeff\u00ad]"), ""),
    (re.compile(r"\[\d+\]"), ""),
    (re.compile(r"\s*\((?:occasionally|or|and|[\s,;:/–—-])*\)"), ""),
    (re.compile(r"\(\s*[,;:]\s*(?:[,;:]\s*)*"), "("),
    (re.compile(r"\s*[,;:]\s*\)"), ")"),
    (re.compile(r"([,;:])(?:\s*[,;])+"), r"\1"),
    (re.compile(r"\s+"), " "),
    (re.compile(r"\(\s+"), "("),
    (re.compile(r"\s+([,;:.!?)])(?=\s|$|[)\"'])"), r"\1"),
)


def expand_template(match):
    """The words that an innermost template shows."""
    name, *arguments = match.group(1).split("|")
    name = " ".join(name.replace("_", " ").lower().split())
    positional = [a.strip() for a in arguments if not re.match(r"\s*[\w -]+=", a)]
    if name in STANDS_FOR:
        return STANDS_FOR[name]
    if name in ("convert", "cvt"):
        return expand_conversion(positional)
    if name == "as of":
        return ("as of " if "lc=y" in match.group(1) else "As of ") + " ".join(positional[:1])
    if name in SHOWS_LAST_ARGUMENT:
        return positional[-1] if positional else ""
    return HOLE if name in CANNOT_BE_SAID else ""


def expand_conversion(arguments):
    """`5|km|..` is "5 km", `5|-|6|km|..` is "5–6 km"."""
    if len(arguments) >= 4 and arguments[1] in {"-", "–", "to", "and", "x", "by", "or"}:
        joint = "–" if arguments[1] in "-–" else " {} ".format(arguments[1])
        return "{}{}{} {}".format(arguments[0], joint, arguments[2], arguments[3])
    return " ".join(arguments[:2]) if len(arguments) >= 2 else HOLE


def link_label(match):
    """The label of an innermost link; nothing for files, categories and other languages."""
    target, *rest = match.group(1).split("|")
    prefix = target.split(":", 1)[0].strip().lower() if ":" in target else ""
    if prefix in {"file", "image", "category"} or (re.fullmatch(r"[a-z]{2,3}", prefix) and not rest):
        return ""
    label = rest[-1] if rest else target.lstrip(":")
    return " ".join(label.split("\n"))


def until_stable(pattern, replacement, text):
    """Replaces innermost matches until none is left, so that nesting needs no parser."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def plain_text(wikitext):
    """Wiki markup to text, still one source line per line."""
    text = COMMENT.sub("", wikitext)
    text = EMPTY_REFERENCE.sub("", text)
    text = DROPPED_ELEMENT.sub("", text)
    text = FORMULA.sub(HOLE, text)
    text = until_stable(TEMPLATE, expand_template, text)
    text = until_stable(TABLE, "", text)
    text = until_stable(LINK, link_label, text)
    text = EXTERNAL_LINK.sub(lambda m: m.group(1) or "", text)
    text = BARE_URL.sub("", text)
    text = re.sub(r"<br\b[^<>]*>", " ", text, flags=re.I)
    text = TAG.sub("", text)
    return html.unescape(text)


def tidy(line):
    """Closes the gaps that removed markup left in a paragraph."""
    for pattern, replacement in TIDY:
        line = pattern.sub(replacement, line)
    return line.strip()


def paragraphs(wikitext):
    """The paragraphs of one article."""
    appendix_level = 0
    kept = []
    for line in plain_text(wikitext).split("\n"):
        heading = HEADING.match(line)
        if heading:
            level = len(heading.group(1))
            if appendix_level == 0 or level <= appendix_level:
                appendix_level = level if heading.group(2).lower() in APPENDICES else 0
            continue
        if appendix_level or HOLE in line or line[:1] in tuple("*#:;|!{}= "):
            continue
        line = tidy(line)
        if len(line) >= MIN_CHARACTERS and SENTENCE.fullmatch(line) and not UNBALANCED.search(line):
            kept.append(line)
    return kept


def articles(export_path):
    """Yields the wiki markup of each article of the export."""
    with bz2.open(export_path) as export:
        page = {}
        for _, element in ElementTree.iterparse(export):
            name = element.tag.rsplit("}", 1)[-1]
            if name == "page":
                if page.get("ns") == "0" and "redirect" not in page:
                    yield page.get("text") or ""
                page = {}
                element.clear()
            elif name in {"ns", "redirect", "text"}:
                page[name] = element.text


def extract(export_path):
    """Returns the calibration text and the held-out text of an export, as bytes."""
    texts = {"calibration": [], "held-out": []}
    bodies = filter(None, map(paragraphs, articles(export_path)))
    for number, body in enumerate(bodies, start=1):
        texts["calibration" if number % HELD_OUT_EVERY else "held-out"].extend(body)
    return tuple("".join(line + "\n" for line in lines).encode("utf-8") for lines in texts.values())
