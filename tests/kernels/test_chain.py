"""Which place in a chain a launch has."""

import threading

import pytest
import torch

from csrc_triton import launching
from csrc_triton.chain import chained, next_place
from csrc_triton.combine import combine, combine_pair


def test_the_first_and_its_links():
    assert next_place() == ""
    with chained(True):
        assert [next_place() for _ in range(3)] == ["first", "link", "link"]
        with chained(True):
            assert [next_place() for _ in range(2)] == ["first", "link"]
        with chained(False):
            assert next_place() == ""
        assert next_place() == "link"
    assert next_place() == ""


def test_a_chain_of_given_places_has_no_others():
    with chained(True, "open", "late"):
        assert [next_place() for _ in range(3)] == ["first", "open", "late"]
        with pytest.raises(StopIteration):
            next_place()
    assert next_place() == ""


def test_a_chain_ends_with_an_error_and_is_one_threads():
    with pytest.raises(ZeroDivisionError), chained(True):
        found = []
        thread = threading.Thread(target=lambda: found.append(next_place()))
        thread.start()
        thread.join()
        assert found == [""]
        next_place()
        _ = 1 / 0
    assert next_place() == ""


def test_launches_outside_of_a_chain_have_no_place(monkeypatch):
    seen = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launching.watch, "watcher", lambda *launch: seen.append(launch[3]))
    combine(torch.ones(3, 40), torch.float32)
    combine_pair(torch.ones(3, 40), torch.ones(3, 8), (torch.float32,) * 2)
    assert [options["CHAIN"] for options in seen] == ["", ""]
    assert not any("launch_pdl" in options for options in seen)
