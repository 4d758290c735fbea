"""Adapters saved while training goes on: the values of the call, whole folders or none, and no error is lost."""

import errno
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from several_adapters import IDS, RULES, alone, several
from test_interrupted_save import contents, count_steps
from tiny_models import llama, photograph

from allora_kernels import (
    adapter_parameters,
    adapter_rows,
    load_adapter,
    save_adapter,
    save_adapters_async,
)
from allora_kernels.models import adapter_files, async_saving

FILES = ["adapter_config.json", "adapter_model.safetensors"]


def folders(path):
    return {name: path / name for name in RULES}


@pytest.fixture
def gate(monkeypatch):
    """What writes waits until this is set."""
    opened = threading.Event()
    write = async_saving.write_adapter

    def waiting(*args):
        assert opened.wait(60)
        write(*args)

    monkeypatch.setattr(async_saving, "write_adapter", waiting)
    yield opened
    opened.set()


def test_the_files_are_those_of_save_adapter(tmp_path):
    model = several()
    with save_adapters_async(model, folders(tmp_path / "a"), base_model_name_or_path="base") as pending:
        pass
    assert pending.done
    for name in RULES:
        save_adapter(model, tmp_path / "b" / name, adapter=name, base_model_name_or_path="base")
        assert contents(tmp_path / "a" / name) == contents(tmp_path / "b" / name)
        assert sorted(contents(tmp_path / "a" / name)) == FILES


def test_what_happens_to_the_parameters_next_is_not_saved(tmp_path, gate):
    model = several()
    with torch.no_grad():
        want = {name: alone(model, name) for name in RULES}
    pending = save_adapters_async(model, folders(tmp_path))
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=1.0)
    with adapter_rows(model, ["wide", "plain", "default"]):
        model(input_ids=IDS[:3]).logits.square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.allclose(alone(model, "wide"), want["wide"], atol=1e-3)
    assert not pending.done and not any(tmp_path.iterdir())
    gate.set()
    pending.wait()
    for name in RULES:
        fresh = llama()
        load_adapter(fresh, tmp_path / name)
        with torch.no_grad():
            assert torch.equal(fresh(input_ids=IDS).logits, want[name])


def test_of_two_saves_into_one_folder_the_later_one_stays(tmp_path, monkeypatch):
    write, calls = async_saving.write_adapter, itertools.count()

    def slow_at_first(*args):
        if next(calls) == 0:
            time.sleep(1)
        write(*args)

    monkeypatch.setattr(async_saving, "write_adapter", slow_at_first)
    model = several()
    first = save_adapters_async(model, {"wide": tmp_path})
    with torch.no_grad():
        for p in adapter_parameters(model, "wide"):
            p.fill_(0.5)
    second = save_adapters_async(model, {"wide": tmp_path})
    for pending in (second, first):
        pending.wait()
    fresh = llama()
    load_adapter(fresh, tmp_path)
    assert all((p == 0.5).all() for p in adapter_parameters(fresh))


def test_an_error_is_raised_at_wait_and_the_other_folders_are_written(tmp_path, monkeypatch):
    write = adapter_files.save_file

    def full(tensors, file, metadata):
        if file.parts[-3] == "wide":
            raise OSError(errno.ENOSPC, "no space left on device")
        write(tensors, file, metadata)

    monkeypatch.setattr(adapter_files, "save_file", full)
    pending = save_adapters_async(several(), folders(tmp_path))
    for _ in range(2):
        with pytest.raises(OSError, match=r"adapter 'wide' was not saved into .*wide: .*no space left"):
            pending.wait()
    assert contents(tmp_path / "wide") == {}
    for name in ("default", "plain"):
        assert sorted(contents(tmp_path / name)) == FILES
    with pytest.raises(OSError, match="no space"), save_adapters_async(several(), folders(tmp_path)):
        pass


def script(body):
    tests = Path(__file__).parent
    code = f"import sys; sys.path.insert(0, {str(tests)!r})\n" + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tests.parent)


def test_python_ends_when_all_is_written_and_says_what_went_wrong(tmp_path):
    done = script(f"""
        import time
        from several_adapters import several
        from allora_kernels import save_adapters_async
        from allora_kernels.models import adapter_files
        write = adapter_files.save_file
        def slow(tensors, file, metadata):
            time.sleep(0.5)
            if "wide" in str(file):
                raise OSError("the disk is full")
            write(tensors, file, metadata)
        adapter_files.save_file = slow
        save_adapters_async(several(), {{"wide": {str(tmp_path / "wide")!r}, "plain": {str(tmp_path / "plain")!r}}})
    """)
    assert "adapter 'wide' was not saved" in done.stderr and "the disk is full" in done.stderr
    assert sorted(contents(tmp_path / "plain")) == FILES


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_process_killed_at_any_step_leaves_whole_folders_or_none(tmp_path, monkeypatch):
    model = several()
    with torch.no_grad():
        want = {name: alone(model, name) for name in RULES}
    with monkeypatch.context() as patch:
        steps = count_steps(patch)
        save_adapters_async(model, folders(tmp_path / "all")).wait()
    whole = []
    for k in range(0, len(steps), 3):
        child = os.fork()
        if child == 0:
            try:
                count_steps(monkeypatch, k, lambda: os._exit(9))
                save_adapters_async(model, folders(tmp_path / f"{k}")).wait()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        found = 0
        for name, folder in folders(tmp_path / f"{k}").items():
            fresh = llama()
            try:
                load_adapter(fresh, folder)
            except FileNotFoundError:
                continue
            with torch.no_grad():
                assert torch.equal(fresh(input_ids=IDS).logits, want[name])
            found += 1
        whole.append(found)
    assert whole == sorted(whole) and whole[0] == 0 and whole[-1] == 3


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda m, p: save_adapters_async(m, {"wde": p}), ValueError, "did you mean 'wide'"),
        (lambda m, p: save_adapters_async(m, {}), ValueError, "folders is empty"),
        (lambda m, p: save_adapters_async(m, p), TypeError, "must map adapters' names to folders"),
        (lambda m, p: save_adapters_async(m, {"wide": p, "plain": p / "."}), ValueError, "cannot both be saved"),
        (lambda m, p: save_adapters_async(llama(), {"wide": p}), ValueError, "no adapters"),
        (lambda m, p: save_adapters_async(m, {"plain": p / "new", "wide": __file__}), ValueError, "path must be a folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved_is_said_at_once_and_nothing_is_written(call, error, match, tmp_path):
    model = several()
    before = photograph(model)
    with pytest.raises(error, match=match):
        call(model, tmp_path)
    assert photograph(model) == before and not any(tmp_path.iterdir())
