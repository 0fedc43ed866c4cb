import bz2
import os
import tempfile
import unittest

import wikipedia

SENTENCE = "The quick brown fox jumps over the lazy dog, and then it does so once more, to fill the line."


def page(text, namespace=0, redirect=False):
    return "<page><ns>{}</ns>{}<revision><text>{}</text></revision></page>".format(
        namespace, '<redirect title="Elsewhere" />' if redirect else "", text)


class PlainText(unittest.TestCase):
    def check(self, wikitext, expected):
        self.assertEqual(wikipedia.tidy(wikipedia.plain_text(wikitext)), expected)

    def test_links_show_their_label(self):
        self.check("[[Cat|Cats]] and [[dog]]s.", "Cats and dogs.")
        self.check("See [http://example.org the site] or [http://example.org].", "See the site or.")

    def test_files_and_categories_vanish_with_their_captions(self):
        self.check("A[[File:x.png|thumb|A [[cat]] in [[Rome|the city]]]]B[[Category:C]][[de:Katze]]", "AB")

    def test_templates_vanish_also_when_nested(self):
        self.check("A{{x|{{y|{{z}}}}|k={{w}}}} b", "A b")

    def test_templates_that_are_words_stay(self):
        self.check("{{convert|5|km|mi}}, {{convert|5|-|6|km|mi}}, {{convert|2|by|3|m}}", "5 km, 5–6 km, 2 by 3 m")
        self.check("{{nowrap|a ''b''}} {{transl|ar|salām}} {{as of|2014|lc=y}}", "a b salām as of 2014")

    def test_references_comments_tables_and_tags(self):
        self.check("A<ref name=x/>B<ref>{{cite|t}}</ref>C<!-- no -->D", "ABCD")
        self.check("A\n{| class=x\n| 1\n{|\n| 2\n|}\n|}\nB", "A B")
        self.check("H<sub>2</sub>O<br/>is&nbsp;wet &amp; '''cold'''", "H2O is wet & cold")

    def test_gaps_are_closed(self):
        self.check("Algeria ( , ; ), is ( ; born 1809) large .", "Algeria, is (born 1809) large.")

    def test_unclosed_markup_ends(self):
        self.check("{{" * 50 + "a", "{{" * 50 + "a")
        self.check("A [[b", "A [[b")


class Paragraphs(unittest.TestCase):
    def check(self, wikitext, expected):
        self.assertEqual(wikipedia.paragraphs(wikitext), expected)

    def test_keeps_prose_only(self):
        for other in ("* " + SENTENCE, ": " + SENTENCE, "== " + SENTENCE + " ==", "Short.", SENTENCE[:-1] + ":",
                      "and " + SENTENCE, SENTENCE + " <math>x</math>.", SENTENCE + " {{frac|1|2}}.", SENTENCE + "]]."):
            self.check(other + "\n" + SENTENCE, [SENTENCE])

    def test_appendices_end_at_a_heading_of_their_level(self):
        appendix = "==References==\n" + SENTENCE + "\n===Books===\n" + SENTENCE
        self.check(appendix, [])
        self.check(appendix + "\n==Legacy==\n" + SENTENCE, [SENTENCE])


class Extract(unittest.TestCase):
    def test_every_tenth_article_with_text_is_held_out(self):
        pages = [page(SENTENCE, redirect=True), page(SENTENCE, namespace=4), page("Empty.")]
        pages += [page("{} {}".format(n, SENTENCE)) for n in range(1, 21)]
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "export.bz2")
            with bz2.open(path, "wt") as export:
                export.write('<mediawiki xmlns="http://m">' + "".join(pages) + "</mediawiki>")
            calibration, held_out = wikipedia.extract(path)
        self.assertEqual(held_out.decode(), "10 {0}\n20 {0}\n".format(SENTENCE))
        self.assertEqual(len(calibration.splitlines()), 18)


if __name__ == "__main__":
    unittest.main()
