"""Map: what a caller sees is what the function gives for the whole array, whoever computed it; errors name the rows."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shardwise as sw
from shardwise.errors import ArrayError, RunError

BACKENDS = ("threads", "processes")


def slow(block: Any) -> Any:
    """Doubles rows, and takes long enough for each to make helpers worth while."""
    time.sleep(0.02 * block.shape[0])
    return block * 2


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 10, 63, 64, 65, 1000, 300_001])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_functions_of_elements_work_as_they_are(rows: int, workers: int) -> None:
    array = np.linspace(0, 9, rows)
    assert np.array_equal(sw.map(np.sqrt, array, workers=workers), np.sqrt(array))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("fn", [np.exp, lambda b: np.sort(b, axis=-1) + 0.5, lambda b: b.astype(np.float32)])
def test_any_axis(axis: int, fn: Any) -> None:
    array = np.random.default_rng(0).random((40, 50, 60))
    if axis in (2, -1) and fn is not np.exp:
        array = np.sort(array, axis=-1)  # sorting along the mapped axis is no function of rows
    want = fn(array)
    found = sw.map(fn, array, axis=axis)
    assert found.dtype == want.dtype
    assert np.array_equal(found, want)


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a[::-1],
        lambda a: a[:, ::3],
        lambda a: a.T,
        np.asfortranarray,
        lambda a: np.broadcast_to(a[:1], a.shape),
        lambda a: a.astype(">f8"),
        lambda a: a > 0.5,
        lambda a: a.astype("complex64"),
    ],
)
def test_arrays_of_any_strides_and_dtypes(make: Any, backend: Any) -> None:
    array = make(np.random.default_rng(0).random((12, 12)))
    want = slow(array)
    found = sw.map(slow, array, workers=2, backend=backend)
    assert found.dtype == want.dtype
    assert np.array_equal(found, want)
    assert found.flags.c_contiguous or found.flags.f_contiguous


def test_read_only_input_is_read_and_stays_as_it_is() -> None:
    array = np.arange(300_000.0)
    array.flags.writeable = False
    assert np.array_equal(sw.map(np.negative, array), -array)


def test_fortran_order_is_kept() -> None:
    assert sw.map(np.sqrt, np.ones((300, 400), order="F")).flags.f_contiguous


def test_other_dims_and_the_dtype_may_change(backend: Any) -> None:
    array = np.arange(40.0).reshape(20, 2)

    def fn(block: Any) -> Any:
        time.sleep(0.02 * len(block))
        return np.stack([block.sum(1)] * 5, axis=1).astype(np.int16)

    found = sw.map(fn, array, workers=2, backend=backend)
    assert found.dtype == np.int16
    assert np.array_equal(found, np.stack([array.sum(1)] * 5, axis=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_tensors(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).view(4, 6).to(dtype)
    for axis in (0, 1, -1):
        found = sw.map(torch.clone, tensor, axis=axis)
        assert isinstance(found, torch.Tensor)
        assert found.dtype == dtype
        assert torch.equal(found, tensor)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tensors_in_processes(dtype: torch.dtype) -> None:
    parent = os.getpid()

    def fn(block: Any) -> Any:
        time.sleep(0.5 if os.getpid() == parent else 0.01)
        assert os.getpid() == parent or torch.get_num_threads() == 1
        return torch.stack([block.sum(1), torch.full((len(block),), float(os.getpid() != parent))], 1).double()

    tensor = torch.arange(64 * 3).view(64, 3).t().contiguous().t().to(dtype)
    found = sw.map(fn, tensor, workers=2, backend="processes")
    assert torch.equal(found[:, 0], tensor.sum(1).double())
    assert found[:, 1].sum() > 0, "the other process did nothing"


def test_a_function_may_turn_arrays_into_tensors() -> None:
    found = sw.map(torch.from_numpy, np.arange(6))
    assert torch.equal(found, torch.arange(6))


def test_results_that_are_the_block_itself_are_copied() -> None:
    array = np.arange(300_000)
    found = sw.map(lambda block: block, array)
    assert np.array_equal(found, array)
    assert not np.shares_memory(found, array)


def test_models_give_no_gradients() -> None:
    layer = torch.nn.Linear(3, 2)
    found = sw.map(layer, torch.ones(5, 3))
    assert not found.requires_grad
    assert torch.equal(found, layer(torch.ones(5, 3)).detach())


def test_numpys_error_state_holds_in_all_workers(backend: Any) -> None:
    def fn(block: Any) -> Any:
        time.sleep(0.03 * len(block))
        return 1 / block

    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        sw.map(fn, np.array([*[1.0] * 15, 0.0]), workers=2, backend=backend)
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isinf(sw.map(fn, np.zeros(16), workers=2, backend=backend)).all()


# --- in place ---------------------------------------------------------------------------------------------------------


def test_in_place(backend: Any) -> None:
    array = np.arange(40.0)
    want = slow(array)
    assert sw.map(slow, array, workers=2, backend=backend, out=array) is array
    assert np.array_equal(array, want)


def test_in_place_allocates_no_second_array() -> None:
    import tracemalloc

    array = np.random.default_rng(0).random(4_000_000)
    want = np.sqrt(array)
    tracemalloc.start()
    try:
        sw.map(np.sqrt, array, out=array)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(array, want)
    assert peak < array.nbytes / 4


def test_out_of_another_dtype_and_strides() -> None:
    out = np.zeros((30_000, 4), np.float32)[:, ::2]
    array = np.random.default_rng(0).random((30_000, 2))
    assert sw.map(np.sqrt, array, out=out) is out
    assert np.array_equal(out, np.sqrt(array).astype(np.float32))
    tensor = torch.zeros(5, dtype=torch.float64)
    assert sw.map(torch.sqrt, torch.ones(5), out=tensor) is tensor
    assert tensor.tolist() == [1.0] * 5


# --- workers ----------------------------------------------------------------------------------------------------------


def test_work_is_shared(backend: Any) -> None:
    def who(block: Any) -> Any:
        time.sleep(0.03 * len(block))
        return np.full((len(block), 2), [os.getpid(), threading.get_ident()])

    began = time.monotonic()
    found = sw.map(who, np.zeros(64), workers=4, backend=backend)
    seconds = time.monotonic() - began
    workers = {tuple(row) for row in found}
    assert len(workers) == 4
    assert len({process for process, _ in workers}) == (4 if backend == "processes" else 1)
    assert seconds < 0.75 * 64 * 0.03


def test_a_small_array_is_done_at_once_by_the_caller(backend: Any) -> None:
    threads: set[int] = set()

    def fn(block: Any) -> Any:
        threads.add(threading.get_ident())
        return block + 1

    alone = 0
    for _ in range(20):
        threads.clear()
        assert sw.map(fn, np.arange(100), backend=backend).tolist() == list(range(1, 101))
        alone += threads == {threading.get_ident()}
    assert alone > 10, "the time of a row may be that of other programs, but not often"


def test_every_row_is_computed_once() -> None:
    seen: list[int] = []

    def fn(block: Any) -> Any:
        seen.extend(block.tolist())
        time.sleep(0.002)
        return block

    for rows in (1, 5, 100, 999):
        seen.clear()
        sw.map(fn, np.arange(rows))
        assert sorted(seen) == list(range(rows))


def test_blocks_are_views() -> None:
    array = np.arange(100.0)
    sw.map(lambda block: pytest.fail("a copy") if not np.shares_memory(block, array) else block, array)


def test_torch_has_one_thread_in_each_worker_and_its_own_again_afterwards() -> None:
    before = torch.get_num_threads()
    threads: dict[int, int] = {}

    def fn(block: Any) -> Any:
        time.sleep(0.01 * len(block))
        threads[threading.get_ident()] = torch.get_num_threads()
        return block

    sw.map(fn, torch.zeros(32), workers=2)
    assert len(threads) == 2
    assert set(threads.values()) == {1}
    assert torch.get_num_threads() == before


# --- errors -----------------------------------------------------------------------------------------------------------


def fails_at(number: float) -> Any:
    def fn(block: Any) -> Any:
        time.sleep(0.02 * len(block))
        if number in block:
            raise KeyError(f"no {number}")
        return block

    return fn


@pytest.mark.parametrize("row", [0, 3, 30])
def test_what_the_function_raises_comes_with_its_rows(row: int, backend: Any) -> None:
    with pytest.raises(KeyError, match=f"no {row}") as caught:
        sw.map(fails_at(row), np.arange(32), workers=2, backend=backend)
    notes = " ".join(caught.value.__notes__)
    assert " of 32 along axis 0" in notes
    start, stop = (int(word) for word in notes.split("in rows ")[1].split(" of")[0].split(" to "))
    assert start <= row < stop


def test_an_error_of_another_process_has_its_traceback() -> None:
    parent = os.getpid()

    def fn(block: Any) -> Any:
        time.sleep(0.05 * len(block))
        if os.getpid() != parent:
            raise LookupError("over there")
        return block

    with pytest.raises(LookupError, match="over there") as caught:
        sw.map(fn, np.arange(64), workers=2, backend="processes")
    notes = " ".join(caught.value.__notes__)
    assert "in rows" in notes
    assert "in another process" in notes
    assert "test_map.py" in notes


def test_a_killed_process_is_one_message() -> None:
    parent = os.getpid()

    def fn(block: Any) -> Any:
        time.sleep(0.05 * len(block))
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return block

    with pytest.raises(RunError, match=r"killed by signal 9.* in rows \d+ to \d+ of 64"):
        sw.map(fn, np.arange(64), workers=2, backend="processes")


def test_what_cannot_be_sent_is_one_message() -> None:
    lock = threading.Lock()

    def fn(block: Any) -> Any:
        time.sleep(0.05 * len(block))
        with lock:
            return block

    with pytest.raises(ArrayError, match='open files and locks inside of it, or take backend="threads"'):
        sw.map(fn, np.arange(64), workers=2, backend="processes")


def overlapping() -> tuple[Any, Any]:
    whole = np.zeros(20)
    return whole[:10], whole[5:15]


def frozen(size: int) -> Any:
    array = np.zeros(size)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"array": [1, 2]}, "array must be a NumPy array or a tensor, but is a list; give numpy.asarray"),
        ({"array": np.float64(3)}, "must be a NumPy array"),
        ({"array": np.array(3.0)}, "axis must be one of the 0 axes"),
        ({"array": np.ma.masked_array([1.0])}, "masked array"),
        ({"axis": 1}, r"one of the 1 axes of an array of shape \(9,\), but is 1"),
        ({"axis": None}, "but is None"),
        ({"workers": 0}, "workers must be a whole number of at least 1, but is 0"),
        ({"workers": 2.0}, "but is 2.0"),
        ({"backend": "gpu"}, 'must be "threads" or "processes", but is \'gpu\''),
        ({"array": torch.ones(3, requires_grad=True)}, r"requires gradients, .* give array.detach\(\)"),
        ({"array": torch.ones(3, device="meta")}, "dense tensor in main memory, but is torch.strided on meta"),
        ({"array": torch.eye(3).to_sparse()}, "dense tensor in main memory, but is torch.sparse_coo"),
        ({"array": np.array([None, 1]), "backend": "processes"}, "Python objects"),
        ({"fn": lambda b: b.astype(object), "backend": "processes"}, "Python objects"),
        ({"fn": np.modf}, "returned a tuple for rows 0 to 1 of 9 along axis 0; put several results into one"),
        ({"fn": lambda b: {"a": b}}, "returned a dict"),
        ({"fn": lambda b: None}, "returned a NoneType"),
        ({"fn": lambda b: b.tolist()}, "returned a list"),
        ({"fn": np.sum}, "returned a float64"),
        ({"fn": lambda b: b[:0]}, r"as many rows as its block has, 1 along axis 0, but returned the shape \(0,\)"),
        ({"fn": lambda b: np.sum(b, keepdims=True)}, "as many rows as its block has"),
        (
            {"fn": lambda b: b[:, None] * b},
            r"array of float64 \(9, \d\) .* the results go to array of float64 \(9, 1\)",
        ),
        ({"out": np.zeros(8)}, r"float64 \(9,\) .* go to array of float64 \(8,\)"),
        ({"out": np.zeros(9, int)}, r"go to array of int64 \(9,\)"),
        ({"out": torch.zeros(9)}, "go to tensor of"),
        ({"out": frozen(9)}, "read-only"),
        ({"out": 3}, "out must be a NumPy array or a tensor, but is a int"),
        (dict(zip(("array", "out"), overlapping(), strict=True)), "overlaps the array without being the same"),
    ],
)
def test_mistakes_are_one_message(arguments: dict[str, Any], message: str) -> None:
    given = {"fn": np.sqrt, "array": np.ones(9), **arguments}
    with pytest.raises(ArrayError, match=message) as caught:
        sw.map(given.pop("fn"), given.pop("array"), **given)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


# --- nothing is left --------------------------------------------------------------------------------------------------

SCRIPT = """
    import os, sys, time
    import numpy as np
    import shardwise as sw

    place = sys.argv[1]

    def fn(block):
        open(f"{place}/{os.getpid()}", "w").close()
        time.sleep(0.5)
        return block

    sw.map(fn, np.zeros(1000), workers=3, backend="processes")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_its_caller(number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)], stderr=subprocess.PIPE)
    _wait(lambda: len(list(tmp_path.iterdir())) == 3)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in errors if number == signal.SIGINT else errors == b""
    _wait(lambda: not any(_lives(pid) for pid in workers))


def test_no_process_is_left_after_a_call_or_an_error() -> None:
    before = _children()  # ranks that other tests share
    for row in (-1, 40):
        try:
            sw.map(fails_at(row), np.arange(64), workers=3, backend="processes")
        except KeyError:
            assert row == 40
        assert _children() <= before
        assert not [thread.name for thread in threading.enumerate() if thread.name == "shardwise-map"]


def test_no_descriptor_is_left() -> None:
    before = len(os.listdir("/proc/self/fd"))
    sw.map(slow, np.arange(32.0), workers=3, backend="processes")
    assert len(os.listdir("/proc/self/fd")) == before


def _wait(what: Any, seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.02)


def _children() -> set[int]:
    """The processes, ended ones that nobody has asked for too, whose parent is this one."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int(entry.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(entry.parent.name))
    return found


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
