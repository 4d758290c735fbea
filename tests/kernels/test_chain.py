"""Which place in a chain a launch has."""

import threading
from unittest import mock

import pytest
import torch

from csrc_triton import chain, launching
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


@pytest.mark.parametrize("captured", [False, True])
def test_counts_are_made_by_a_thread_of_its_own_and_not_for_a_graph(captured, monkeypatch):
    """What this thread allocates may be that of a CUDA graph's pool, before it is captured, too."""
    makers, zeros = [], torch.zeros

    def noted(*size, device, **options):
        makers.append(threading.get_ident())
        return zeros(*size, **options)

    monkeypatch.setattr(chain, "_counts", {})
    monkeypatch.setattr(torch, "zeros", noted)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.Mock())
    device = torch.device("cuda", 0)
    made = [chain.counts(device) for _ in range(2)]
    if captured:
        assert made == [None, None] and not makers
    else:
        assert made[0] is made[1] and chain.lives_on(made[0]) and not made[0].any()
        assert len(makers) == 1 and makers[0] != threading.get_ident()
