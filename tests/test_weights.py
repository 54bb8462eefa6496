"""Weights from safetensors files: what is read is what one device has, and no more; what does not fit is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shardwise.errors import WeightsError
from shardwise.job import Job
from shardwise.weights.files import PAGE, WeightFiles, runs
from shardwise.weights.save import save_weights
from tests.weights import Small, one_file, several_files, small_job, trained
from tests.zoo import ZOO

# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_the_reference_implementation_reads(tmp_path: Path) -> None:
    state = {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "number": torch.tensor(3.5, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "none": torch.empty(0, 4),
        "turned": torch.randn(4, 6).T,
    }
    save_weights(state, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name


def test_parts_are_those_that_indexing_gives(tmp_path: Path) -> None:
    """Also strided ones, of several dims, close to each other and far apart, in another dtype."""
    generator = torch.Generator().manual_seed(0)
    whole = {
        "cube": torch.randn(5, 7, 9, generator=generator),
        "wide": torch.randn(40, 5000, generator=generator),
        "flat": torch.randn(30000, generator=generator).half(),
    }
    save_file(whole, tmp_path / "x.safetensors")
    files = WeightFiles(tmp_path / "x.safetensors")

    def some(n: int, kind: int) -> Tensor:
        low = int(torch.randint(n, (), generator=generator))
        high = low + int(torch.randint(n - low + 1, (), generator=generator))
        scattered = (torch.rand(n, generator=generator) < 0.4).nonzero()[:, 0]
        return (torch.arange(n), torch.arange(low, high), scattered)[kind]

    for trial in range(120):
        for name, value in whole.items():
            kept = [some(n, (trial // 3**d) % 3) for d, n in enumerate(value.shape)]
            want = value
            for d, indices in enumerate(kept):
                want = want.index_select(d, indices)
            for dtype in (value.dtype, torch.float64):
                out = torch.full(want.shape, float("nan"), dtype=dtype)
                assert torch.equal(files.read(name, out, [runs(k) for k in kept]), want.to(dtype)), (name, kept)


def test_no_more_is_read_than_is_asked_for(tmp_path: Path) -> None:
    rows, columns = 64, 8 * PAGE
    save_file({"w": torch.randn(rows, columns), "other": torch.randn(rows, columns)}, tmp_path / "x.safetensors")
    for kept, most in (
        ([(0, 32)], 0),  # rows that lie together
        ([(4, 8), (40, 50)], 0),  # two stretches of rows
    ):
        files = WeightFiles(tmp_path / "x.safetensors")
        count = sum(b - a for a, b in kept)
        files.read("w", torch.empty(count, columns), [kept, [(0, columns)]])
        assert files.asked == 4 * count * columns and files.fetched == files.asked + most
    files = WeightFiles(tmp_path / "x.safetensors")
    files.read("w", torch.empty(rows, columns // 2), [[(0, rows)], [(columns // 2, columns)]])
    assert files.fetched == files.asked == 2 * rows * columns, "half of each row"
    files = WeightFiles(tmp_path / "x.safetensors")
    files.read("w", torch.empty(rows, columns - 10), [[(0, rows)], [(10, columns)]])
    assert files.asked < files.fetched == 4 * rows * columns, "what is shorter than a page is read with the rest"


# --- bad files --------------------------------------------------------------------------------------------------------


def told(job: Job) -> str:
    with pytest.raises(WeightsError) as caught:
        job.build()
    return str(caught.value)


def test_names_and_shapes_that_do_not_fit_are_one_message(tmp_path: Path) -> None:
    state = trained(small_job())
    state["body.0.weight"] = state["body.0.weight"].T.contiguous()
    state["body.0.bias"] = torch.arange(6)
    state["extra"] = state.pop("head.weight")
    save_file(state, tmp_path / "x.safetensors")
    message = told(small_job().with_(weights=tmp_path / "x.safetensors"))
    assert "does not fit Small: of 5 tensors in the model and 5 in the file" in message
    assert "1 missing (head.weight), 1 unexpected (extra), 2 of another shape or kind" in message
    assert "body.0.weight is [4, 6] for [6, 4], body.0.bias is torch.int64 for torch.float32" in message


def test_only_the_first_few_names_are_told(tmp_path: Path) -> None:
    save_file({f"layer.{i}": torch.zeros(1) for i in range(50)}, tmp_path / "x.safetensors")
    message = told(small_job().with_(weights=tmp_path / "x.safetensors"))
    assert "50 unexpected (layer.0, layer.1, layer.10, and 47 more)" in message and len(message) < 500


@pytest.mark.parametrize("has", [True, False])
def test_a_prefix_is_told_and_not_guessed(tmp_path: Path, has: bool) -> None:
    state = trained(small_job())
    names = {n: f"model.{n}" if has else n.removeprefix("body.") for n in state}
    if not has:
        small = small_job(lambda: Small().body)
        state = trained(small)
        names = {n: n for n in state}
        job = small_job(lambda: nn.Sequential(Small().body))
        names_of = lambda name: name.removeprefix("0.")  # noqa: E731
    else:
        state["left.over"] = torch.zeros(2)
        names["left.over"] = "left.over"
        job = small_job()
        names_of = lambda name: "model." + name  # noqa: E731
    save_file({names[n]: t for n, t in state.items()}, tmp_path / "x.safetensors")
    job = job.with_(weights=str(tmp_path / "x.safetensors"))
    want = "its names begin with 'model.'" if has else "its names lack '0.'"
    assert want in told(job) and "weights_names=lambda name:" in told(job)
    found = job.with_(weights_names=names_of).build().state_dict()
    back = {n: state[n if has else n.removeprefix("0.")] for n in found}
    assert all(torch.equal(found[n], back[n]) for n in found)


def test_a_file_that_is_cut_off_or_no_file_of_weights_is_one_message(tmp_path: Path) -> None:
    path = one_file(small_job(), tmp_path)
    whole = path.read_bytes()
    job = small_job().with_(weights=path)
    for broken, fact in (
        (whole[:-7], f"is cut off: it has {len(whole) - 7} bytes, but its header says {len(whole)}"),
        (whole[:40], "is cut off: its header has"),
        (whole[:5], "has 5 bytes, too few"),
        (whole + b"more", "has something behind its tensors"),
        (b"\xff" * len(whole), "is no safetensors file: its header would have"),
        (whole[:8] + b"[" + whole[9:], "is no safetensors file"),
        (whole.replace(b'"F32"', b'"F99"', 1), "has dtype F99, which is not supported"),
        (whole.replace(b"[6,4]", b"[6,5]", 1), "is said to have"),
        (whole.replace(b"[6,4]", b"[9,-]", 1), "is no safetensors file"),
    ):
        path.write_bytes(broken)
        message = told(job)
        assert fact in message and str(path) in message and len(message) < 400, message
    path.write_bytes(whole)
    job.build()


def test_pickles_and_missing_files_are_refused(tmp_path: Path) -> None:
    torch.save(trained(small_job()), tmp_path / "x.bin")
    assert "a .bin file is a pickle" in told(small_job().with_(weights=tmp_path / "x.bin"))
    assert "does not exist" in told(small_job().with_(weights=tmp_path / "y.safetensors"))
    (tmp_path / "empty").mkdir()
    assert "has no .safetensors file" in told(small_job().with_(weights=tmp_path / "empty"))
    (tmp_path / "two").mkdir()
    for name in "ab":
        save_file(trained(small_job()), tmp_path / "two" / f"{name}.safetensors")
    assert "2 files of weights and no index (a.safetensors, b.safetensors)" in told(
        small_job().with_(weights=tmp_path / "two")
    )


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "..", "sub/x.safetensors", "x.bin"])
def test_an_index_names_only_files_beside_it(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    one_file(small_job(), tmp_path).rename(tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"head.weight": name}}))
    assert "may only name .safetensors files beside it" in told(small_job().with_(weights=folder))


def test_a_link_out_of_the_folder_is_refused_but_not_one_into_the_blobs_of_a_cache(tmp_path: Path) -> None:
    out = tmp_path / "folder"
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1f", tmp_path / "models--x" / "blobs"
    for folder in (out, snapshot, blobs):
        folder.mkdir(parents=True)
    blob = one_file(small_job(), blobs).rename(blobs / "77ab")
    for folder in (out, snapshot):
        (folder / "model.safetensors").symlink_to(blob)
    assert "is a link to" in told(small_job().with_(weights=out))
    found = small_job().with_(weights=snapshot).build().state_dict()
    assert all(torch.equal(found[name], value) for name, value in trained(small_job()).items())


def test_an_index_that_is_of_another_version_is_told(tmp_path: Path) -> None:
    folder = several_files(small_job(), tmp_path)
    index = folder / "model.safetensors.index.json"
    read = json.loads(index.read_text())
    read["weight_map"]["body.0.bias"] = read["weight_map"]["body.0.weight"]
    index.write_text(json.dumps(read))
    assert "has body.0.bias, but it has not" in told(small_job().with_(weights=folder))
    index.write_text("{")
    assert "is not JSON" in told(small_job().with_(weights=folder))
    read["weight_map"] = {"body.0.bias": "model-9.safetensors"}
    index.write_text(json.dumps(read))
    assert "names model-9.safetensors, which is not in" in told(small_job().with_(weights=folder))


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    path = one_file(small_job(), tmp_path)
    _, weights = small_job().with_(weights=path).bare()
    assert weights is not None
    save_weights(trained(small_job()), path)
    with pytest.raises(WeightsError, match="was changed while it was read"):
        weights.read("head.weight")


def test_tied_weights_that_the_file_has_twice_must_agree(tmp_path: Path) -> None:
    job = ZOO["tied_lm"]()
    module = job.build()
    (copy, first), *_ = _tied(module)
    state = trained(job)
    state[copy] = state[first].clone()
    save_file(state, tmp_path / "x.safetensors")
    job.with_(weights=tmp_path / "x.safetensors").build()
    state[copy][0] += 1
    save_file(state, tmp_path / "x.safetensors")
    assert "two different values" in told(job.with_(weights=tmp_path / "x.safetensors"))


def _tied(module: nn.Module) -> list[tuple[str, str]]:
    first: dict[int, str] = {}
    found = []
    for name, param in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(param), name) != name:
            found.append((name, first[id(param)]))
    return found


# --- one device -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tied_lm", "convnet_bn", "lstm_tagger", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("files", [one_file, several_files])
def test_build_gives_the_weights_of_the_files(name: str, files: Callable[[Job, Path], Path], tmp_path: Path) -> None:
    job = ZOO[name]()
    plain = job.build()
    module = job.with_(weights=files(job, tmp_path)).build()
    want = trained(job)
    kept = module.state_dict()
    assert [n for n, v in want.items() if not torch.equal(kept[n], v)] == []
    assert _tied(module) == _tied(plain), "what was tied is tied"
    others = {n: b for n, b in module.named_buffers() if n not in kept}
    assert [n for n, b in plain.named_buffers() if n in others and not torch.equal(others[n], b)] == []
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in plain.parameters()]
    batch = job.batch(range(2))
    assert batch is not None and not any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def test_numbers_are_converted_to_the_module_s(tmp_path: Path) -> None:
    state = {n: t.to(torch.bfloat16) for n, t in trained(small_job()).items()}
    save_file(state, tmp_path / "x.safetensors")
    found = small_job().with_(weights=tmp_path / "x.safetensors").build().state_dict()
    assert all(found[n].dtype == torch.float32 and torch.equal(found[n], t.float()) for n, t in state.items())


class Derived(Small):
    """Has what no file has and is made of parameters, drawn, or just made."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        value = {
            "made of parameters": lambda: self.head.weight.detach().sum(0),
            "needs numbers": lambda: torch.full((4,), float(self.head.weight.detach().sum())),
            "drawn": lambda: torch.randn(4),
            "made": lambda: torch.arange(4.0),
        }[kind]()
        self.register_buffer("scale", value, persistent=False)
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize("kind", ["made of parameters", "needs numbers", "drawn", "made"])
def test_what_the_file_has_not_is_as_without_it(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where that needs the whole module, it is built whole, and the log says why."""
    job = small_job(lambda: Derived(kind))
    path = one_file(small_job(), tmp_path)
    with caplog.at_level(logging.WARNING):
        module = job.with_(weights=path).build()
    assert torch.equal(module.get_buffer("scale"), job.build().get_buffer("scale"))
    assert [n for n, t in trained(small_job()).items() if not torch.equal(module.state_dict()[n], t)] == []
    assert ("is built whole before its weights are read, because" in caplog.text) == (kind != "made")


def test_a_buffer_that_is_no_longer_saved_may_be_in_the_file(tmp_path: Path) -> None:
    job = small_job(lambda: Derived("made"))
    state = trained(small_job())
    save_file({**state, "scale": torch.zeros(4)}, tmp_path / "x.safetensors")
    module = job.with_(weights=tmp_path / "x.safetensors").build()
    assert torch.equal(module.get_buffer("scale"), torch.arange(4.0)), "the module's own"
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())
