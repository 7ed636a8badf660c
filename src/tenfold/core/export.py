"""ONNX: write a module as one self-contained file, and check that ONNX Runtime computes the same from it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.core.console import UserError
from tenfold.core.files import atomic_write

_LEAST = 1e-30  # an output of zeros is divided by this


@dataclass(frozen=True)
class InputCheck:
    """The comparison on one set of inputs.

    Attributes:
        shapes: the shape of each input.
        max_abs_difference: the largest |ONNX Runtime - PyTorch| over all outputs; infinite where shapes differ or only
            one of the two is NaN.
        largest: the largest |PyTorch| over all outputs, NaN and infinity left out.
        max_relative_difference: likewise, each output's difference over the largest |value| that PyTorch gives in it.
    """

    shapes: tuple[tuple[int, ...], ...]
    max_abs_difference: float
    largest: float
    max_relative_difference: float


@dataclass(frozen=True)
class CheckResult:
    """How far an ONNX file is from the module that it was made from.

    Attributes:
        max_abs_difference: the largest difference over all inputs.
        inputs: each input's own difference.
        versions: the packages that took part and their versions.
        bytes: size of the file.
    """

    max_abs_difference: float
    inputs: tuple[InputCheck, ...]
    versions: dict[str, str]
    bytes: int


def export_onnx(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    path: str | Path,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: tuple[Any, ...] | None = None,
    metadata: Mapping[str, str] | None = None,
    extra: str = "all",
) -> None:
    """Write a module in evaluation mode as one ONNX file with its weights inside; nothing is printed.

    Args:
        module: the module; its training mode is put back afterwards.
        example_inputs: positional inputs of its forward.
        path: the file to write, atomically.
        input_names: the graph's input names, in order.
        output_names: the graph's output names, in order.
        dynamic_shapes: for each input a dict of axis to `torch.export.Dim`, for sizes that are free at run time.
        metadata: text entries stored in the model.
        extra: tenfold's optional dependency set that brings the ONNX packages, for the message if they are missing.

    Raises:
        UserError: a package is missing, or the disk refuses.
    """
    _require(("onnx", "onnxscript"), extra)
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with _evaluation(module), _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            example_inputs,
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=dynamic_shapes,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    # The exporter notes on every node where in the Python source it came from: several times the size of a small model.
    ClearMetadataAndDocStringPass()(program.model)
    program.model.metadata_props.update(metadata or {})
    with atomic_write(path) as temporary:
        program.save(temporary, external_data=False)


def export_checked(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    path: str | Path,
    input_names: Sequence[str],
    output_names: Sequence[str],
    inputs: Sequence[tuple[Tensor, ...]],
    tolerance: float,
    difference: Callable[[CheckResult], float] = lambda result: result.max_abs_difference,
    dynamic_shapes: tuple[Any, ...] | None = None,
    metadata: Mapping[str, str] | None = None,
    extra: str = "all",
) -> CheckResult:
    """`export_onnx`, then `check_onnx` on `inputs`; the file is there only if the two agree.

    Args:
        module, example_inputs, path, input_names, output_names, dynamic_shapes, metadata, extra: see `export_onnx`.
        inputs: what is compared, see `check_onnx`.
        tolerance: the largest `difference` with which the file is kept.
        difference: what of the comparison counts.

    Raises:
        UserError: as those two do, or the difference is too large; a file that was there before stays.
    """
    with atomic_write(path) as temporary:
        export_onnx(
            module, example_inputs, temporary, input_names, output_names, dynamic_shapes, metadata=metadata, extra=extra
        )
        result = check_onnx(temporary, module, inputs, extra)
        found = difference(result)
        if not found <= tolerance:
            raise UserError(
                f"{path}: not written, since ONNX Runtime differs from PyTorch by {found:.1e} "
                f"(more than {tolerance:.0e}); try other versions than {result.versions}"
            )
    return result


def check_onnx(
    path: str | Path,
    module: nn.Module,
    inputs: Sequence[tuple[Tensor, ...]],
    extra: str = "all",
) -> CheckResult:
    """Run an ONNX file in ONNX Runtime on the CPU and the module in PyTorch, and compare their outputs.

    Args:
        path: the ONNX file.
        module: the module that it was made from, run in evaluation mode.
        inputs: sets of positional inputs, best of several sizes where sizes are free.
        extra: as in `export_onnx`.

    Raises:
        UserError: a package is missing, the file is missing or not ONNX, or it does not accept an input.
    """
    _require(("onnxruntime",), extra)
    path = Path(path)
    session = _session(path)
    names = [node.name for node in session.get_inputs()]
    checks = []
    for values in inputs:
        feeds = {name: value.detach().cpu().numpy() for name, value in zip(names, values, strict=True)}
        shapes = tuple(tuple(value.shape) for value in values)
        try:
            found = session.run(None, feeds)
        except Exception as error:  # onnxruntime's errors have no common base class but Exception
            raise UserError(f"{path}: ONNX Runtime refuses an input of shape {shapes} ({_one_line(error)})") from None
        with _evaluation(module), torch.no_grad():
            expected = module(*values)
        expected = (expected,) if isinstance(expected, Tensor) else tuple(expected)
        wanted = [output.cpu().numpy() for output in expected]
        differences = [_difference(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)]
        sizes = [float(np.abs(theirs[np.isfinite(theirs)]).max(initial=0.0)) for theirs in wanted]
        relative = [difference / max(size, _LEAST) for difference, size in zip(differences, sizes, strict=True)]
        checks.append(InputCheck(shapes, max(differences), max(sizes), max(relative)))
    packages = ("torch", "onnx", "onnxruntime")
    versions = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    worst = max((check.max_abs_difference for check in checks), default=0.0)
    return CheckResult(worst, tuple(checks), versions, path.stat().st_size)


def _session(path: Path) -> Any:
    import onnxruntime

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Set because the default pins one thread to each processor of the machine, which a container may not allow.
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # see above
        raise UserError(f"{path}: not a readable ONNX model ({_one_line(error)}): export it again") from None


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape or not np.array_equal(np.isnan(found), np.isnan(expected)):
        return float("inf")
    if found.size == 0:
        return 0.0
    unequal = (found != expected) & ~np.isnan(expected)  # left out: equal infinities, whose difference is NaN
    return float(np.abs(found[unequal].astype(np.float64) - expected[unequal]).max(initial=0.0))


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings and log lines, which speak to its developers."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _require(packages: Sequence[str], extra: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX export needs {' and '.join(missing)}: run pip install 'tenfold[{extra}]'")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
