"""utils/compile_native.py: compiled once, again after any change, and by several processes at the same time."""

import logging
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from utils import compile_native
from utils.compile_native import CannotBuild, NativeLibrary

needs_compiler = pytest.mark.skipif(not (shutil.which("cc") and shutil.which("c++")), reason="no compiler here")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty cache folder, and no libraries loaded by earlier tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compile_native._load.cache_clear()
    yield tmp_path / "cache" / "swin"
    compile_native._load.cache_clear()


def library(folder: Path, language: str = "c") -> NativeLibrary:
    return NativeLibrary("a library under test", folder, language, ("-O1",))


def source(folder: Path, text: str, name: str = "one.c") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder


@needs_compiler
@pytest.mark.parametrize(("language", "name"), [("c", "one.c"), ("c++", "one.cpp")])
def test_compiles_once_and_again_for_other_sources(cache, tmp_path, caplog, language, name):
    linkage = 'extern "C" ' if language == "c++" else ""
    folder = source(tmp_path / "part", f"{linkage}int one(void) {{ return 1; }}", name)
    with caplog.at_level(logging.INFO):
        assert library(folder, language).load().one() == 1
        compile_native._load.cache_clear()  # as in another process
        assert library(folder, language).load().one() == 1
    assert len(caplog.records) == 1 and "a library under test" in caplog.text
    source(folder, f"{linkage}int one(void) {{ return 2; }}", name)
    compile_native._load.cache_clear()
    assert library(folder, language).load().one() == 2
    assert [path.suffix for path in cache.iterdir()] == [".so", ".so"]


@needs_compiler
def test_an_error_in_the_source_is_reported_and_leaves_no_file(cache, tmp_path):
    broken = library(source(tmp_path / "part", "int one(void) { return"))
    for _ in range(2):
        with pytest.raises(CannotBuild, match="fails: .*one.c.*error"):
            broken.load()
    assert not any(cache.iterdir())


@pytest.mark.parametrize(("compiler", "reason"), [("false", "false fails: exit code 1"), (None, "no compiler for C")])
def test_a_missing_or_failing_compiler_is_reported(cache, tmp_path, monkeypatch, compiler, reason):
    if compiler is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CC", compiler)
    with pytest.raises(CannotBuild, match=reason):
        library(source(tmp_path / "part", "int one(void) { return 1; }")).load()


def test_a_user_without_a_home_is_reported(cache, tmp_path, homeless):
    with pytest.raises(CannotBuild, match="no home folder.* set XDG_CACHE_HOME"):
        library(source(tmp_path / "part", "int one(void) { return 1; }")).load()


@needs_compiler
def test_a_read_only_cache_is_reported(cache, tmp_path):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with pytest.raises(CannotBuild, match="cache/swin.*cannot be written"):
        library(source(tmp_path / "part", "int one(void) { return 1; }")).load()


@needs_compiler
def test_several_processes_compile_at_the_same_time(cache, tmp_path):
    folder = source(tmp_path / "part", "int one(void) { return 1; }")
    program = f"""
from pathlib import Path
from utils.compile_native import NativeLibrary
assert NativeLibrary("a part", Path({str(folder)!r}), "c", ()).load().one() == 1
"""
    environment = {"XDG_CACHE_HOME": str(cache.parent), "PATH": os.environ["PATH"], "PYTHONPATH": "."}
    started = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_a_failed_build_keeps_no_objects_of_its_callers_alive(cache, tmp_path, monkeypatch):
    """A kept traceback once held an iterator, whose loader workers then hung the end of a stopped run."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    part = library(source(tmp_path / "part", ""))
    local = set()

    def call(local: set) -> None:
        with pytest.raises(CannotBuild):
            part.load()

    reference = weakref.ref(local)
    for _ in range(2):
        call(local)
    del local
    assert reference() is None


def compiler_that_refuses(folder: Path, *flags: str) -> Path:
    """A compiler that is the system's, except that it fails with one of `flags`, and writes down all its arguments."""
    script = folder / "picky"
    cases = "".join(f'  *" {flag} "*) echo "picky: error: {flag} is not supported" >&2; exit 1;;\n' for flag in flags)
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\ncase " $* " in\n{cases}esac\nexec cc "$@"\n')
    script.chmod(0o755)
    return script


@needs_compiler
@pytest.mark.parametrize(
    ("flags", "attempts"),
    [(["-march=native"], 2), (["-march=native", "-D_FORTIFY_SOURCE=2"], 3), (["-fstack-protector-strong"], 3)],
)
def test_a_compiler_that_refuses_flags_is_asked_again_without(cache, tmp_path, monkeypatch, flags, attempts):
    monkeypatch.setenv("CC", str(compiler_that_refuses(tmp_path, *flags)))
    part = library(source(tmp_path / "part", "int one(void) { return 1; }"))
    assert part.load().one() == 1
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2 + attempts and not any(flag in calls[-1] for flag in flags)  # after two of --version
    compile_native._load.cache_clear()
    part.load()
    assert len((tmp_path / "calls").read_text().splitlines()) == len(calls) + 1  # --version: it is cached


@needs_compiler
def test_if_one_compiler_fails_the_next_one_is_tried(cache, tmp_path, monkeypatch):
    """Such as clang without the headers or libraries that GCC has."""
    monkeypatch.delenv("CC", raising=False)
    broken = tmp_path / "clang"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exec echo clang version 1\necho "no headers" >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert compile_native._compilers("c")[0] == str(broken)
    assert library(source(tmp_path / "part", "int one(void) { return 1; }")).load().one() == 1


@needs_compiler
def test_an_access_beyond_an_array_ends_the_process(cache, tmp_path):
    folder = source(tmp_path / "part", "static int a[4]; int get(int i) { return a[i]; }")
    program = f"""
from pathlib import Path
from utils.compile_native import NativeLibrary
library = NativeLibrary("a part", Path({str(folder)!r}), "c", ("-O2",)).load()
assert library.get(3) == 0
library.get(4)
"""
    environment = {"XDG_CACHE_HOME": str(cache.parent), "PATH": os.environ["PATH"], "PYTHONPATH": "."}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode < 0


@pytest.mark.skipif(not (shutil.which("clang") and shutil.which("clang++")), reason="no clang here")
@pytest.mark.parametrize(("language", "name"), [("c", "one.c"), ("c++", "one.cpp")])
def test_clang_takes_the_flags(cache, tmp_path, monkeypatch, language, name):
    monkeypatch.setenv("CC", "clang")
    monkeypatch.setenv("CXX", "clang++")
    linkage = 'extern "C" ' if language == "c++" else ""
    part = library(source(tmp_path / "part", f"{linkage}int one(void) {{ return 1; }}", name), language)
    command = part._commands("clang")[0]
    compile_native._run([*command, str(part.folder / name), "-o", os.devnull])
    assert part.load().one() == 1
