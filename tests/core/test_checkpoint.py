"""Reading, writing and loading weights: strictness, safety, determinism, and where names lead."""

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tenfold.core import checkpoint
from tenfold.core.config import ModelEntry
from tenfold.core.console import UserError


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        checkpoint.load_file(path)
    assert path.name in str(error.value)
    return one_line(error)


# --- round trips -----------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


@given(
    shapes=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=4,
    ),
    metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=4),
)
@settings(deadline=None, max_examples=40)
def test_what_is_saved_is_read_back_bit_for_bit(tmp_path_factory, shapes, metadata):
    path = tmp_path_factory.mktemp("round") / "x.safetensors"
    tensors = {name: (torch.rand(shape) * 9).to(dtype) for name, (dtype, shape) in shapes.items()}
    checkpoint.save(path, tensors, metadata)
    read, read_metadata = checkpoint.read_tensors(path)
    assert read_metadata == metadata
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_equal_content_gives_equal_bytes_in_another_process_and_order(tmp_path):
    program = (
        "import sys, torch; from tenfold.core import checkpoint\n"
        "names = sys.argv[2]\n"
        "checkpoint.save(sys.argv[1], {n: torch.full((3,), float(ord(n))) for n in names}, {n: n for n in names})\n"
    )
    files = []
    for index, names in enumerate(("abcdefgh", "hgfedcba")):
        files.append(tmp_path / f"{index}.safetensors")
        environment = {**os.environ, "PYTHONHASHSEED": str(index)}
        subprocess.run([sys.executable, "-c", program, files[-1], names], check=True, env=environment)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_views_and_shared_tensors_are_saved_in_full(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "whole": base,
        "same": base,
        "transposed": base.T,
        "strided": base[:, ::2],
        "spread": base[0].expand(5, 4),
    }
    checkpoint.save(tmp_path / "x.safetensors", tensors)
    read = checkpoint.load_file(tmp_path / "x.safetensors").tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, {"a": torch.zeros(2)})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # stands in for a full disk: the write stops half-way
    try:
        with pytest.raises(UserError, match="cannot write") as error:
            checkpoint.save(path, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(error)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- containers of training programs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"params": state},
        lambda state: {"params": {"old": torch.zeros(1)}, "params_ema": state},
        lambda state: {"params": state, "params_ema": {}},
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state, "meta": {"note": "x"}},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {"module." + key: value for key, value in state.items()},
        lambda state: {"model": {"module._orig_mod." + key: value for key, value in state.items()}},
        lambda state: {**state, "epoch": 3},
    ],
)
@pytest.mark.parametrize("new_format", [True, False])
def test_the_state_dict_is_found_in_every_usual_container(tmp_path, wrap, new_format):
    state = small_network().state_dict()
    path = tmp_path / "x.pth"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=new_format)
    tensors = checkpoint.load_file(path).tensors
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], state[key]) for key in state)


def test_parameters_come_out_without_gradient_and_a_suffix_does_not_matter(tmp_path):
    path = tmp_path / "really_torch.safetensors"
    torch.save(dict(small_network().named_parameters()), path)
    assert not any(tensor.requires_grad for tensor in checkpoint.load_file(path).tensors.values())
    path = tmp_path / "really_safetensors.pth"
    checkpoint.save(path, {"a": torch.ones(2)})
    assert torch.equal(checkpoint.load_file(path).tensors["a"], torch.ones(2))


# --- files that must be refused --------------------------------------------------------------------------------------


class CreatesFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("writer", ["torch", "torch_old", "pickle2", "pickle5"])
def test_a_pickle_with_code_is_refused_and_runs_nothing(tmp_path, writer):
    trace = tmp_path / "ran"
    path = tmp_path / "x.pth"
    content = {"state_dict": {"a": torch.zeros(1)}, "b": CreatesFile(trace)}
    if writer.startswith("torch"):
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    else:
        path.write_bytes(pickle.dumps(CreatesFile(trace), protocol=int(writer[-1])))
    assert "refused" in refusal(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if writer.startswith("torch") else pickle.loads(path.read_bytes())
    assert trace.exists(), "the payload must be live, or the test shows nothing"


def test_the_refusal_names_the_foreign_object(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"when": pytest.approx(1.0)}, path)
    assert "ApproxScalar" in refusal(path)


def valid_safetensors() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"\x80\x04",
        b"hello, this is a text file\n" * 10,
        b"PK\x03\x04" + bytes(40),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**62) + b'{"a":1}' + bytes(100),
        struct.pack("<Q", 20) + b"{" + b"x" * 30,
        struct.pack("<Q", 2) + b"{}" + b"trailing",
        valid_safetensors()[:-1],
        valid_safetensors()[:30],
        valid_safetensors() + b"\0",
        valid_safetensors().replace(b"F32", b"F99"),
        valid_safetensors().replace(b"[4]", b"[9]"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_damaged_or_foreign_file_is_one_line(tmp_path, content, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_one_line(tmp_path, new_format, keep):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(5000)}, path, _use_new_zipfile_serialization=new_format)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert "truncated or damaged" in refusal(path)


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    plain, bomb = tmp_path / "plain.pth", tmp_path / "bomb.pth"
    torch.save({"a": torch.zeros(1_000_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.namelist():
            target.writestr(item, source.read(item))
    checkpoint.load_file(plain)
    assert bomb.stat().st_size < 100_000
    assert "unpack" in refusal(bomb)


def test_a_tensor_that_claims_more_than_is_stored_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(1).expand(10**12)}, path)
    assert "fewer" in refusal(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"state_dict": {}}, torch.zeros(3)])
def test_a_checkpoint_without_weights_is_one_line(tmp_path, content):
    path = tmp_path / "x.pth"
    torch.save(content, path)
    assert "no weights" in refusal(path)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    refusal(tmp_path / "absent.safetensors")
    refusal(tmp_path)


# --- into a module ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_cast_to_the_dtype_of_the_module(stored):
    source, target = small_network(), small_network()
    tensors = {
        key: value.to(stored) if value.is_floating_point() else value for key, value in source.state_dict().items()
    }
    checkpoint.load_into(target, tensors, "x")
    for key, value in target.state_dict().items():
        assert value.dtype == source.state_dict()[key].dtype
        assert torch.equal(value, tensors[key].to(value.dtype))


def fitting(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = {**small_network().state_dict(), **changes}
    return {key: value for key, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (fitting(**{"0.bias": None}), "1 missing: 0.bias"),
        (fitting(**{"9.bias": torch.zeros(1)}), "1 unexpected: 9.bias"),
        (fitting(**{"0.weight": torch.zeros(4, 3, 5, 5)}), "0.weight (expected 4x3x3x3, found 4x3x5x5)"),
        (fitting(**{"0.weight": torch.zeros(4, 3, 3, 3, dtype=torch.int8)}), "0.weight (expected float32, found int8)"),
        (fitting(**{"2.bias": torch.tensor([0.0, float("nan"), 0.0])}), "NaN or infinite values in 1 tensors (2.bias)"),
        (fitting(**{"1.running_var": torch.full((4,), float("inf"))}), "1.running_var"),
        ({f"body.{i}": torch.zeros(1) for i in range(30)}, "another architecture"),
        ({"net." + key: value for key, value in fitting().items()}, "remove the prefix 'net.'"),
    ],
)
def test_weights_that_do_not_fit_are_named_in_one_line_and_change_nothing(tensors, expected):
    module = small_network()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(UserError) as error:
        checkpoint.load_into(module, tensors, "some/file.pth")
    message = one_line(error)
    assert "some/file.pth" in message
    assert expected in message
    assert len(message) < 700
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_missing_prefix_is_recognised():
    module = nn.Sequential()
    module.add_module("backbone", small_network())
    with pytest.raises(UserError, match=r"add the prefix 'backbone\.'"):
        checkpoint.load_into(module, fitting(), "x")


def test_one_name_is_enough_for_tied_weights():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    module = nn.Sequential(first, second)
    checkpoint.load_into(module, {"0.weight": torch.eye(4)}, "x")
    assert torch.equal(module[1].weight, torch.eye(4))
    with pytest.raises(UserError, match="2 missing"):
        checkpoint.load_into(module, {}, "x")


def test_a_buffer_that_is_infinite_by_design_may_stay_so():
    module = nn.Module()
    module.register_buffer("mask", torch.full((2,), float("-inf")))
    checkpoint.load_into(module, {"mask": torch.tensor([0.0, float("-inf")])}, "x")
    assert module.mask[0] == 0


# --- where names lead ------------------------------------------------------------------------------------------------


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A package `fake_room` with embedded weights, and its table of names."""
    weights = tmp_path / "site" / "fake_room" / "weights"
    weights.mkdir(parents=True)
    (weights.parent / "__init__.py").write_text("")
    checkpoint.save(weights / "tiny.safetensors", {"a": torch.ones(3)}, {"config": '{"scale": 2}'})
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    common = {"room": "fake", "summary": "", "parameters": 3, "licence": "Apache-2.0"}
    return (
        ModelEntry(name="tiny-x2", source="embedded", location="tiny.safetensors", **common),
        ModelEntry(name="lost-x2", source="embedded", location="lost.safetensors", **common),
        ModelEntry(name="remote-x2", source="hub", location="someone/remote", **common),
    )


def test_an_embedded_name_gives_weights_config_and_entry(room):
    found = checkpoint.load("tiny-x2", room, "fake_room")
    assert torch.equal(found.tensors["a"], torch.ones(3))
    assert found.config == {"scale": 2}
    assert found.entry is room[0]
    assert found.origin == "tiny-x2 (embedded)"


def test_an_existing_path_comes_before_a_name(room, tmp_path):
    checkpoint.save(tmp_path / "tiny-x2", {"a": torch.zeros(3)})
    found = checkpoint.load("tiny-x2", room, "fake_room")
    assert torch.equal(found.tensors["a"], torch.zeros(3))
    assert found.entry is None


def test_a_folder_gives_its_weights_and_its_config(room, tmp_path):
    folder = tmp_path / "someone" / "remote"
    checkpoint.save(folder / "model.safetensors", {"a": torch.zeros(3)})
    checkpoint.save(folder / "other.safetensors", {"b": torch.zeros(3)})
    (folder / "config.json").write_text('{"scale": 4}')
    found = checkpoint.load("someone/remote", room, "fake_room")
    assert found.config == {"scale": 4}
    assert "a" in found.tensors
    assert checkpoint.load(folder / "other.safetensors").config is None, "the config belongs to model.safetensors"


def test_a_folder_with_one_weights_file_of_any_name_is_enough(room, tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "site" / "net.pth")
    assert "a" in checkpoint.load(tmp_path / "site").tensors
    torch.save({"a": torch.zeros(3)}, tmp_path / "site" / "net2.pth")
    with pytest.raises(UserError, match=r"2 weights files.*net\.pth, net2\.pth"):
        checkpoint.load(tmp_path / "site")
    with pytest.raises(UserError, match="holds no weights file"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny-x4", "did you mean tiny-x2"),
        ("zzzzzz", "known names: tiny-x2"),
        ("weights/absent.pth", "check the path"),
        ("./a/b", "check the path"),
        (Path("someone/model"), "check the path"),
        ("lost-x2", "missing from this installation"),
        ("remote-x2", "hf download someone/remote"),
        ("nobody/nothing", "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_to_do(room, name, expected):
    with pytest.raises(UserError) as error:
        checkpoint.load(name, room, "fake_room")
    assert expected in one_line(error)
