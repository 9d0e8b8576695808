"""What the placements of DTensors say of a call: which ranks have which classes and tokens, and what each rank has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .._dispatch import is_sharded_by_fsdp
from ..groups import Head
from .collectives import Ranks
from .losses import Layout, checks_by_default
from .problem import Sums

_FSDP = (
    "{name} is a DTensor that fully_shard has sharded over ranks with tokens of their own. Call the module that owns "
    "it instead of reading its parameters; or call module.unshard() before; or let monosoftmax.distributed.prepare("
    "model), which calls torch.distributed.fsdp.register_fsdp_forward_method, gather for methods that are not forward"
)


class Placed(NamedTuple):
    """How a mesh shares out a call."""

    mesh: DeviceMesh
    #: The mesh dimension that shares out the classes, and those that share out tokens, with the tensor dimension.
    classes: int | None
    tokens: dict[int, int]
    #: Whether the gradient of the input is left as a part, to be scattered.
    scatters: bool = False

    def vocabulary(self) -> Ranks:
        return Ranks.alone() if self.classes is None else Ranks(self.mesh.get_group(self.classes))

    def token_ranks(self) -> tuple[Ranks, ...]:
        return tuple(Ranks(self.mesh.get_group(each)) for each in self.tokens)

    def of_tokens(self) -> list[Placement]:
        """The placements of what each token has one of, or a row of."""
        every: list[Placement] = [Replicate()] * self.mesh.ndim
        for mesh_dim, dim in self.tokens.items():
            every[mesh_dim] = Shard(dim)
        return every

    def whole(self, local: Tensor, shape: Sequence[int], columns: int | None = None) -> Tensor:
        """``local`` as a result of ``shape``: a DTensor where it is shared out. ``columns`` is the dimension of V."""
        placements = self.of_tokens()
        if columns is not None and self.classes is not None:
            placements[self.classes] = Shard(columns)
        if all(isinstance(each, Replicate) for each in placements):
            return local
        whole = torch.empty(shape, device="meta")
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )


def placed_head(head: Head, names: tuple[str, str] = ("linear_weight", "linear_bias")) -> Placed:
    """Where the classes and the tokens of a head are; errors call its weight and its bias by ``names``."""
    of_weight, of_bias = names
    input, weight, bias = head
    if not isinstance(weight, DTensor):
        raise TypeError(f"{of_weight} must be a DTensor on the mesh of input, where input is one, got a plain tensor")
    _check(weight, of_weight)
    if bias is not None:
        if (
            not isinstance(bias, DTensor)
            or bias.placements != weight.placements
            or bias.device_mesh != weight.device_mesh
        ):
            raise ValueError(f"{of_bias} must be a DTensor that is placed like {of_weight}")
        _check(bias, of_bias)
    mesh, tokens, classes, scatters = weight.device_mesh, dict[int, int](), list[int](), False
    of_input = _placements(input, "input", mesh)
    for mesh_dim, (w, x) in enumerate(zip(weight.placements, of_input, strict=True)):
        if w == Shard(0):
            classes.append(mesh_dim)
            scatters = scatters or not isinstance(x, Replicate)
        elif not isinstance(w, Replicate):
            raise NotImplementedError(
                f"{of_weight} must be placed as Shard(0), its classes, or Replicate, got {weight.placements}"
            )
        elif isinstance(x, Shard) and x.dim % input.dim() < input.dim() - 1:
            tokens[mesh_dim] = x.dim % input.dim()
    return Placed(mesh, _only(classes, of_weight), tokens, scatters)


def placed_logits(logits: Tensor, class_dim: int) -> Placed:
    """Where the classes and the tokens of logits are."""
    if not isinstance(logits, DTensor):
        raise TypeError("input must be a DTensor where another argument is one, got a plain tensor")
    _check(logits, "input")
    tokens, classes = dict[int, int](), list[int]()
    for mesh_dim, each in enumerate(logits.placements):
        if not isinstance(each, Shard):
            continue
        if each.dim % logits.dim() == class_dim:
            classes.append(mesh_dim)
        else:
            tokens[mesh_dim] = each.dim % logits.dim()
    return Placed(logits.device_mesh, _only(classes, "input"), tokens)


def _only(mesh_dims: list[int], name: str) -> int | None:
    if len(mesh_dims) > 1:
        raise NotImplementedError(f"{name} must have its classes on one dimension of the mesh, got {mesh_dims}")
    return mesh_dims[0] if mesh_dims else None


def _check(tensor: DTensor, name: str) -> None:
    if is_sharded_by_fsdp(tensor):
        raise NotImplementedError(_FSDP.format(name=name))
    for each in tensor.placements:
        if type(each) not in (Shard, Replicate, Partial):
            raise NotImplementedError(f"{name} must be placed as Shard, Replicate or Partial, got {tensor.placements}")


def _placements(tensor: Tensor, name: str, mesh: DeviceMesh) -> Sequence[Placement]:
    if isinstance(tensor, DTensor):
        _check(tensor, name)
        if tensor.device_mesh != mesh:
            raise ValueError(f"{name} must be on the mesh {mesh}, got {tensor.device_mesh}")
        return tensor.placements
    if mesh.ndim > 1:
        raise ValueError(f"{name} must be a DTensor, to say which ranks of {mesh} have the same tokens")
    return [Replicate()]


def _local(tensor: Any, mesh: DeviceMesh, placements: Sequence[Placement], *, scatters: bool = False) -> Any:
    """The part of a rank, once the tensor is placed so; a plain tensor is whole on all ranks."""
    if not isinstance(tensor, Tensor):
        return tensor
    if not isinstance(tensor, DTensor):
        if all(isinstance(each, Replicate) for each in placements):
            return tensor
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    of_gradient = None
    if scatters:
        of_gradient = [Partial() if isinstance(p, Replicate) and not isinstance(q, Replicate) else p
                       for p, q in zip(placements, tensor.placements, strict=True)]  # fmt: skip
    if tuple(tensor.placements) != tuple(placements):
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local(grad_placements=of_gradient)


def local_head(head: Head, placed: Placed) -> Head:
    input = _local(head.input, placed.mesh, placed.of_tokens(), scatters=placed.scatters)
    weight, bias = cast(DTensor, head.linear_weight), cast("DTensor | None", head.linear_bias)
    return Head(input, weight.to_local(), None if bias is None else bias.to_local())


def layout_of(placed: Placed, local: Tensor, classes: int, columns: int) -> Layout:
    """The layout of a call; ``columns`` of the ``classes`` are here, as torch shards them evenly."""
    ranks = placed.vocabulary()
    share = -(-classes // ranks.size)
    start = min(ranks.rank * share, classes)
    if columns != min(share, classes - start):
        raise ValueError(
            f"a DTensor of {classes} classes over {ranks.size} ranks must have {min(share, classes - start)} of them "
            f"on rank {ranks.rank}, got {columns}: other shares are for monosoftmax.distributed.linear_cross_entropy"
        )
    tokens = placed.token_ranks()
    sums = Sums(input=not placed.scatters, tokens=tokens)
    return Layout(ranks, start, classes, sums, tokens=tokens, check=ranks.size > 1 and checks_by_default(local))


def local_target(target: Any, placed: Placed, *, class_dim: int | None = None) -> Any:
    """The targets of this rank's tokens; the tokens' dimensions are those of logits without ``class_dim``."""
    placements = placed.of_tokens()
    if class_dim is not None:
        placements = [
            Shard(each.dim - (each.dim > class_dim)) if isinstance(each, Shard) else each for each in placements
        ]
    return _local(target, placed.mesh, placements)


def replicated(tensor: Any, placed: Placed) -> Any:
    """A number, or the whole tensor on each rank."""
    return _local(tensor, placed.mesh, [Replicate()] * placed.mesh.ndim)


def local_logits(logits: Tensor, placed: Placed, class_dim: int) -> Tensor:
    placements = placed.of_tokens()
    if placed.classes is not None:
        placements[placed.classes] = Shard(class_dim)
    return _local(logits, placed.mesh, placements)  # type: ignore[no-any-return]
