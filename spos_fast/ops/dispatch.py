"""Defines the ops and decides which kernel serves which device.

An op is a schema, a reference in plain PyTorch that says what it computes, and up to two kernels: native (C++ on the
CPU, CUDA on the GPU) and Triton. The choice is made once, when the op is defined, from SPOS_FAST_BACKEND and from what
is there. It costs nothing at run time: torch's dispatcher then calls the chosen kernel.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from spos_fast import native

Kernel = Callable[..., Any]
DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # device type -> dispatch key

# The one owner of the namespace. It must live as long as the ops: torch takes them back when it is collected.
LIBRARY = torch.library.Library("spos_fast", "DEF")


@dataclass(frozen=True)
class Choice:
    """Which kernel serves an op on a device, and why."""

    kernel: str  # native, triton, reference or composite
    reason: str
    fallback: bool = False  # the reference, though nobody asked for it


@dataclass(frozen=True)
class Op:
    """An op with every implementation that it has, whichever of them was chosen.

    Attributes:
        overload: what ``torch.ops.spos_fast`` calls.
        reference: the definition in plain PyTorch.
        triton: the Triton kernel's launcher; None if there is none.
        choices: which kernel serves which device type.
        plain: why the reference is its one implementation; None if it has kernels.
    """

    overload: Any
    reference: Kernel
    triton: Kernel | None
    choices: dict[str, Choice]
    plain: str | None = None


OPS: dict[str, Op] = {}  # by name
_warned: set[str] = set()


def define_op(
    schema: str,
    *,
    reference: Kernel,
    fake: Kernel,
    triton: str | None = None,
    triton_note: str = "",
    autocast: Iterable[int] = (),
    plain: str | None = None,
    cpu: tuple[Kernel, str] | None = None,
) -> Any:
    """Define an op and register its kernels. Returns the overload, ready to call.

    Args:
        schema: as torch writes it, without the namespace: ``"name(Tensor x) -> Tensor"``. Functional.
        reference: plain PyTorch with the same arguments and defaults; the definition of the op.
        fake: shapes and dtypes of the outputs, on tensors without data.
        triton: ``"module:function"`` of the Triton kernel's launcher, imported when it is first called. It
            must carry the schema's defaults too: torch leaves out arguments that equal them.
        triton_note: what it leaves to others, for :func:`explain`.
        autocast: positions of the tensors that autocast casts to its dtype.
        plain: why the op has no kernels and the reference is its implementation; None if it has.
        cpu: what serves CPUs if that is made of other ops, and of which; None if it is C++.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    torch.library.register_fake(f"spos_fast::{name}", fake, lib=LIBRARY)
    choices = {device: Choice("reference", plain) if plain else _choose(name, device, triton) for device in DEVICES}
    if triton_note:
        choices = {
            device: replace(choice, reason=f"{choice.reason}; {triton_note}") if choice.kernel == "triton" else choice
            for device, choice in choices.items()
        }
    if cpu is not None and native.backend() in ("auto", "native"):
        choices["cpu"] = Choice("composite", cpu[1])
        LIBRARY.impl(name, cpu[0], DEVICES["cpu"])
    launcher = _late(triton) if triton is not None else None
    for device, choice in choices.items():
        if choice.kernel == "triton":
            LIBRARY.impl(name, launcher, DEVICES[device])
    # Serves every device without a kernel of its own. Not Implicit: autograd is the op's own.
    LIBRARY.impl(name, _announced(name, reference), "CompositeExplicitAutograd")
    overload = getattr(torch.ops.spos_fast, name).default
    OPS[name] = Op(overload, reference, launcher, choices, plain)
    positions = frozenset(autocast)
    if positions:
        for device in DEVICES:
            _register_autocast(overload, device, positions)
    return overload


def define_composite(schema: str, function: Kernel, why: str) -> None:
    """Define an op that consists of PyTorch's own: autograd, autocast, fakes and compilers see those.

    Args:
        schema: as for :func:`define_op`.
        function: plain PyTorch with the same arguments and defaults.
        why: what serves it and why that is enough.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    overload = getattr(torch.ops.spos_fast, name).default
    OPS[name] = Op(overload, function, None, {device: Choice("composite", why) for device in DEVICES}, why)


def differentiable_once(backward: str, op: str) -> None:
    """Make differentiating an op's backward op an error: torch would take its gradient for zero, with a warning."""
    not_differentiable(backward, f"{op} is differentiable once; for second derivatives write it in plain PyTorch")


def not_differentiable(op: str, why: str) -> None:
    """Make differentiating an op an error that says why, for the same reason."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(why)

    torch.library.register_autograd(f"spos_fast::{op}", refuse, lib=LIBRARY)


def _register_autocast(overload: Any, device: str, positions: frozenset[int]) -> None:
    """Cast the arguments at these positions to autocast's dtype, wherever it is on; float64 stays, as torch has it."""
    key = getattr(torch._C.DispatchKey, f"Autocast{DEVICES[device]}")

    def cast(position: int, value: Any) -> Any:
        if position not in positions or not isinstance(value, torch.Tensor) or value.dtype == torch.float64:
            return value
        return value.to(torch.get_autocast_dtype(device)) if value.is_floating_point() else value

    def run(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return overload(*(cast(position, value) for position, value in enumerate(arguments)))

    # Both ways: torch's dispatcher, and that of torch.compile's tracing.
    overload.py_impl(key)(run)
    LIBRARY.impl(overload, lambda _, *arguments: run(*arguments), f"Autocast{DEVICES[device]}", with_keyset=True)


def _choose(name: str, device: str, triton: str | None) -> Choice:
    backend = native.backend()
    if backend == "reference":
        return Choice("reference", "SPOS_FAST_BACKEND=reference")
    if backend == "triton":
        missing = _why_no_triton(device, triton)
        if missing is None:
            return Choice("triton", "SPOS_FAST_BACKEND=triton")
        note = f"SPOS_FAST_BACKEND=triton, but {missing}"
    else:
        note = "" if backend == "auto" else f"SPOS_FAST_BACKEND={backend}"

    problem = native.ops_library().register(name, DEVICES[device])
    if problem is None:
        return Choice("native", note or "built")
    if device == "cuda" and backend == "auto" and _why_no_triton(device, triton) is None:
        return Choice("triton", problem.removesuffix(f"; {native.REBUILD}"))
    return Choice("reference", f"{note}: {problem}" if note else problem, fallback=True)


def _why_no_triton(device: str, triton: str | None) -> str | None:
    if triton is None:
        return "the op has no Triton kernel"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton does not run on {device}"
    return None


def _late(path: str) -> Kernel:
    module, _, function = path.partition(":")

    def launch(*args: Any) -> Any:
        kernel = getattr(importlib.import_module(module), function)
        with torch.cuda.device_of(
            _first_tensor(args)
        ):  # Triton launches on the current GPU, which need not be the tensor's
            return kernel(*args)

    return launch


def _first_tensor(args: Iterable[Any]) -> torch.Tensor:
    """The first tensor of an op's arguments, or of their lists."""
    flat = (value for argument in args for value in (argument if isinstance(argument, list) else [argument]))
    return next(value for value in flat if isinstance(value, torch.Tensor))


def _announced(name: str, reference: Kernel) -> Kernel:
    """The reference, with a warning at its first use (an error if strict) wherever it stands in for a kernel."""

    def run(*args: Any) -> Any:
        device = _first_tensor(args).device.type
        choice = OPS[name].choices.get(device, Choice("reference", f"no kernel for {device} devices", fallback=True))
        if choice.fallback:
            _announce(name, device, choice)
        return reference(*args)

    return run


def _announce(name: str, device: str, choice: Choice) -> None:
    message = f"spos_fast.{name} has no kernel on {device}: {choice.reason}"
    if native.strict():
        raise RuntimeError(f"{message} (SPOS_FAST_STRICT=1)")
    if native.backend() == "native":
        raise RuntimeError(message)
    if choice.reason not in _warned:  # once a reason, however many ops it concerns
        _warned.add(choice.reason)
        warnings.warn(f"{message}; using plain PyTorch, which is slower", RuntimeWarning, stacklevel=3)


def explain() -> str:
    """A table of which kernel runs each op on each device and why, under a line on what was built."""
    rows = [("op", "device", "kernel", "why")]
    for name, op in sorted(OPS.items()):
        for device, choice in op.choices.items():
            reason = choice.reason
            if device == "cuda" and choice.kernel == "native":
                reason += f" for {native.build_info()['cuda']['architectures']}"
            if device == "cuda" and not torch.cuda.is_available():
                reason += "; no GPU here"
            rows.append((name, device, choice.kernel, reason))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows]
    info = native.build_info()
    return "\n".join([f"spos_fast: {info['summary']}", f"backend: {native.backend()}", "", *lines])
