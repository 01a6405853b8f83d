"""Prepare torch modules of any kind for smoothing: eval mode, a copy in bfloat16, batch sizes, and the usual settings
of torch.

A module may be plain, scripted, traced, exported, compiled, or wrapped for several devices.
"""

import contextlib
import copy
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from rrcm.utils.errors import RRCMError, one_line

Graphs = GraphModule | torch.jit.ScriptModule  # their layers are operations of a graph, which cannot have hooks


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` without a wrapper that cannot vote: DDP waits for other processes, DataParallel passes no `draw`."""
    if isinstance(model, nn.parallel.DistributedDataParallel) or (
        isinstance(model, nn.DataParallel) and attribute(model, "stochastic")
    ):
        return model.module
    return model


def check_weights(model: nn.Module, precision: str) -> None:
    """Raises `RRCMError` for weights without values, and for weights that are less precise than `precision`."""
    for weight in chain(model.parameters(), model.buffers()):
        if is_lazy(weight) or weight.is_meta:
            raise RRCMError("the model has weights without values, as on the device meta; load or initialize them")
    for weight in model.parameters():
        if precision == "fp32" and weight.is_floating_point() and weight.element_size() < 4:
            raise RRCMError(f"precision = fp32: the model has weights of {weight.dtype}; convert it with .float()")


def copy_in_bfloat16(model: nn.Module) -> nn.Module:
    """A copy of `model` in bfloat16 without gradients for its weights. Raises `RRCMError` if it cannot be copied."""
    if any(isinstance(module, torch.jit.ScriptModule) and _has_constants(module) for module in model.modules()):
        raise RRCMError(
            "precision = bf16: the model has weights as constants in its graph, which cannot be converted; use fp32"
        )
    try:
        with torch.inference_mode(False), torch.no_grad():  # a copy of a scripted module would keep its gradient graph
            twin = copy.deepcopy(model)
            twin = twin.to(torch.bfloat16) if isinstance(twin, torch.jit.ScriptModule) else twin.bfloat16()
            for weight in twin.parameters():
                weight.requires_grad_(False)
            return twin
    except Exception as error:  # each kind of module raises errors of its own
        raise RRCMError(
            f"precision = bf16: the model cannot be copied in bfloat16 ({one_line(error)}); use fp32"
        ) from error


def switches(model: nn.Module) -> list[object]:
    """All modules of `model`, each followed by its attributes that are True or False."""
    return [
        each for module in model.modules() for each in (module, *(v for v in vars(module).values() if type(v) is bool))
    ]


def parts(model: nn.Module) -> list[object]:
    """All modules of `model`, their attributes, and the contents of these, such as hooks.

    A copy of the model becomes invalid when one of them is another object, but not when a weight changes in place.
    """
    objects = []
    for module in model.modules():
        for value in (module, *vars(module).values()):
            objects.append(value)
            if isinstance(value, dict | list | tuple):
                objects += value.values() if isinstance(value, dict) else value
    return objects


def same_objects(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether both have the same objects in the same order."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def update_copy(twin: nn.Module, model: nn.Module) -> bool:
    """Give a copy the present weights of `model`. Returns False if they do not fit, so that a new copy is needed."""
    weights, copies = _tensors(model), _tensors(twin)
    for name, weight in weights.items():
        if name not in copies or copies[name].shape != weight.shape or copies[name].device != weight.device:
            return False
    with torch.no_grad():
        for name, weight in weights.items():
            copies[name].copy_(weight)
    return True


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters, the buffers, and the attributes that are tensors."""
    plain = {
        f"{prefix}.{name}": value
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }
    return plain | dict(model.named_parameters()) | dict(model.named_buffers())


@contextlib.contextmanager
def usual_state(device: torch.device) -> Iterator[None]:
    """Compute on `device` as in a new process, whatever the program has set.

    The default dtype is float32, there is no autocast, and no product of float32 numbers is rounded to TF32 or
    bfloat16.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False), _exact_products():
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    if hasattr(cudnn, "conv"):  # one setting for each kind of operation, since torch 2.9
        operations = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
        settings = [(each, "fp32_precision", "ieee") for each in operations]
    else:
        settings = [(cudnn, "allow_tf32", False)]
    before = [getattr(where, name) for where, name, _ in settings]
    try:
        products = torch.get_float32_matmul_precision()
    except RuntimeError:  # there is no common value, since the kinds of operations differ
        products = None
    try:
        torch.set_float32_matmul_precision("highest")
        for where, name, exact in settings:
            setattr(where, name, exact)
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        for (where, name, exact), value in zip(settings, before, strict=True):
            if exact == "ieee":
                setattr(where, name, "none")  # follow a more general setting, if there is one
            if getattr(where, name) != value:
                setattr(where, name, value)


@contextlib.contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers of a model afterwards. Batch norms in training mode change them."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def attribute(model: nn.Module, name: str) -> bool:
    """A flag of a `BaseClassifier`, also inside `DataParallel`. False if the model does not have it."""
    return getattr(model.module if isinstance(model, nn.DataParallel) else model, name, False)


def set_eval(model: nn.Module) -> None:
    """`model.eval()`, also if a part of the model is an exported program, which has no modes and raises an error."""
    try:
        model.eval()
    except NotImplementedError:
        for child in model.children():
            set_eval(child)
        model.training = False


def _has_constants(model: torch.jit.ScriptModule) -> bool:
    """Whether the program contains float tensors, as after `torch.jit.freeze`. Mixing two dtypes may crash it."""
    graph = getattr(model, "inlined_graph", None)  # nodes live as long as this reference; a part may have no graph
    blocks = [graph] if graph else []
    while blocks:
        for node in blocks.pop().nodes():
            blocks += node.blocks()
            value = node.output().toIValue() if node.kind() == "prim::Constant" else None
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim:
                return True
    return False


def batch_limits(model: nn.Module) -> tuple[int, int]:
    """The smallest and the largest batch that an exported program in `model` accepts."""
    for module in model.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            value = node.meta.get("val") if node.op == "placeholder" else None
            if isinstance(value, torch.Tensor) and value.ndim:
                size = value.shape[0]
                if isinstance(size, int):
                    return size, size
                bounds = size.node.shape_env.bound_sympy(size.node.expr)
                return max(1, int(bounds.lower)), int(bounds.upper) if bounds.upper < sys.maxsize else sys.maxsize
    return 1, sys.maxsize


def in_batches(network: Callable, noisy: torch.Tensor, limits: tuple[int, int]) -> object:
    """`network(noisy)` in batches within `limits`, the last one padded. The answer to a single batch is not checked."""
    smallest, largest = limits
    if smallest <= max(1, len(noisy)) <= largest:
        return network(noisy)
    answers = []
    for rows in noisy.split(largest):
        missing = max(0, smallest - len(rows))
        answer = logits_of(network(torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])))
        if not isinstance(answer, torch.Tensor):
            return answer
        answers.append(answer[: len(rows)])
    return torch.cat(answers)


def logits_of(answer: object) -> object:
    """The attribute or item `logits` of an answer, which models of transformers have; else the answer itself."""
    if isinstance(answer, Mapping):
        return answer.get("logits", answer)
    return getattr(answer, "logits", answer)


@contextlib.contextmanager
def without_compilation() -> Iterator[None]:
    """Run compiled models as they were before torch.compile."""
    if "torch._dynamo" not in sys.modules:  # no model is compiled then, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def check_independence(run: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, tolerance: float) -> None:
    """Raises `RRCMError` if `run`, which maps a batch to logits, is random or depends on the rest of the batch.

    Modules in eval mode still are if they were exported or traced in training mode, or call dropout in a wrong way.
    """
    company = batch.clone()
    generator = torch.Generator().manual_seed(0)
    company[1:] = 4 * torch.rand(company[1:].shape, generator=generator, device="cpu").to(batch)
    states = _random_states(batch.device)
    answers = [run(rows)[0].float() for rows in (batch, company)]
    if any(not torch.equal(*pair) for pair in zip(states, _random_states(batch.device), strict=True)):
        raise RRCMError(
            "the model draws random numbers in eval mode, as dropout in training mode does; call eval() before you "
            "export or trace it, or subclass BaseClassifier with stochastic = True"
        )
    if (answers[0] - answers[1]).abs().max() > tolerance * answers[0].abs().max():  # False for NaN
        raise RRCMError(
            "the model's answer to an image depends on the other images of the batch, as with batch norms in training "
            "mode or dynamic quantization; call eval() before you export or trace it, and let it keep its statistics"
        )


def _random_states(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def largest_output(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes of the largest tensor that a layer or a graph operation of `model` returns during `run()`."""
    sizes = [0]

    def add(output: object) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel() * output.element_size())

    class AddOutputs(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            add(output)
            return output

    if any(isinstance(module, Graphs) for module in model.modules()):
        for _ in range(2):  # TorchScript optimises its graph in the first runs, which fails in this mode
            run()
        with AddOutputs():
            run()
        return max(sizes)
    hooks = [layer.register_forward_hook(lambda layer, inputs, output: add(output)) for layer in model.modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return max(sizes)
