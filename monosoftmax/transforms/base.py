"""The contract of a monotonic pointwise transform f, and the common parts of its parameterisations."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

#: Positive scalars and shifts are clamped to this range. So f stays finite and increasing for every float32 value of a
#: raw parameter that an optimiser step may leave. Inside the range the clamp is the identity.
SCALE_LIMIT = 1e4
SHIFT_LIMIT = 1e4

#: The most pieces of a table of coefficients: up to this number, float32 represents the number of each piece.
MOST_PIECES = 2**24


#: The transforms by their name in kernels, command lines and :meth:`MonotonicTransform.to_dict`.
#: ``transforms/__init__.py`` fills this table. Classes from elsewhere must add their own row.
REGISTRY: dict[str, type[MonotonicTransform]] = {}

#: The same for what has no kernels of its own: :class:`.chain.Scale` and :class:`.chain.Chain`.
COMPOSITIONS: dict[str, type[MonotonicTransform]] = {}

#: Arguments of constructors for the device, the dtype and the random numbers. They do not choose the function f.
_NO_SETTINGS = ("device", "dtype", "generator")


class Around(NamedTuple):
    """What kernels do before and after a transform f: factor f(inner(z)), inner(z) = cap tanh(scale z / cap).

    A cap of 0 stands for none, inner(z) = scale z.
    """

    scale: float = 1.0
    cap: float = 0.0
    factor: float = 1.0


class MonotonicTransform(nn.Module):
    r"""An increasing, pointwise function :math:`f: \mathbb{R} \to \mathbb{R}` on logits.

    A subclass has two faces. As an ``nn.Module`` it holds raw, unconstrained parameters, and is called on a tensor of
    any shape. For the fused kernels it has :meth:`coefficients`, a small tensor that differentiable PyTorch code
    computes from the raw parameters, and :meth:`constants`, numbers that never change. The kernels return the gradient
    of the coefficients, and autograd computes from it the gradient of the raw parameters. :meth:`evaluate` defines f by
    coefficients and constants, in plain PyTorch. Every kernel is tested against it.

    Subclasses outside the package need only :meth:`coefficients`, :meth:`evaluate` and :meth:`evaluate_derivative`:
    with ``kernel = None`` the reference backend takes them. With parameters or buffers they also define
    :meth:`reset_parameters`, and with arguments :meth:`arguments`.

    **Hooks.** Called without an input, a transform returns its coefficients. Losses get them by this call, because
    pruning, the old ``weight_norm`` and ``fully_shard`` prepare the parameters in hooks, which run before a call of the
    module, but before no other method. So hooks on a transform see two kinds of calls: with logits, and without
    arguments.

    **FSDP.** ``fully_shard(transform)`` needs nothing else. If f belongs to the group of a module around it, its
    parameters are whole only while ``forward`` of that module runs. Elsewhere they are DTensors, which every method
    refuses: a shard would be taken for the whole parameter.

    **Precision.** Raw parameters are float32 or float64, never half. Around 0.54, where the raw slopes of a
    :class:`~monosoftmax.transforms.PLIF` start, bfloat16 numbers lie 1/256 apart, so that a step of 1e-3, which is
    typical for AdamW, rounds to no step at all. Therefore ``model.bfloat16()``, ``.half()`` and ``.to(dtype)`` leave a
    transform in float32, with its values unrounded, and a half-precision default dtype is widened. The cost is
    negligible, because coefficients are computed in float32 anyway and are few. FSDP with mixed precision keeps the
    sharded parameters of the optimiser in float32, but the forward pass sees them rounded to ``param_dtype``. Its own
    ``fully_shard(transform)``, without a policy and before the modules around it, avoids the rounding. In a model with
    half-precision parameters it is needed anyway, since FSDP wants one dtype in a group.

    Raises:
        NotImplementedError: (when called) parameters are DTensors.
    """

    #: The name of the fused kernels of this transform (``csrc/transforms``, ``triton_kernels/transforms``).
    kernel: str | None = None
    #: True if f(-inf) is finite, so that a logit of -inf keeps some probability.
    bounded_below: bool = False
    #: The names of :meth:`arguments` where they are not those of the constructor.
    setting_names: ClassVar[Sequence[str] | None] = None

    def __init__(self) -> None:
        # No arguments, unlike nn.Module, so that to_dict() knows the arguments of a subclass without __init__.
        super().__init__()

    def coefficients(self) -> Tensor:
        """The coefficients for kernels: a vector [P] with P <= 64, or a table [R, K] of R coefficients for K pieces.

        A subclass defines this method, and computes it from the attributes of its raw parameters. Callers use
        ``transform()`` instead, so that hooks run.
        """
        raise NotImplementedError

    def constants(self) -> tuple[float, ...]:
        """Numbers for kernels, in addition to the coefficients. They are never learned."""
        return ()

    @property
    def around(self) -> Around:
        """What kernels do before and after f. Of a single transform: nothing."""
        return Around()

    @property
    def table_size(self) -> int:
        """K of a table of coefficients [R, K], which may be too large for a backend; 0 if they are a vector."""
        return 0

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        """f(z), for z and coefficients of one floating-point type."""
        raise NotImplementedError

    def evaluate_derivative(self, z: Tensor, coefficients: Tensor) -> Tensor:
        """f'(z), for z and coefficients of one floating-point type. At a kink: the derivative from the right."""
        raise NotImplementedError

    def evaluate_inverse(self, y: Tensor, coefficients: Tensor) -> Tensor:
        """z with f(z) = y, for y and coefficients of one floating-point type."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse in closed form")

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, as values of JSON, without ``device``, ``dtype`` and ``generator``. A
        subclass with other arguments defines this method.
        """
        return {}

    def to_dict(self) -> dict[str, Any]:
        """The settings of f, ``{"type": name, **arguments}``, for :func:`monosoftmax.transforms.from_dict`.

        The learned values are not in it, but in ``state_dict()``.

        Raises:
            ValueError: the class is not in ``monosoftmax.transforms.REGISTRY``.
            NotImplementedError: :meth:`arguments` does not return the arguments that the constructor takes.
        """
        # Skips the classes that torch derives on the fly, such as ParametrizedPLIF and FSDPPLIF.
        kind = next(each for each in type(self).__mro__ if not each.__module__.startswith("torch."))
        name = next((name for name, known in (REGISTRY | COMPOSITIONS).items() if known is kind), None)
        if name is None:
            raise ValueError(
                f"{kind.__name__} has no name to be saved under: add a row to monosoftmax.transforms.REGISTRY, "
                f'such as REGISTRY["{kind.__name__.lower()}"] = {kind.__name__}'
            )
        arguments = self.arguments()
        odd = set(arguments).symmetric_difference(settings_of(kind))
        if odd:
            raise NotImplementedError(
                f"{kind.__name__}.arguments() must return the arguments of {kind.__name__}.__init__, they differ in "
                f"{', '.join(sorted(odd))}"
            )
        return {"type": name, **arguments}

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> MonotonicTransform:
        """The transform with these :meth:`arguments`, whose names are right."""
        return cls(**arguments)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments().items())

    def reset_parameters(self) -> None:
        """Restore the values that f was built with, also on a device after ``to_empty``.

        Raises:
            NotImplementedError: the subclass has parameters or buffers and does not define this method.
        """
        if self._parameters or self._buffers:
            raise NotImplementedError(
                f"{type(self).__name__} has parameters or buffers and must define reset_parameters()"
            )

    def _raw(self, name: str) -> Tensor:
        """The parameter or buffer ``name``, for writing."""
        raw = self._parameters.get(name, self._buffers.get(name))
        if raw is None:
            # The attribute was computed from other parameters, so that writing to it would change nothing.
            raise RuntimeError(
                f"{name} is not a parameter or buffer of this {type(self).__name__}: "
                "remove its parametrization, pruning or weight norm before reset_parameters()"
            )
        return raw

    def forward(self, input: Tensor | None = None) -> Tensor:
        """f(input), elementwise; without an input, the coefficients.

        float16 and bfloat16 are computed in float32, and rounded once.
        """
        # DTensors are recognised by an attribute: an import of torch.distributed takes a second, and some builds have
        # none. A transform of plain parameters needs no walk over their names.
        sharded: list[str] = []
        if self._modules or any([type(raw) is not nn.Parameter for raw in self._parameters.values()]):
            sharded = self._sharded()
        if sharded:
            raise NotImplementedError(
                f"transform has parameters that are DTensors ({', '.join(sharded)}), as those of fully_shard(module) "
                "are outside of module.forward. Call module itself; or, for another of its methods, apply torch."
                'distributed.fsdp.register_fsdp_forward_method(module, "<method>") or call module.unshard() before'
            )
        coefficients = self.coefficients()
        return coefficients if input is None else _elementwise(self.evaluate, input, "input", coefficients)

    def _sharded(self) -> list[str]:
        """The names of the parameters that are DTensors."""
        return [name for name, raw in self.named_parameters() if hasattr(raw, "full_tensor")]

    def derivative(self, input: Tensor) -> Tensor:
        """f'(input), elementwise, in the dtype of ``input``."""
        return _elementwise(self.evaluate_derivative, input, "input", self())

    def inverse(self, output: Tensor) -> Tensor:
        """The z with f(z) = ``output``, elementwise; NaN outside the range of f.

        Raises:
            NotImplementedError: f has no inverse in closed form or by table.
        """
        return _elementwise(self.evaluate_inverse, output, "output", self())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MonotonicTransform:
        def unless_half(raw: Tensor) -> Tensor:
            changed = fn(raw)
            if changed.is_floating_point() and changed.dtype != arithmetic_dtype(changed.dtype):
                # From the values before the cast, since the cast has rounded them.
                return raw.to(changed.device, arithmetic_dtype(raw.dtype))
            return changed

        super()._apply(unless_half, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # state_dict may be changed, as hooks of torch change it: load_state_dict() copies the caller's dict. Changes
        # reach modules below, such as parametrizations.
        for name, raw in [*self.named_parameters(), *self.named_buffers()]:
            entry = state_dict.get(prefix + name)
            if not isinstance(entry, Tensor):
                continue
            if entry.dim() == 0 and raw.shape == (1,):  # older versions saved scalars as 0-dim
                state_dict[prefix + name] = entry = _shared_like(entry.detach().reshape(1), raw)
            if entry.dtype in (torch.float16, torch.bfloat16):  # assign=True would make it the parameter
                state_dict[prefix + name] = entry.detach().float()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __prepare_scriptable__(self) -> MonotonicTransform:
        raise NotImplementedError(
            f"{type(self).__name__} cannot be scripted: TorchScript lacks much of Python. Use torch.compile"
        )


def _shared_like(entry: Tensor, raw: Any) -> Tensor:
    """Shards ``entry``, which is whole on every rank, like ``raw``: torch.distributed cannot cut scalars."""
    if not hasattr(raw, "device_mesh") or hasattr(entry, "device_mesh"):
        return entry
    from torch.distributed.tensor import distribute_tensor

    mesh = raw.device_mesh
    return distribute_tensor(entry.to(mesh.device_type), mesh, raw.placements, src_data_rank=None)


def _elementwise(
    function: Callable[[Tensor, Tensor], Tensor], argument: Tensor, name: str, coefficients: Tensor
) -> Tensor:
    if not isinstance(argument, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(argument).__name__}")
    if not argument.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {argument.dtype}")
    compute = arithmetic_dtype(argument.dtype)
    return function(argument.to(compute), coefficients.to(argument.device, compute)).to(argument.dtype)


def from_dict(config: dict[str, Any]) -> MonotonicTransform:
    """The transform that ``config``, from :meth:`MonotonicTransform.to_dict`, describes, as it was built.

    Raises:
        TypeError: ``config`` is no dict, or has names that are no arguments of the transform.
        ValueError: ``"type"`` is missing, or names no transform. The transform's constructor may raise other errors.
    """
    known = REGISTRY | COMPOSITIONS
    if not isinstance(config, dict):
        raise TypeError(f"config must be a dict, got {type(config).__name__}")
    if "type" not in config:
        raise ValueError(f'config must have a "type", one of {", ".join(known)}')
    name = config["type"]
    if not isinstance(name, str) or name not in known:
        raise ValueError(f'config["type"] must be one of {", ".join(known)}, got {name!r}')
    arguments = {key: value for key, value in config.items() if key != "type"}
    names = settings_of(known[name])
    unknown = [key for key in arguments if key not in names]
    if unknown:
        raise TypeError(
            f"{name} has no {', '.join(map(str, unknown))}: its arguments are {', '.join(names) or 'none at all'}"
        )
    return known[name].from_arguments(arguments)


def settings_of(kind: type[MonotonicTransform]) -> list[str]:
    """The names of the arguments that choose f. A constructor with ``**kwargs`` also has its base class's."""
    if kind.setting_names is not None:
        return list(kind.setting_names)
    names: list[str] = []
    for each in kind.__mro__:
        if "__init__" in vars(each):
            parameters = [*inspect.signature(vars(each)["__init__"]).parameters.values()][1:]
            variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            names += [parameter.name for parameter in parameters if parameter.kind not in variable]
            if not any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters):
                break
    return [name for name in names if name not in _NO_SETTINGS]


def raw_tensor(size: int, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Memory for a raw parameter [size], by default of the default dtype, but never less than float32.

    Raises:
        ValueError: ``dtype`` is not float32 or float64.
    """
    if dtype is None:
        dtype = arithmetic_dtype(torch.get_default_dtype())
    elif dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"dtype must be torch.float32 or torch.float64, got {dtype}: an optimiser's steps are lost to rounding in "
            "parameters of half precision. Logits may be of any floating-point type"
        )
    return torch.empty(size, device=device, dtype=dtype)


def coefficients_of(transform: MonotonicTransform, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The coefficients for logits on ``device``, in the type of their arithmetic.

    Raises:
        TypeError: the coefficients were rounded to half precision.
    """
    # Without parameters, a hook has nothing to prepare.
    called = transform._parameters or transform._modules or transform._forward_pre_hooks or transform._forward_hooks
    coefficients: Tensor = transform() if called else transform.coefficients()
    if coefficients.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"transform must have float32 or float64 coefficients, got {coefficients.dtype}: fully_shard(transform) "
            "wants a mixed precision policy without output_dtype, or none"
        )
    if coefficients.dtype == dtype and coefficients.device == device:
        return coefficients
    return coefficients.to(device, dtype)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic on logits of type ``dtype``: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(raw: Tensor, size: int = 1) -> Tensor:
    """A raw parameter [size] in the type of the arithmetic, even if FSDP provides it in half precision.

    Raises:
        NotImplementedError: ``raw`` is of another shape.
    """
    if raw.shape != (size,):
        raise NotImplementedError(
            f"transform has a parameter of shape {tuple(raw.shape)} that was built with shape ({size},), as "
            "FullyShardedDataParallel leaves pieces of parameters outside of forward: call the module that it wraps, "
            "or use FullyShardedDataParallel.summon_full_params(module)"
        )
    dtype = arithmetic_dtype(raw.dtype)
    return raw if raw.dtype == dtype else raw.to(dtype)


def of_pieces(coefficients: Tensor, piece: Tensor) -> tuple[Tensor, ...]:
    """The R rows of a table ``coefficients`` [R, K], each looked up at ``piece``.

    It is one look-up, because of a defect in torch.compile (inductor, torch 2.9 to 2.11, on CPUs). It sets the
    gradients of several tables to zero after summing them, if a reduction over rows, such as in log_softmax, precedes
    the sums in one kernel.
    """
    return coefficients[:, piece].unbind()


def bounded_exp(raw: Tensor, size: int = 1, limit: float = SCALE_LIMIT) -> Tensor:
    """exp(raw), clamped to [1/limit, limit]: a positive scale, exactly 1 at raw = 0. ``raw`` is [size]."""
    bound = math.log(limit)
    return widened(raw, size).clamp(-bound, bound).exp()


def bounded_shift(raw: Tensor, size: int = 1) -> Tensor:
    """raw [size], clamped to [-SHIFT_LIMIT, SHIFT_LIMIT]."""
    return widened(raw, size).clamp(-SHIFT_LIMIT, SHIFT_LIMIT)


def require_finite(name: str, value: float) -> float:
    """``value`` as a float, or a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def require_positive(name: str, value: float, limit: float = SCALE_LIMIT) -> float:
    """``value`` as a float in (0, limit], or a ValueError that names the argument."""
    value = require_finite(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    if not 1 / limit <= value <= limit:
        raise ValueError(f"{name} must be between {1 / limit:g} and {limit:g}, got {value}")
    return value


def require_shift(name: str, value: float) -> float:
    """``value`` as a float in [-SHIFT_LIMIT, SHIFT_LIMIT], or a ValueError that names the argument."""
    value = require_finite(name, value)
    if abs(value) > SHIFT_LIMIT:
        raise ValueError(f"{name} must be between {-SHIFT_LIMIT:g} and {SHIFT_LIMIT:g}, got {value}")
    return value


def require_count(name: str, value: int, largest: int | None = None) -> int:
    """``value`` if it is an int >= 1 (and <= largest), or an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if largest is not None and value > largest:
        raise ValueError(f"{name} must be at most {largest}, got {value}")
    return value


class ScalarTransform(MonotonicTransform):
    """A transform with a few scalar coefficients, each a positive scale (stored as its logarithm) or a shift.

    Learned raw values are parameters, fixed ones are persistent buffers under the same names, so that a state_dict has
    them in both cases. They have the shape (1,), since FSDP takes no scalars.
    """

    def __init__(
        self,
        values: dict[str, float],
        learnable: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """``values`` are the coefficients, in order, by the names of their raw tensors: ``log_`` and the name of the
        argument for a scale, ``raw_`` and the name for a shift.
        """
        super().__init__()
        if not isinstance(learnable, bool):
            raise TypeError(f"learnable must be a bool, got {type(learnable).__name__}")
        #: Whether the constants of this transform are parameters.
        self.learnable = learnable
        self._initial = {
            raw_name: (require_positive if _is_scale(raw_name) else require_shift)(raw_name[4:], value)
            for raw_name, value in values.items()
        }
        for raw_name in values:
            raw = raw_tensor(1, device, dtype)
            if learnable:
                self.register_parameter(raw_name, nn.Parameter(raw))
            else:
                self.register_buffer(raw_name, raw)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Restore the values that f was built with."""
        with torch.no_grad():
            for raw_name, value in self._initial.items():
                self._raw(raw_name).fill_(math.log(value) if _is_scale(raw_name) else value)

    def arguments(self) -> dict[str, Any]:
        return {**{raw_name[4:]: value for raw_name, value in self._initial.items()}, "learnable": self.learnable}

    def coefficients(self) -> Tensor:
        """[P]: the scalars, in the order of the constructor's arguments."""
        raws = {raw_name: getattr(self, raw_name) for raw_name in self._initial}
        return torch.cat([(bounded_exp if _is_scale(name) else bounded_shift)(raw) for name, raw in raws.items()])

    def scalars(self) -> dict[str, Tensor]:
        """The present values as differentiable 0-dim tensors, by the names of the constructor's arguments."""
        return dict(zip((raw_name[4:] for raw_name in self._initial), self().unbind(), strict=True))


def _is_scale(raw_name: str) -> bool:
    return raw_name.startswith("log_")
