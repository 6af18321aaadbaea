"""Slips in the kernels, seen by the emulator. Few: each rebuilds an object and a library, about a minute."""

from .mutant import KERNELS, named

MUTANTS = [
    *named(
        KERNELS,
        ("one new token that is padding counted", "kernels/decode.cu",
         "p.key_segments && p.key_segments[batch * p.key_segments_stride] <= 0;",
         "p.key_segments && p.key_segments[batch * p.key_segments_stride] < 0;",
         "kernels/test_emulated.py::test_one_token"),
        ("slots of a ring that hold no token looked at", "kernels/window/near.cuh", "min(seen + 1, int64_t{w.window})", "w.window",
         "kernels/test_emulated_window.py::test_one_token_of_a_window"),
        ("tokens counted before all have read how many there are", "kernels/window/leaving.cuh", "    if (heads.begins) {",
         "    if (heads.begins && thread == 0) ++w.seen[heads.batch];\n    if (heads.begins) {",
         "kernels/test_emulated_window.py::test_one_token_of_a_window"),
        ("weights of a tile before left as they were", "kernels/window/near.cuh", "sums[h] *= h < heads.count ? shared.shrink[h] : 0.f;",
         "{}",
         "kernels/test_emulated_window.py::test_one_token_of_a_window"),
        ("a state carried over the end of a run", "kernels/generic/scan.cu",
         "run_behind(segments, stop) != run_before(segments, start)) return 0.0f;",
         "run_behind(segments, stop) < run_before(segments, start)) return 0.0f;",
         "kernels/test_emulated.py::test_generic_states_end_with_their_run"),
        ("a row's last column in padding", "kernels/generic/slope.cu", "row_last[tid] = !u.real(n) ? 0.0f : REVERSE",
         "row_last[tid] = REVERSE",
         "kernels/test_emulated.py::test_generic"),
        ("a decay's running sum without the 32 tokens before", "kernels/tile/gates.cu", "    sum += before;\n    if (token < length",
         "    if (token < length",
         "kernels/test_emulated.py::test_what_multiplies_the_weights"),
        ("padding that costs as much in either degree", "kernels/padded.h", "p.degree == 1 ?", "p.degree ?",
         "kernels/test_emulated_padding.py::test_what_is_padded"),
        ("padded rows that must lie where the call's do", "kernels/padded.h", "  p.query = p.key = p.value = {};\n", "",
         "kernels/test_emulated_padding.py::test_layouts_give_the_same_bits"),
        ("a plan of padded rows launched with others", "kernels/plan.cu", "engine.engine == plan.engine && plan.padded_dim == 0",
         "engine.engine == plan.engine",
         "kernels/test_emulated_padding.py::test_a_plan_of_padded_rows_is_not_launched_with_others"),
    ),
]  # fmt: skip
