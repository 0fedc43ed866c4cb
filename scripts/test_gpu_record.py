import io
import json
import os
import tempfile
import unittest

from gpu_record import (PARTS, Machine, begun, events, forget, is_good, model_checks, replaced, sanitizer_errors,
                        test_results, text_of, write)


class GpuRecordTest(unittest.TestCase):
    def test_only_objects_are_events(self):
        self.assertEqual(list(events('{"us": 1}\n[1]\n3\nnot JSON\n')), [{"us": 1}])

    def test_results_of_tests(self):
        output = '{"type": "test", "event": "started", "name": "a"}\n' \
                 '{"type": "test", "event": "ok", "name": "a"}\n{"type": "test", "event": "ignored", "name": "b"}\n'
        passed, skipped = {"name": "a", "result": "passed"}, {"name": "b", "result": "skipped"}
        self.assertEqual(test_results(0, output), [passed, skipped])
        self.assertEqual(test_results(101, '{"type": "test", "event": "ok", "name": "a"}\n')[-1]["result"], "failed")

    def test_checks_of_a_model(self):
        def output(verdict):
            check = {"name": "dense: Spearman", "dtype": "f16", "verdict": verdict}
            return "a warning\n" + json.dumps({"failed": 0, "checks": [check]}, indent=2) + "\nerror: above\n"

        passed = {"name": "model: dense: Spearman, f16", "result": "passed"}
        self.assertEqual(model_checks(0, output("passed")), [passed])
        self.assertEqual(model_checks(1, output("failed")), [{**passed, "result": "failed"}])
        whole = {"name": "model: check as a whole", "result": "failed"}
        self.assertEqual(model_checks(1, output("passed")), [passed, whole])
        self.assertEqual(model_checks(1, "error: no GPU can be used\n"), [whole])

    def test_sanitizer_summaries(self):
        self.assertEqual(sanitizer_errors(0, "x\n========= ERROR SUMMARY: 0 errors\n"), 0)
        self.assertEqual(sanitizer_errors(1, "========= ERROR SUMMARY: 2 errors\n"), 2)
        self.assertEqual(sanitizer_errors(0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)"), 0)
        # A test failed beneath it.
        self.assertEqual(sanitizer_errors(1, "========= ERROR SUMMARY: 0 errors\n"), 1)
        self.assertIsNone(sanitizer_errors(124, "========= ERROR SUMMARY: 0 errors\n"))
        self.assertIsNone(sanitizer_errors(0, "no summary"))

    def test_a_record_has_a_line_for_each_row(self):
        record = {"device": "a \"GPU\"", "tests": [], "sanitizers": {"memcheck": 0}, "bench": [{"us": 1.5}, {"us": 2}]}
        text = text_of(record)
        self.assertEqual(json.loads(text), record)
        self.assertIn('\n  {"us": 1.5},\n  {"us": 2}\n', text)

    def test_a_record_goes_on_where_it_is_of_the_same_code(self):
        identity = {"device": "a GPU", "driver": "1", "toolkit": "13", "digest": "ab"}
        record = {"date": "today", **identity, "tests": [], "sanitizers": {"memcheck": 0}, "bench": [], "model_bench": []}
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "record.json")
            self.assertEqual(begun(path, identity)["sanitizers"], {})
            with open(path, "w", encoding="utf-8") as file:
                file.write(text_of(record))
            self.assertEqual(begun(path, identity), record)
            with self.assertRaisesRegex(SystemExit, "expected the digest 'cd' of this run, got 'ab'"):
                begun(path, {**identity, "digest": "cd"})
            with open(path, "w", encoding="utf-8") as file:
                file.write("[]")
            with self.assertRaisesRegex(SystemExit, "is no record"):
                begun(path, identity)

    def test_results_take_the_place_of_older_ones(self):
        old, other = {"name": "bench few", "result": "failed"}, {"name": "a", "result": "passed"}
        self.assertEqual(replaced([old, other], {"bench few"}, []), [other])
        self.assertEqual(replaced([other], {"bench few"}, [old]), [other, old])

    def test_what_has_not_ended_counts_as_failed(self):
        passed = {"name": "a", "result": "passed"}
        done = {"tests": [passed], "sanitizers": {"memcheck": 0}, "bench": [{"us": 1}], "model_bench": [{"us": 2}]}
        self.assertTrue(is_good(done))
        for part in PARTS:
            record = json.loads(json.dumps(done))
            forget(record, [part])
            self.assertFalse(is_good(record), part)
        record = json.loads(json.dumps(done))
        forget(record, ["synccheck"])
        self.assertEqual(record["sanitizers"], {"memcheck": 0, "synccheck": None})
        record = json.loads(json.dumps(done))
        forget(record, ["bench"])
        self.assertEqual((record["bench"], record["model_bench"]), ([], [{"us": 2}]))
        self.assertIn(passed, record["tests"])
        self.assertIn({"name": "bench many", "result": "failed"}, record["tests"])
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "record.json")
            write(path, done)
            write(path, record)
            self.assertEqual(os.listdir(folder), ["record.json"])
            with open(path, encoding="utf-8") as file:
                self.assertEqual(json.load(file), record)

    def test_time_limits(self):
        log = io.StringIO()
        machine = Machine(log, 100)
        self.assertEqual(machine.run(["sh", "-c", "echo a; sleep 60; echo b"], 0.5), (124, "a\n\nout of time\n"))
        self.assertEqual(machine.run(["sh", "-c", "echo $X; exit 3"], 10, X="b"), (3, "b\n"))
        self.assertEqual(Machine(log, 0).run(["true"], 10)[0], 124)
        self.assertIn("sh -c echo $X; exit 3: exit code 3", log.getvalue())

    def test_what_is_good(self):
        passed = {"name": "a", "result": "passed"}
        self.assertTrue(is_good({"tests": [passed], "sanitizers": {"memcheck": 0}}))
        self.assertFalse(is_good({"tests": [{"name": "a", "result": "skipped"}], "sanitizers": {}}))
        self.assertFalse(is_good({"tests": [passed], "sanitizers": {"memcheck": None}}))


if __name__ == "__main__":
    unittest.main()
