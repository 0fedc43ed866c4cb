import unittest

from check_licences import complaint, is_allowed


class Licences(unittest.TestCase):
    def test_expressions(self):
        for expression, expected in (
            ("MIT", True),
            ("GPL-3.0-only", False),
            ("MIT OR GPL-3.0-only", True),
            ("GPL-3.0-only OR MIT", True),
            ("MIT AND GPL-3.0-only", False),
            ("MIT/Apache-2.0", True),
            ("Apache-2.0 WITH LLVM-exception OR Apache-2.0 OR MIT", True),
            ("GPL-2.0-only WITH Classpath-exception-2.0", False),
            ("(MIT OR GPL-3.0-only) AND Unicode-3.0", True),
            # AND binds before OR.
            ("MIT OR Zlib AND GPL-3.0-only", True),
            ("(MIT OR Zlib) AND GPL-3.0-only", False),
        ):
            self.assertEqual(is_allowed(expression), expected, expression)

    def test_complaints_name_the_package(self):
        package = {"name": "crate", "version": "1.2.3", "license": "MIT"}
        self.assertIsNone(complaint(package))
        for licence in (None, "", "GPL-3.0-only", "MIT AND", "(MIT", "MIT MIT", "AND"):
            self.assertIn("crate 1.2.3", complaint(dict(package, license=licence)))


if __name__ == "__main__":
    unittest.main()
