"""Capture: a Job's model and loss as one graph of operators, with the number of samples left open."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.modules import transformer

from shardwise.errors import CaptureError, JobError
from shardwise.graph.captured import Captured
from shardwise.graph.functional import functional
from shardwise.graph.no_data import on_cpu, without_data
from shardwise.graph.normalize import normalize
from shardwise.graph.output import OutputModule
from shardwise.graph.own_backward import check_hooks, written_out
from shardwise.graph.step import FIRST, Step, with_state
from shardwise.graph.unfold import Event, Stack, deepest, run, unfold, unfolded
from shardwise.job import Batch, Job, batch_size, batch_tensors, map_batch

M = TypeVar("M", bound=nn.Module)
Purpose = Literal["train", "evaluate", "predict"]
"""What a graph is for: the loss with dropout and gradients; the loss without; or the model's own output without."""


class LossModule(nn.Module):
    """The model and its loss as one module: the tensors of a batch in, the mean loss out.

    In evaluation, and where the loss is a sum and a count, the count comes out as well: means over several batches are
    weighted by it. This is also how one device runs a job, so what is captured is what is compared with.
    """

    def __init__(self, module: nn.Module, job: Job, example: Batch) -> None:
        super().__init__()
        self.module = module
        self._loss = job.loss
        self._example = map_batch(example, lambda t: t.new_empty(0))

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        stream: Iterator[Tensor] = iter(tensors)
        batch = map_batch(self._example, lambda _: next(stream))
        loss, count = mean_loss(self._loss, caller(self.module)(batch), batch)
        return loss if self.training or count is None else (loss, count)


def caller(module: nn.Module) -> Callable[[Batch], Any]:
    """How a module is called on a batch.

    A dict goes in as keyword arguments, less those that `forward` does not take; of a tuple or list the first element
    goes in; a tensor goes in as it is.
    """
    parameters = inspect.signature(module.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def call(batch: Batch) -> Any:
        if isinstance(batch, Tensor):
            return module(batch)
        if isinstance(batch, (tuple, list)):
            return module(batch[0])
        return module(**{k: v for k, v in batch.items() if takes_all or k in parameters})

    return call


def mean_loss(loss: Callable[[Any, Batch], Any] | None, output: Any, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The loss of a batch as one number: what the loss returns, or sum divided by count; then the count, if it is told.

    Raises:
        JobError: there is no loss, or it is not a scalar.
    """
    if loss is None:
        found = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
        if found is None and isinstance(output, Tensor) and output.ndim == 0:
            found = output
        if found is None:
            raise JobError(
                f"loss is None, but the model's output ({type(output).__name__}) has no .loss; "
                "give Job(loss=...), or labels in the batch"
            )
    else:
        found = loss(output, batch)
    number = None
    if isinstance(found, (tuple, list)):
        total, count = found
        # All samples may be ignored; the loss is then zero, not NaN.
        found = total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
        number = count.reshape(()) if isinstance(count, Tensor) else torch.full((), count, device=found.device)
    if not isinstance(found, Tensor) or found.numel() != 1:
        given = type(found).__name__
        if isinstance(found, Tensor):
            given = f"a tensor of {found.ndim} dims; take its mean over the samples"
        raise JobError(f"loss must be a scalar tensor or (sum, count), but is {given}")
    return found.reshape(()), number


Wrapper = LossModule | OutputModule | Step


def capture(
    job: Job, module: nn.Module | None = None, batch: Batch | None = None, *, purpose: Purpose = "train"
) -> Captured:
    """Capture a job's model and loss, or the model alone.

    Args:
        job: what to capture.
        module: the module, if it has been built; None builds it without allocating its weights.
        batch: a batch for its shapes; None takes the job's first samples.
        purpose: what the graph is for; the model is left in training either way.

    Raises:
        CaptureError: the model has control flow that depends on data, or another thing that does not export.
        JobError: the job's parts do not fit together.
    """
    if module is None:
        module = job.build("meta")
    if batch is None:
        batch = job.batch(range(min(2, job.global_batch)))
    if purpose == "train":
        check_hooks(module)
    samples = max(job.global_batch, 2)
    device = next(module.parameters()).device
    mode = None
    # Some ways to make a tensor, such as torch.FloatTensor, know no device but the CPU.
    if any(p.is_meta for p in module.parameters()):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        module, device = on_cpu(module, mode), torch.device("cpu")

    def shaped_as(t: Tensor) -> Tensor:
        return t.new_zeros((samples, *t.shape[1:]), device=device) if t.ndim else t.to(device)

    with mode or nullcontext():
        tensors = tuple(batch_tensors(map_batch(batch, shaped_as)))
        wrapper = _wrapper(module, job, batch, purpose).train(purpose == "train")
    try:
        captured = _captured(wrapper, tensors, samples, mode)
    except CaptureError as error:
        if error.__cause__ is not None:  # torch's: it may not even run
            # In the job's own dtype, which the batch that was given may not have.
            _check_that_it_runs(job, job.batch(range(min(2, job.global_batch))), purpose)
        raise
    wrapper.train()
    return replace(captured, tied=_tied(module))


def capture_step(step: Step, samples: int, length: int) -> Captured:
    """Capture one step of generation; no data of its weights or its state is allocated.

    Args:
        step: the model as a step.
        samples: the most that go in at once.
        length: tokens of each sample.

    Raises:
        CaptureError: as `capture`.
    """
    bare, mode = without_data(step)
    samples = max(samples, 2) if all(each.samples for each in step.state) else samples
    with mode:
        tensors = bare.examples(samples, length)
    return replace(_captured(bare, tensors, samples, mode), tied=_tied(step.module))


def _wrapper(module: nn.Module, job: Job, batch: Batch, purpose: Purpose) -> Wrapper:
    return OutputModule(module, caller, batch) if purpose == "predict" else LossModule(module, job, batch)


def _captured(wrapper: Wrapper, tensors: tuple[Tensor, ...], samples: int, mode: FakeTensorMode | None) -> Captured:
    """Capture by a few of the layers that are alike, where that is the same, or else as a whole."""
    stack = deepest(wrapper.module)
    short = _by_a_few(wrapper, tensors, samples, mode, stack) if stack is not None else None
    if short is not None:
        return short
    return _collect(_export(wrapper, tensors, mode), wrapper, tensors, samples)


def _by_a_few(
    wrapper: Wrapper, tensors: tuple[Tensor, ...], samples: int, mode: FakeTensorMode | None, stack: Stack
) -> Captured | None:
    try:
        # A model may note, when it is first called, which layers it has.
        part = _apart(wrapper)
        stack = deepest(part.module) or stack
        with stack.short():
            short = _captured(part, tensors, samples, mode)
            found = unfolded(_runs(part, tensors, mode), stack)
        alike = found is not None and found.events == _runs(wrapper, tensors, mode)
    except Exception:  # a model may count on its layers being there
        return None
    return unfold(short, stack, wrapper.module, _state_names(wrapper)) if alike else None


def _apart(module: M) -> M:
    """A copy of a module that shares its tensors."""
    held = [t for m in module.modules() for value in vars(m).values() for t in batch_tensors(value)]
    return copy.deepcopy(module, {id(t): t for t in held})


def _runs(wrapper: Wrapper, tensors: tuple[Tensor, ...], mode: FakeTensorMode | None) -> list[Event]:
    """What the model runs, on tensors without data."""
    if mode is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        wrapper = on_cpu(wrapper, mode)
        with mode:
            tensors = tuple(torch.empty_like(t, device="cpu") for t in tensors)
    with mode, _masks_unread():
        return run(wrapper, wrapper.module, tensors, _state_names(wrapper))


def _state_names(wrapper: Wrapper) -> Sequence[str]:
    return wrapper.names if isinstance(wrapper, Step) else ()


_SMALL = 500_000_000  # parameters of a model that is run once to see whether it runs at all


def _check_that_it_runs(job: Job, batch: Batch, purpose: Purpose) -> None:
    """Tell a model that does not capture from one that does not run.

    Raises:
        JobError: it does not run on a batch.
    """
    if sum(p.numel() for p in job.build("meta").parameters()) > _SMALL:
        return
    try:
        # In training a model may ask for gradients itself.
        with torch.set_grad_enabled(purpose == "train"):
            _wrapper(job.build(), job, batch, purpose)(*batch_tensors(batch))
    except Exception as error:
        told = f"{type(error).__name__}: {_line(error)}"
        raise JobError(
            f"{job.title()} does not run on its first {batch_size(batch)} samples: {told}; "
            "see that the model takes what the dataset gives"
        ) from error


def _line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


def _export(wrapper: Wrapper, tensors: tuple[Tensor, ...], mode: FakeTensorMode | None) -> ExportedProgram:
    fixed = wrapper.fixed if isinstance(wrapper, Step) else ()
    shapes: Any = tuple({0: Dim.AUTO} if t.ndim and i not in fixed else None for i, t in enumerate(tensors))
    # A step names its first tensors.
    shapes = (*shapes[:FIRST], shapes[FIRST:]) if isinstance(wrapper, Step) else (shapes,)
    try:
        with warnings.catch_warnings(), without_logs():
            warnings.simplefilter("ignore")
            kept = written_out(type(wrapper.module).__name__) if wrapper.training else nullcontext()
            with mode or nullcontext(), kept, _masks_unread():
                exported = torch.export.export(wrapper, tensors, dynamic_shapes=shapes, strict=False)
            return functional(exported)
    except (CaptureError, JobError):
        raise
    except Exception as error:
        raise _does_not_capture(wrapper, error) from error


@contextmanager
def _masks_unread() -> Iterator[None]:
    """torch's transformer layers look whether a mask is causal, for a hint alone: they apply it either way."""
    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = before


def _does_not_capture(wrapper: Wrapper, error: Exception) -> CaptureError:
    return CaptureError(
        f"{type(wrapper.module).__name__} does not capture: {type(error).__name__}: {_line(error)}; "
        "it can still be split by data (data, sharded), and by layers where it is a Sequential"
    )


@contextmanager
def without_logs() -> Iterator[None]:
    """torch logs and prints a failed export as well as raising it."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _collect(exported: ExportedProgram, wrapper: Wrapper, tensors: tuple[Tensor, ...], samples: int) -> Captured:
    graph = exported.graph
    params, buffers, constants, inputs = {}, {}, {}, []
    for spec in exported.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.PARAMETER:
            params[name] = str(spec.target).removeprefix("module.")
        elif spec.kind is InputKind.BUFFER:
            buffers[name] = str(spec.target).removeprefix("module.")
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[name] = exported.constants[str(spec.target)]
            if isinstance(constants[name], FakeTensor) and ".lifted_tensor" in str(spec.target):
                raise CaptureError(
                    f"{type(wrapper.module).__name__} does not capture, for it uses a tensor that torch kept for a "
                    "gradient, as where a model calls torch.autograd.grad itself; it can still be split by data (data, "
                    "sharded), and by layers where it is a Sequential"
                )
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(name)
        else:
            raise CaptureError(f"the model has an input of kind {spec.kind.name}, which cannot be split")
    updates = []
    for out in exported.graph_signature.output_specs:
        if out.kind is OutputKind.BUFFER_MUTATION:
            updates.append(str(out.target).removeprefix("module."))
        elif out.kind is OutputKind.PARAMETER_MUTATION and wrapper.training:
            name = str(out.target).removeprefix("module.")
            raise JobError(
                f"{type(wrapper.module).__name__} changes its parameter {name} each time that it is called, as an "
                "embedding with max_norm does, and ranks would change it by other samples each; compute what is to be "
                "used of it instead (F.normalize), or keep it in a buffer"
            )
        elif out.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"the model changes {out.target} ({out.kind.name}), which cannot be split")
    results = len(exported.graph_signature.output_specs) - len(updates)
    _results_first(graph, len(updates))
    if not wrapper.training:
        # Evaluation leaves the model as it is.
        _only_results(graph, results)
        updates = []
    symbols = _batch_symbols(graph, inputs)
    try:
        normalize(graph, symbols)
    except GuardOnDataDependentSymNode as error:
        raise _does_not_capture(wrapper, error) from error
    tied = _tied(wrapper.module)
    params = {placeholder: tied.get(name, name) for placeholder, name in params.items()}
    captured = Captured(
        graph=graph,
        params=params,
        buffers=buffers,
        constants=constants,
        inputs=inputs,
        updates=updates,
        tied=tied,
        results=_names(wrapper, results),
        batch_symbols=symbols,
        fixed_batch=None if symbols and not _fixes_batch(graph, inputs) else samples,
        form=wrapper.form if isinstance(wrapper, OutputModule) else None,
    )
    return with_state(captured, wrapper, samples) if isinstance(wrapper, Step) else captured


def _tied(module: nn.Module) -> dict[str, str]:
    """Parameter name to the first name of the same parameter, where that is another."""
    named = list(module.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in reversed(named)}
    return {name: first[id(p)] for name, p in named if first[id(p)] != name}


def _results_first(graph: fx.Graph, updates: int) -> None:
    """Put the loss, and the count, before the new buffers in the output."""
    output = graph.output_node()
    outs = list(output.args[0])  # type: ignore[arg-type]
    output.args = (tuple(outs[updates:] + outs[:updates]),)


def _names(wrapper: Wrapper, results: int) -> tuple[str, ...]:
    if isinstance(wrapper, OutputModule):
        return tuple(f"output {i}" for i in range(results))
    return ("loss", "count")[:results]


def _only_results(graph: fx.Graph, results: int) -> None:
    output = graph.output_node()
    output.args = (output.args[0][:results],)  # type: ignore[index]


def _batch_symbols(graph: fx.Graph, inputs: list[str]) -> frozenset[str]:
    found = set()
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in inputs:
            value = node.meta["val"]
            if value.ndim and _is_open(value.shape[0]):
                found.add(str(value.shape[0].node.expr))
    return frozenset(found)


def _is_open(size: Any) -> bool:
    """Whether a size is a symbol; one that the model turned into a number is a constant expression."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def _fixes_batch(graph: fx.Graph, inputs: list[str]) -> bool:
    """Whether the number of samples is a plain number in something of the batch that is read."""
    read = [node.meta["val"] for node in graph.nodes if node.op == "placeholder" and node.name in inputs and node.users]
    return any(value.ndim and not _is_open(value.shape[0]) for value in read)


def is_getitem(node: fx.Node) -> bool:
    """Whether a node picks one result of an operator with several."""
    return node.op == "call_function" and node.target is operator.getitem
