"""A model's weights cut over ranks by FSDP2: one group for each layer, one for all the rest
(embedding, final norm, head), and who holds what when.

A layer's weights are gathered before it runs, forward or backward, and let go behind it. No hook of
FSDP's decides that: a pass walks through the layers in one order on every rank, fetches the next one
while a layer computes, and skips what it does not compute with. So the collectives of a pass are the
same on every rank, whatever its rows need: adapters of another depth, no adapter, an early stop, an
error in the middle. Which pass comes next the ranks agree on first (`passes.py`).

A frozen base has nothing to reduce but the adapters' own buffers. Of weights that train, a layer's
gradients are added up over the data ranks when a backward pass leaves it, in fp32, each rank getting
its rows; on ranks that walk along they are zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, UnshardHandle, fully_shard
from torch.distributed.tensor import DTensor

from lorry.adapters.layers.shares import whole_weight
from lorry.backends.distributed.exchange import PeerError
from lorry.backends.distributed.gathered import WholePlaces, can_map, parameters_of
from lorry.backends.distributed.passes import PassKind, PassSchedule
from lorry.backends.distributed.shares import GatheredTensors
from lorry.errors import ConfigError, ContractError
from lorry.models.layer_weights import WHOLE_WEIGHTS, with_rows

# the axes of the device mesh along which weights are cut, and copied
SHARD, REPLICA = "shard", "replica"
# integers as wide as a value, whose sum with zeros keeps every bit
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Holder(nn.Module):
    """Holds what becomes one group of FSDP2's. Nobody calls it, so FSDP2's own hooks never fire, which
    would gather what other ranks do not."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held


@dataclass
class _TrainedWeight:
    """A weight that trains: where it is in the model, as this rank's share or, while its group is
    gathered, ``whole``; how many values a share of it has; and this rank's gradient, fp32."""

    module: nn.Module
    name: str
    size: int
    grad: Tensor
    path: str  # for messages
    whole: nn.Parameter | None = None  # the last that was gathered

    def pop_gradient(self, parts: Tensor) -> None:
        """Move the whole gradient of this rank's pass, if there was one, into ``parts`` [shares, values
        of a share], zeros before."""
        self.whole = whole = self.module.get_parameter(self.name)
        if whole.grad is None:
            return
        flat = whole.grad.reshape(-1)
        whole.grad = None
        # the last shares may have fewer rows, or none
        full, rest = divmod(flat.numel(), self.size)
        parts[:full] = flat[: full * self.size].view(full, self.size)
        if rest:
            parts[full, :rest] = flat[-rest:]


def _group(
    held: nn.Module, mesh: DeviceMesh, others: Collection[nn.Parameter] = frozenset()
) -> FSDPModule:
    """A module's parameters but those of ``others``, as one group. Raises ConfigError for packed ones
    under a torch that cannot cut them."""
    try:
        return fully_shard(_Holder(held), mesh=mesh, ignored_params=set(others))
    except RuntimeError as error:
        # until it was mended FSDP2 made parameters that want gradients, of which integers have none
        if all(p.is_floating_point() for p in held.parameters()):
            raise
        raise ConfigError(
            f"backend=fsdp: FSDP2 of torch {torch.__version__} cannot cut packed matrices ({error}); that of "
            "torch 2.13 can, and backend=ddp needs nothing of it"
        ) from error


class ShardedWeights:
    """The weights of ``model``, whose layers are ``layers`` in the order they run, cut over the ranks
    of ``mesh`` (shard, or replica x shard).

    ``explained``: what torch raises inside becomes a PeerError;
    ``reshard_after_forward``: whether layers are let go behind their forward pass, and fetched again
    for the backward.
    """

    sharded = True

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        mesh: DeviceMesh,
        schedule: PassSchedule,
        explained: Callable[[str], AbstractContextManager[None]],
        *,
        reshard_after_forward: bool = True,
    ) -> None:
        self.mesh, self.schedule, self.explained = mesh, schedule, explained
        self.reshard_after_forward = reshard_after_forward
        self.layers = [_group(layer, mesh) for layer in layers]
        self.rest = _group(model, mesh, {p for layer in layers for p in layer.parameters()})
        self.places: WholePlaces | None = None  # of weights that are being read
        self._new_groups = self.layers  # those of layers that have not been gathered yet
        self._resized = False  # whether the rest has weights of another shape than its group
        self.number = schedule.join(self)
        self.lowest_trained = 0  # the lowest layer that a backward pass has to reach
        self._order: range | None = None  # of the pass being walked
        self._kind: PassKind = "forward"
        self._place = -1  # in that order, of the layer that is whole
        self._next: UnshardHandle | None = None  # of the layer behind it
        self._keeps_rest = False
        # what trains, by its group
        self._trained: dict[FSDPModule, list[_TrainedWeight]] = {}

    # --- passes

    def forward_pass(self) -> AbstractContextManager[None]:
        """See `LayerWeights.forward_pass`; all ranks walk it."""
        return self._begin("forward")

    def backward_pass(self) -> AbstractContextManager[None]:
        """See `LayerWeights.backward_pass`; all ranks walk it."""
        return self._begin("backward")

    @contextmanager
    def _begin(self, kind: PassKind) -> Iterator[None]:
        self.schedule.begin(self.number, kind)
        with self._walk(kind):
            yield

    def walk_along(self, kind: PassKind, number: int = 0) -> None:
        """Take part in a pass of other ranks: everything is gathered, nothing computed."""
        with self._walk(kind):
            pass

    @contextmanager
    def _walk(self, kind: PassKind) -> Iterator[None]:
        if self._order is not None:
            raise ContractError("a pass through sharded weights began inside another one")
        try:
            self._enter(kind)
            try:
                yield
            except PeerError:
                raise  # who is left would wait for each layer anew
            except BaseException:
                self.finish_pass()
                raise
            self.finish_pass()
            self._refuse_late_gradients()
        finally:
            self._order = self._next = None

    def _enter(self, kind: PassKind) -> None:
        forward, count = kind == "forward", len(self.layers)
        self._order = range(count) if forward else range(count - 1, self.lowest_trained - 1, -1)
        self._kind, self._place = kind, -1
        self._bind()
        with self.explained("weights of a pass"):
            self.rest.unshard()
        self._fetch(0)

    def finish_pass(self) -> None:
        """See `Walker.finish_pass`: also behind an early stop or an error other ranks are walking the
        same pass."""
        if self._order is None:
            return
        while self._place < len(self._order):
            self._advance()
        if self._kind == "backward":
            self._reduce(self.rest)
        self._order = None

    def reach(self, layer: int) -> None:
        """See `LayerWeights.reach`. Raises ContractError outside a pass, or against its order."""
        if self._order is None or layer not in self._order:
            raise ContractError(
                f"layer {layer} of a model whose weights are cut over ranks runs outside a pass; "
                "let the backend make the step"
            )
        place = self._order.index(layer)
        if place < self._place:
            if self._kind == "forward":
                raise ContractError(
                    f"layer {layer} does not come next in a pass through the layers"
                )
            # several forward passes in one graph (frames of a model of transformers): down once more
            self.finish_pass()
            # others may have a pass of their own first
            self.schedule.begin(self.number, "backward")
            self._enter("backward")
        while self._place < place:
            self._advance()

    def _advance(self) -> None:
        """One layer on: let the last one go, have the next one whole, fetch the one behind it."""
        assert self._order is not None
        if self._place >= 0:
            left = self.layers[self._order[self._place]]
            if self._kind == "backward":
                self._reduce(left)
            if self.reshard_after_forward or self._kind == "backward":
                left.reshard()
        self._place += 1
        fetched, self._next = self._next, None
        if fetched is not None:
            with self.explained(f"weights of layer {self._order[self._place]}"):
                fetched.wait()
        self._fetch(self._place + 1)

    def _fetch(self, place: int) -> None:
        assert self._order is not None
        self._next = None
        if place < len(self._order):
            with self.explained(f"weights of layer {self._order[place]}"):
                self._next = self.layers[self._order[place]].unshard(async_op=True)

    def release(self) -> None:
        """Hold this rank's share alone: to be called where no graph is left."""
        for group in self.layers if self._keeps_rest else (*self.layers, self.rest):
            group.reshard()

    def keep_rest(self) -> None:
        """See `LayerWeights.keep_rest`."""
        self.agree("a model's head")
        self._keeps_rest = True
        self._bind()
        with self.explained("a model's head"):
            self.rest.unshard()

    def _bind(self) -> None:
        """Before the first gather: by then the weights have been read."""
        if self._resized:
            self._regroup_rest()
        if self.places is not None:
            self.places.bind(self._new_groups, self.rest)
            self.places, self._new_groups = None, []

    @torch.no_grad()
    def resize(self, module: nn.Module, name: str, rows: int) -> None:
        """See `LayerWeights.resize`; meanwhile all of it is there on every rank."""
        self.agree("rows of a weight")
        self.release()
        weight = module.get_parameter(name)
        with self.explained("rows of a weight"):
            grown = with_rows(whole_weight(weight), rows)
        # a copy: a view would keep all of it
        share = self.keep(grown, grown[self.local_rows(grown)].clone())
        setattr(module, name, self._parameter(share, weight, grown))
        self._resized = True

    def _regroup_rest(self) -> None:
        """Let FSDP2 know of weights that have another shape than when it first saw them."""
        model = cast(_Holder, self.rest).held
        for known in parameters_of(self.rest):  # of the group that is no more
            known._post_load_hook_handle.remove()
        inner = {p for layer in self.layers for p in cast(_Holder, layer).held.parameters()}
        held = [
            (module, name, p)
            for module in model.modules()
            for name, p in module.named_parameters(recurse=False)
            if p not in inner
        ]
        # as where they were read: groups are made of parameters without memory (tied ones are one)
        empty = {
            p: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=False)
            for _, _, p in held
        }
        for module, name, p in held:
            setattr(module, name, empty[p])
        self.rest = _group(model, self.mesh, inner)
        for module, name, p in held:
            setattr(module, name, p)
        self._resized = False

    # --- weights that train

    def add_gradients_to(self, grads: Mapping[nn.Parameter, Tensor]) -> None:
        """See `adapters.layers.shares.WeightShares.add_gradients_to`."""
        wanted = {id(weight): grad for weight, grad in grads.items()}
        for group in (*self.layers, self.rest):
            found = list[_TrainedWeight]()
            for path, module in cast(_Holder, group).held.named_modules():
                for name, weight in module.named_parameters(recurse=False):
                    # popped: a weight may have two names, and the model has its layers' too
                    if (grad := wanted.pop(id(weight), None)) is not None:
                        rows = -(-weight.shape[0] // self._shares)
                        size = rows * weight.shape[1:].numel()
                        found.append(_TrainedWeight(module, name, size, grad, f"{path}.{name}"))
            self._trained[group] = found

    def _reduce(self, group: FSDPModule) -> None:
        """Add the gradients of a group that is whole, summed over the data ranks, to this rank's."""
        trained = self._trained.get(group)
        if not trained:
            return
        sizes = [each.size for each in trained]
        shares = trained[0].grad.new_zeros(self._shares, sum(sizes))
        for each, parts in zip(trained, shares.split(sizes, 1), strict=True):
            each.pop_gradient(parts)
        own = shares.new_empty(sum(sizes))
        with self.explained("gradients of trained weights"):
            torch.distributed.reduce_scatter(
                own, list(shares.unbind()), group=self.mesh.get_group(SHARD)
            )
            if self.mesh.ndim > 1:
                torch.distributed.all_reduce(own, group=self.mesh.get_group(REPLICA))
        for each, part in zip(trained, own.split(sizes), strict=True):
            each.grad.add_(part[: each.grad.numel()].view(each.grad.shape))

    def _refuse_late_gradients(self) -> None:
        """Raise ContractError for a gradient that came when its layer had been left."""
        for trained in self._trained.values():
            for each in trained:
                if each.whole is not None and each.whole.grad is not None:
                    raise ContractError(
                        f"the gradient of {each.path} came behind the backward pass of its layer, "
                        "where it is not added up"
                    )

    @property
    def shard(self) -> int:
        """See `adapters.layers.shares.WeightShares.shard`."""
        return self.mesh.get_local_rank(SHARD)

    @property
    def _shares(self) -> int:
        return self.mesh.size(self.mesh.ndim - 1)

    def add_up(self, what: str, tensor: Tensor) -> Tensor:
        """See `adapters.layers.shares.WeightShares.add_up`."""
        self.agree(what)
        with self.explained(what):
            torch.distributed.all_reduce(tensor, group=self.mesh.get_group(SHARD))
        return tensor

    def whole_tensors(
        self, shares: Mapping[str, tuple[nn.Parameter, Tensor]]
    ) -> Mapping[str, Tensor]:
        """See `adapters.layers.shares.WeightShares.whole_tensors`."""
        return GatheredTensors(
            {name: (weight.shape, share) for name, (weight, share) in shares.items()},
            self.mesh.get_group(SHARD),
            self.schedule,
            self.explained,
        )

    # --- this rank's share

    def agree(self, what: str) -> None:
        """See `WeightShards.agree`."""
        self.schedule.exchange(what, None)

    def local_rows(self, weight: Tensor) -> slice:
        """See `WeightShards.local_rows`: FSDP2 cuts as `torch.chunk` does."""
        rows, share = weight.shape[0], -(-weight.shape[0] // self._shares)
        start = min(share * self.shard, rows)
        return slice(start, min(start + share, rows))

    def keep(self, weight: Tensor, share: Tensor) -> Tensor:
        """See `WeightShards.keep`."""
        if share.device.type != "cpu" or not can_map():  # on a GPU FSDP2's own memory is the best
            return share
        if self.places is None:
            self.places = WholePlaces(self._shares, self.shard)
        return self.places.lay(share, -(-weight.shape[0] // self._shares))

    def parameter(self, weight: Tensor, share: Tensor) -> nn.Parameter:
        """See `WeightShards.parameter`."""
        assert isinstance(weight, DTensor)
        if weight.to_local().shape != share.shape:
            raise AssertionError(
                f"FSDP2 gives this rank {tuple(weight.to_local().shape)} of {tuple(weight.shape)}, "
                f"and {tuple(share.shape)} were read"
            )
        return self._parameter(share, weight, weight)

    @staticmethod
    def _parameter(share: Tensor, like: Tensor, whole: Tensor) -> nn.Parameter:
        """This rank's rows of what has the shape of ``whole``, cut as ``like`` is."""
        assert isinstance(like, DTensor)
        sharded = DTensor.from_local(
            share,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        return nn.Parameter(sharded, requires_grad=False)

    def values_from(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """See `LayerWeights.values_from`."""
        if not isinstance(weight, DTensor):  # an adapter's, or one that a pass has gathered
            # a copy: memory that numpy has seen cannot be let go any more
            return WHOLE_WEIGHTS.values_from(weight, start, stop).clone()
        return self.values_at(weight, torch.arange(start, stop))

    @torch.no_grad()
    def values_at(self, weight: Tensor, positions: Tensor) -> Tensor:
        """See `WeightShards.values_at`: one sum of bits over the shards."""
        if not isinstance(weight, DTensor):  # one that a pass has gathered, on every rank
            return weight.detach().reshape(-1)[positions.to(weight.device)]
        rows, local = self.local_rows(weight), weight.to_local().reshape(-1)
        # not weight[0].numel(): to index a DTensor is to gather all of it
        width = weight.shape[1:].numel()
        at = positions.to(local.device) - rows.start * width
        mine = (at >= 0) & (at < local.numel())
        values = local.new_zeros(len(at))
        values[mine] = local[at[mine]]
        bits = values.view(BITS[values.element_size()]).to(torch.int64)
        # a rank that fails or is stopped on its way here would be waited for
        self.agree("values of the base")
        with self.explained("values of the base"):
            torch.distributed.all_reduce(bits, group=self.mesh.get_group(SHARD))
        return bits.to(BITS[values.element_size()]).view(values.dtype)
