"""Whatever interrupts a save, the folder holds the former adapter or the new one, whole, and its other files."""

import errno
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import llama, logits, pretend_to_train

from allora_kernels import apply_allora, load_adapter, save_adapter
from allora_kernels.models import adapter_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Every way in which a save touches the disk.
STEPS = [
    (adapter_files, "save_file"), (tempfile, "mkdtemp"), (shutil, "copymode"), (os, "fsync"), (os, "replace"),
    (Path, "write_text"), (Path, "chmod"), (Path, "unlink"), (Path, "rmdir"),
]  # fmt: skip


def adapted(**arguments):
    model = llama(num_hidden_layers=1)
    apply_allora(model, target_modules=["q_proj"], **arguments)
    return pretend_to_train(model)


OLD, NEW = {"r": 3}, {"r": 2, "eta": 1.0}


def contents(folder):
    """Every file by its path in the folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def count_steps(patch, stop_before=None, how=None):
    """Count the steps of a save; before step number `stop_before`, call `how`."""
    taken = []

    def counted(real, name):
        def step(*args, **kwargs):
            if len(taken) == stop_before:
                taken.append("stopped")
                how()
            taken.append(name)
            return real(*args, **kwargs)

        return step

    for owner, name in STEPS:
        patch.setattr(owner, name, counted(getattr(owner, name), name))
    return taken


def raise_full():
    raise OSError(errno.ENOSPC, "no space left on device")


def raise_interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """What an old and a new adapter's files hold; and how many steps it takes to put one in the other's place."""
    files = {}
    for key, arguments in (("old", OLD), ("new", NEW)):
        save_adapter(adapted(**arguments), tmp_path / key)
        files[key] = contents(tmp_path / key)
    with monkeypatch.context() as patch:
        steps = count_steps(patch)
        save_adapter(adapted(**NEW), tmp_path / "old")
    return files["old"], files["new"], list(steps)


def check(folder, old, new, others):
    """Old or new for our loader, and never a mixture for a reader that knows the two files only; then saving works again."""
    found = contents(folder)
    assert {name: found.get(name) for name in others} == others
    direct = {name: found[name] for name in (CONFIG, WEIGHTS) if name in found}
    assert direct in (old, new) or WEIGHTS not in direct
    model = llama(num_hidden_layers=1)
    report = load_adapter(model, folder)
    (rank,) = {r for _, _, r in report.adapted.values()}
    assert torch.equal(logits(model), logits(adapted(**(OLD if rank == OLD["r"] else NEW))))
    save_adapter(adapted(**OLD), folder)
    assert contents(folder) == {**old, **others}
    return "old" if rank == OLD["r"] else "new"


def make_folder(path, old):
    others = {"README.md": b"mine", "sub/model.safetensors": b"base"}
    for name, text in {**old, **others}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(text)
    return path, others


@pytest.mark.parametrize("how", [raise_full, raise_interrupt])
def test_an_exception_at_any_step(how, pair, tmp_path, monkeypatch):
    old, new, steps = pair
    outcomes = []
    for k in range(len(steps)):
        folder, others = make_folder(tmp_path / f"{k}", old)
        with monkeypatch.context() as patch:
            count_steps(patch, k, how)
            with pytest.raises((OSError, KeyboardInterrupt)):
                save_adapter(adapted(**NEW), folder)
        if k <= steps.index("replace"):
            assert contents(folder) == {**old, **others}, "nothing has changed and nothing is left behind"
        outcomes.append(check(folder, old, new, others))
    assert len(steps) > 10
    commit = steps.index("replace") + 1
    assert outcomes == ["old"] * commit + ["new"] * (len(steps) - commit)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_process_killed_at_any_step(pair, tmp_path, monkeypatch):
    old, new, steps = pair
    model = adapted(**NEW)
    outcomes = []
    for k in range(len(steps)):
        folder, others = make_folder(tmp_path / f"{k}", old)
        child = os.fork()
        if child == 0:
            try:
                count_steps(monkeypatch, k, lambda: os._exit(9))
                save_adapter(model, folder)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        outcomes.append(check(folder, old, new, others))
    commit = steps.index("replace") + 1
    assert outcomes == ["old"] * commit + ["new"] * (len(steps) - commit)


def test_the_first_save_of_all_leaves_nothing_when_it_fails(tmp_path, monkeypatch):
    for k in range(6):
        with monkeypatch.context() as patch:
            count_steps(patch, k, raise_full)
            with pytest.raises(OSError, match="no space"):
                save_adapter(adapted(), tmp_path)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        load_adapter(llama(), tmp_path)


def test_a_disk_that_fills_up_in_the_middle_of_a_file(pair, tmp_path, monkeypatch):
    old, new, _ = pair

    def half_written(tensors, file, metadata):
        save_file(tensors, file, metadata)
        file.write_bytes(file.read_bytes()[:100])
        raise_full()

    folder, others = make_folder(tmp_path / "folder", old)
    with monkeypatch.context() as patch:
        patch.setattr(adapter_files, "save_file", half_written)
        with pytest.raises(OSError, match="no space"):
            save_adapter(adapted(**NEW), folder)
    assert contents(folder) == {**old, **others}
    assert check(folder, old, new, others) == "old"


def test_a_failed_move_after_the_save_is_made_up_for_by_reading_only(pair, tmp_path, monkeypatch):
    """A folder that cannot be written any more is loaded as it is."""
    old, _new, steps = pair
    folder, _ = make_folder(tmp_path / "folder", old)
    with monkeypatch.context() as patch:
        count_steps(patch, len(steps) - 2, raise_full)
        with pytest.raises(OSError, match="no space"):
            save_adapter(adapted(**NEW), folder)
    before = contents(folder)
    model = llama(num_hidden_layers=1)
    load_adapter(model, folder)
    assert torch.equal(logits(model), logits(adapted(**NEW)))
    assert contents(folder) == before


def test_files_are_on_disk_before_they_are_renamed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        steps = count_steps(patch)
        save_adapter(adapted(), tmp_path)
    order = [name for name in steps if name in ("fsync", "replace", "unlink")]
    save = ["fsync", "fsync", "fsync", "replace", "fsync"]
    assert order == [*save, "unlink", "fsync", "replace", "fsync", "replace", "fsync"]


def test_processes_that_save_into_one_folder_do_not_disturb_each_other(tmp_path):
    model = adapted()
    want = logits(model)
    errors = []

    def save():
        try:
            for _ in range(5):
                save_adapter(model, tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(contents(tmp_path)) == [CONFIG, WEIGHTS]
    fresh = llama(num_hidden_layers=1)
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), want)
