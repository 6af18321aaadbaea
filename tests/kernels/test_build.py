"""How setup.py finds the compiler, names its targets and keeps objects apart, and what it says where there is no compiler."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "kernels").rglob("*.cu"))


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, without running a command."""
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    specification = importlib.util.spec_from_file_location("setup_of_linattn", ROOT / "setup.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_one_target_for_each_version(build):
    assert build.targets("sm_80 compute_80 sm_90a") == [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=[sm_90a]",
    ]  # fmt: skip


def test_code_for_all_cards_of_a_kind_is_made_of_the_oldest(build):
    assert build.targets("sm_80 compute_80 sm_90") == ["-gencode=arch=compute_80,code=[sm_80,compute_80,sm_90]"]


def test_a_source_may_name_its_targets(build, tmp_path):
    source = tmp_path / "x.cu"
    source.write_text("// architectures: sm_90a\nint x;\n")
    assert build.architectures_of(source) == "sm_90a"
    source.write_text("int x;\n")
    assert build.architectures_of(source) == build.ARCHITECTURES == "sm_80 compute_80 sm_90a"


@pytest.mark.parametrize("asked, made", [
    ("9.0", "sm_90a"), ("8.0", "sm_80"), ("8.0 9.0", "sm_80 sm_90a"), ("10.0", "sm_80 compute_80 sm_90a"), ("", "sm_80 compute_80 sm_90a"),
])  # fmt: skip
def test_some_cards_alone(build, tmp_path, monkeypatch, asked, made):
    monkeypatch.setenv("HF_LINATTN_CAPABILITIES", asked)
    source = tmp_path / "x.cu"
    source.write_text("int x;\n")
    assert build.architectures_of(source) == made
    source.write_text("// architectures: sm_80 compute_80 sm_90\n")
    assert build.architectures_of(source) == made.replace("90a", "90")


def test_an_object_depends_on_every_header_it_includes(build):
    text = build.text_with_headers(ROOT / "kernels" / "generic" / "scan.cu")
    assert b"__global__ void scan" in text and b"struct Rows" in text and b"linattn_problem;" in text


def test_the_table_of_instances_stands_for_a_source_each(build):
    made = build.instances()
    assert len(made) == 17 and made["stream_nv_bfloat16_80.cu"] == (
        '// architectures: sm_80 compute_80 sm_90\n#include "stream/launch.cuh"\n'
        "namespace linattn_stream {\nLINATTN_STREAM_INSTANTIATE(__nv_bfloat16, 80)\n}\n"
    )
    assert {path.name for path in build.all_sources()} == {path.name for path in SOURCES} | set(made)


def test_no_source_includes_torch():
    for path in (*SOURCES, *(ROOT / "kernels").rglob("*.cuh")):
        assert "torch/" not in path.read_text() and "ATen" not in path.read_text(), path.name


def functions(text):
    """The head of every function of a CUDA source, and its lines: braces behind parentheses, of no struct and within no other function."""
    text = re.sub(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:\\\n|[^\n])*', "", text, flags=re.MULTILINE)
    begin, opened = 0, []
    for mark in re.finditer(r"[{};]", text):
        if mark[0] == "{":
            head = text[begin : mark.start()].strip()
            inner = any(kind == "function" for kind, _, _ in opened)
            named = re.search(r"\b(namespace|struct|enum|union|extern)\b[^()]*$", head) or "(" not in head
            opened.append(("inner" if inner else "other" if named else "function", head, mark.start()))
        elif mark[0] == "}":
            kind, head, start = opened.pop()
            if kind == "function":
                yield head, head.count("\n") + text.count("\n", start, mark.start()) + 1
        begin = mark.end()
    assert not opened


def test_functions_of_the_kernels_are_steps():
    found = [pair for path in (ROOT / "kernels").rglob("*.[ch]*") for pair in functions(path.read_text())]
    assert sum("__global__" in head for head, _ in found) > 25 and sum("__forceinline__" in head for head, _ in found) > 200
    assert {head: lines for head, lines in found if lines > 150} == {}


def run_setup(tmp_path, **environment):
    """`setup.py build_kernels` on a machine where no nvcc can be found."""
    environment = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "NVCC": ""} | environment
    return subprocess.run([sys.executable, "setup.py", "-q", "build_kernels"], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_nvcc_the_build_says_so_loudly(tmp_path):
    done = run_setup(tmp_path)
    assert done.returncode == 0 and "nvcc, the CUDA compiler, was not found" in done.stderr and "pure Python" in done.stderr


def test_without_nvcc_a_required_library_is_an_error(tmp_path):
    done = run_setup(tmp_path, HF_LINATTN_REQUIRE_CUDA="1")
    assert done.returncode != 0 and "HF_LINATTN_REQUIRE_CUDA=1" in done.stderr
