"""utils/paths.py: the home folder in paths, and users without one."""

import os
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.paths import expand_user, user_cache_dir


def test_expand_user_replaces_a_leading_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_user("~/runs", "OUTPUT") == "/home/me/runs"
    assert expand_user("~root/x", "OUTPUT") == os.path.expanduser("~root") + "/x"
    for text in ("", "runs", "a/~", "./~", "https://a.org/~me/w.pth"):
        assert expand_user(text, "OUTPUT") == text


@pytest.mark.parametrize("name", ["nosuchuser", "a\0b"])
def test_expand_user_names_the_key_of_an_unknown_user(name):
    with pytest.raises(UserError, match="^OUTPUT .*: there is no user .*Give the path in full"):
        expand_user(f"~{name}/x", "OUTPUT")


def test_expand_user_of_a_user_without_a_home(homeless):
    with pytest.raises(UserError, match="^OUTPUT ~/x: the present user has no home folder, and HOME is not set"):
        expand_user("~/x", "OUTPUT")


def test_user_cache_dir(homeless, monkeypatch):
    assert user_cache_dir() is None
    monkeypatch.setenv("HOME", "/home/me")
    assert user_cache_dir() == Path("/home/me/.cache/swin")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert user_cache_dir() == Path("/scratch/swin")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    assert user_cache_dir() == Path("/home/me/cache/swin")
