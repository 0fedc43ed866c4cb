import unittest

import check_kernels

LOG = """\
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 48 registers, used 0 barriers
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 56 registers, used 0 barriers
"""

PTX = """\
.visible .entry waits(
\t.param .align 8 .b8 waits_param_0[64]
)
.maxntid 256
{
\t.reg .b32 \t%r<5>;
\t{
\tgriddepcontrol.wait;
\t}
\tgriddepcontrol.launch_dependents;
\tret;
}
.visible .entry is_eager(
\t.param .u64 is_eager_param_0
)
{
\tgriddepcontrol.launch_dependents;
\tgriddepcontrol.wait;
\tret;
}
.func helper()
{
\tgriddepcontrol.wait;
}
.visible .entry goes_on(
\t.param .u64 goes_on_param_0
)
{
\tret;

}
"""


class CheckKernels(unittest.TestCase):
    def test_reads_the_log_of_ptxas(self):
        found = check_kernels.parse(LOG)
        self.assertEqual(found, {("one", "sm_80"): (12, 48), ("one", "sm_90a"): (0, 56)})

    def test_complains_about_new_and_about_old_ones(self):
        found = check_kernels.parse(LOG)
        self.assertEqual(check_kernels.complaints(found, {}), ["one spills 12 bytes on sm_80"])
        self.assertEqual(check_kernels.complaints(found, {("one", "sm_80"): "why"}), [])
        old = check_kernels.complaints(found, {("one", "sm_80"): "why", ("one", "sm_90a"): "why"})
        self.assertEqual(old, ["one does not spill on sm_90a any more: take it off the list"])

    def test_finds_kernels_that_wait(self):
        self.assertEqual(check_kernels.waiting(PTX), {"waits", "is_eager"})

    def test_finds_kernels_that_let_others_begin_first(self):
        self.assertEqual(check_kernels.eager(PTX), {"is_eager"})
