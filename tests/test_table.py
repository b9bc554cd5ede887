"""The one table of names, and the names that the package offers."""

import importlib
import pkgutil
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import lorank
from lorank import renamed
from lorank.table import METHODS, find, method_names, names_joined


def test_the_package_offers_what_it_lists_and_nothing_else() -> None:
    for name in lorank.__all__:
        assert getattr(lorank, name) is not None
        assert name in dir(lorank)
    with pytest.raises(AttributeError, match="module 'lorank' has no attribute 'colla'"):
        lorank.colla  # noqa: B018


def test_every_method_of_the_table_is_found_under_its_own_name() -> None:
    assert set(METHODS) <= set(method_names())
    for name in METHODS:
        method = find(name)
        assert method.name == name
        assert method().name == name  # every hyper-parameter has a default


def test_an_unknown_method_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(
        ValueError, match=r"unknown method 'lowrank'; did you mean 'low-rank'\? The methods are: .*dense, cola, cola-m"
    ):
        find("lowrank")
    with pytest.raises(ValueError, match=r"^unknown method 'zzz'\. The methods are: .*dense, cola"):
        find("zzz")


def test_methods_of_other_packages_join_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorank.table._registered", {})
    points = [
        EntryPoint("theirs", "lorank.methods.low_rank:LowRank", "lorank.methods"),
        EntryPoint("cola", "lorank.methods.low_rank:LowRank", "lorank.methods"),  # must not displace ours
    ]
    monkeypatch.setattr("lorank.table._entry_points", lambda: points)
    assert method_names() == [*METHODS, "theirs"]
    assert find("theirs") is lorank.LowRank
    assert find("cola") is lorank.CoLA


@pytest.mark.parametrize("text", ["cola+", "+", "", "cola++galore", "cola+cola"])
def test_joined_names_must_be_names_and_differ(text: str) -> None:
    assert names_joined("cola+galore") == ["cola", "galore"]
    with pytest.raises(ValueError, match=f"a method must be a name, .* got '{re.escape(text)}'"):
        names_joined(text)


@pytest.mark.parametrize(("old", "now"), {**renamed.MODULES, **renamed.NAMES}.items())
def test_a_name_of_version_0_1_says_where_it_is(old: str, now: str) -> None:
    module, _, name = old.rpartition(".")
    with pytest.raises(ImportError, match=re.escape(f"{old} is {now} since version 0.2")):
        if old in renamed.MODULES:
            importlib.import_module(old)
        getattr(importlib.import_module(module), name)
    if "(" not in now:
        assert pkgutil.resolve_name(now) is not None


def test_the_page_on_loops_names_all_that_acts_between_steps() -> None:
    page = (Path(__file__).parents[1] / "docs/own-loop.md").read_text()
    rows = " ".join(re.findall(r"^\| (`.+`) \|", page, re.M))
    assert sorted(re.findall("`([^`]+)`", rows)) == sorted(name for name in METHODS if "hook" in find(name).answers())
