"""Many processes, one model: gradients averaged or parameters in shards (FSDP2), long rows in parts (context parallelism), and
checkpoints that any number of processes can read.

    torchrun --nproc-per-node 8 train.py --stage 3 --preset molmo2-8b --context-parallel 8

The processes form a grid. Those of one column hold different batches (data parallelism); those of one row work on the same
batch, each on a part of its tokens and of its pictures (context parallelism, groups of 8 in stage 3):

                    context 0   context 1                        tokens of a row       heads
        data 0      process 0   process 1     same batch      process 0  [a a a a . . . .]     [A A . .]  of all tokens
        data 1      process 2   process 3     another         process 1  [. . . . a a a a] <-> [. . A A]  of all tokens

Everything but attention works on tokens one by one, so a part of the row is enough. For attention (Ulysses) an all-to-all
exchanges parts of the row with all heads for the whole row with a part of the heads, and back: any mask will do. Every
parameter, gradient and optimiser state is cut over all processes; of a small model each process keeps the whole. A process
without pictures runs ViT, connector and pointing head on empty inputs, so that it joins every collective operation.

    loss of a process = its weighted sum of losses / (mean over processes of the summed weights)

so that the mean of the gradients over processes is the gradient of (all weighted sums) / (all weights), however the tokens are
distributed. (`train.py` divides the gradients after they are averaged, which is the same: then all weights of the step are known.)

B sequences, T tokens, C processes in a context group.
"""

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

import weights
from attention import Mask
from model import Batch, Molmo

# their names since torch 2.13, and before
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
TIMEOUT = timedelta(minutes=30)  # how long a process waits for the others, which may be evaluating or writing


# ---------------------------------------------------------------------------------------------------------------------
# The processes


@dataclass(frozen=True)
class World:
    """Who takes part. Alone, everything here does nothing."""

    rank: int = 0
    size: int = 1
    context: int = 1                 # processes that work on one batch
    mesh: DeviceMesh | None = None   # all processes in one dimension; parameters are sharded over them
    group: dist.ProcessGroup | None = None  # those of the own batch

    @property
    def data_rank(self) -> int:
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        return self.size // self.context

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def collect(self, value) -> list:
        """What each process holds, by rank; small things."""
        values = [value] * self.size
        if self.mesh is not None:
            dist.all_gather_object(values, value)
        return values

    def totals(self, values: dict[str, float]) -> Counter:
        """Numbers by name -> their sums over all processes. Every process has the same names in the same order."""
        if self.mesh is None:
            return Counter(values)
        sums = self.sum(torch.tensor([*values.values()], dtype=torch.float64, device=self.mesh.device_type))
        return Counter(dict(zip(values, sums.tolist())))

    def any(self, here: bool) -> bool:
        """Is it so anywhere?"""
        return bool(self.totals({"here": here})["here"])

    def names(self, own: Sequence[str]) -> list[str]:
        """The names of all processes together, each once: a context group has the same."""
        return list(dict.fromkeys(name for names in self.collect(list(own)) for name in names))

    def agree(self, batch: Batch) -> Batch:
        """The batch. ValueError, in the whole context group, if its processes hold different ones, by the sizes and by sums of tokens and of
        pixels weighted by their places: perhaps one of them could not read a file."""
        if self.context > 1:
            by_place = lambda x: (x * torch.arange(1, len(x) + 1, device=x.device)).sum()
            sums = by_place(batch.tokens.flatten()), by_place(batch.crops.flatten(1).sum(1, dtype=torch.long))
            sizes = map(batch.tokens.new_tensor, (batch.tokens.numel(), len(batch.crops), batch.pooling.numel()))
            own = torch.stack([*sums, *sizes])
            found = own.new_empty(self.context, len(own))
            all_gather(found, own[None], group=self.group)
            if (found != found[0]).any():
                raise ValueError("the processes of a context group have read different batches: do all see the same files?")
        return batch

    def wait(self):
        if self.mesh is not None:
            dist.barrier()


@contextmanager
def said_once():
    """Around work that all processes do alike: only one process of each machine reports bad input."""
    try:
        yield
    except ValueError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(2) from None
        raise


@contextmanager
def together(device: str, context: int):
    """The world as torchrun's environment has it (one process without), left at the end. ValueError if it cannot be cut into
    groups of `context`."""
    if "RANK" not in os.environ:
        if context > 1:
            raise ValueError(f"--context-parallel {context} needs as many processes: start with torchrun --nproc-per-node {context}")
        yield World(), device
        return
    rank, size, kind = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.device(device).type
    with said_once():  # before any of them waits for another
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("many processes are started with torchrun: LOCAL_RANK is missing")
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"--device {device}: many processes share a model on CPUs or by CUDA only")
        if size % context:
            raise ValueError(f"--context-parallel {context}: {size} processes cannot be cut into such groups")
    if kind == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT, device_id=torch.device(device) if kind == "cuda" else None)
    done = False
    try:
        mesh = init_device_mesh(kind, (size,))
        grid = init_device_mesh(kind, (size // context, context), mesh_dim_names=("data", "context"))
        yield World(rank, size, context, mesh, grid.get_group("context")), device
        done = True
    except dist.DistError as error:
        raise _gone(error) from None
    except RuntimeError as error:
        if any(word in str(error).lower() for word in ("connection", "gloo", "nccl", "timed out")):
            raise _gone(error) from None
        raise
    finally:
        if dist.is_initialized() and (done or kind == "cpu"):  # NCCL would wait for the others, and they for this process
            dist.destroy_process_group()


def _gone(error: Exception) -> ValueError:
    return ValueError(f"another process has gone or is stuck ({(str(error).splitlines() or [type(error).__name__])[0][:120]}): "
                      "start again with --resume, which goes on from the last checkpoint")


# ---------------------------------------------------------------------------------------------------------------------
# Context parallelism: collectives with a gradient


class _Exchange(torch.autograd.Function):
    """All-to-all: cut along one dimension, one piece for each process; what arrives is joined along another."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, cut: int, join: int) -> Tensor:
        ctx.group, ctx.cut, ctx.join = group, cut, join
        sent = torch.stack(x.chunk(dist.get_world_size(group), dim=cut))
        arrived = torch.empty_like(sent)
        dist.all_to_all_single(arrived, sent, group=group)
        return torch.cat(arrived.unbind(), dim=join)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Exchange.apply(gradient, ctx.group, ctx.join, ctx.cut), None, None, None


class _Gather(torch.autograd.Function):
    """All-gather along the first dimension; back, everyone's gradient of a part is summed where the part came from."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
        all_gather(whole, x.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx, gradient: Tensor):
        part = gradient.new_empty(len(gradient) // dist.get_world_size(ctx.group), *gradient.shape[1:])
        reduce_scatter(part, gradient.contiguous(), group=ctx.group)
        return part, None


class Ulysses(NamedTuple):
    """Attention of whole rows with a part of the heads, between parts of rows with all heads. (arXiv 2309.14509.)"""

    mask: Mask  # of the whole row
    group: dist.ProcessGroup

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, heads, T / C, head_width), k, v (B, kv_heads, T / C, head_width) -> as q. Where there are fewer key heads
        than processes, each goes to several."""
        copies = math.lcm(k.shape[1], dist.get_world_size(self.group)) // k.shape[1]
        k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
        q, k, v = (_Exchange.apply(x, self.group, 1, 2) for x in (q, k, v))  # (B, heads / C, T, head_width)
        return _Exchange.apply(self.mask.attend(q, k, v), self.group, 2, 1)


class Context:
    """How a model shares a batch with the other processes of its context group; takes the place of `model.Alone`."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def mask(self, mask: Mask) -> Ulysses:
        return Ulysses(mask, self.group)

    def part(self, x: Tensor | None) -> Tensor | None:
        """The own part of (B, T, ...) along T."""
        return x if x is None else x.chunk(self.size, dim=1)[self.rank]

    def whole(self, x: Tensor) -> Tensor:
        """(B, T / C, ...) -> (B, T, ...)."""
        return _Gather.apply(x.transpose(0, 1), self.group).transpose(0, 1)

    def own(self, weights: Tensor) -> Tensor:
        """(B, T) with zeros outside the own part: everyone answers for the loss there."""
        mine = torch.zeros_like(weights)
        self.part(mine).copy_(self.part(weights))
        return mine

    def spread(self, module: Callable, *rows: Tensor) -> Tensor:
        """module(*rows) with the rows (n, ...) shared out; the last ones may be counted twice, to make the shares equal."""
        n = len(rows[0])
        if n == 0:
            return module(*rows)
        each = -(-n // self.size)
        share = torch.arange(self.rank * each, (self.rank + 1) * each, device=rows[0].device).clamp(max=n - 1)
        return _Gather.apply(module(*(x[share] for x in rows)), self.group)[:n]


# ---------------------------------------------------------------------------------------------------------------------
# Small models whole in every process, large ones in shards (FSDP2)


def replicate(model: Molmo, world: World, device: str) -> Molmo:
    """The same model in every process, in float32, if it and its optimiser fit there: less to send than shards, which are
    gathered block by block. Gradients are averaged by `average`."""
    model.to(device, torch.promote_types(next(model.parameters()).dtype, torch.float32))
    if world.context > 1:
        model.context = Context(world.group)
    if world.mesh is not None:
        for p in model.parameters():
            dist.broadcast(p.detach(), 0)
    return model


@torch.no_grad()
def average(model: nn.Module, world: World) -> None:
    """Gradients become their mean over processes, in one message. Those of shards are that already."""
    if world.mesh is None or is_sharded(model):
        return
    learned = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
    means = world.sum(torch.cat([g.flatten() for g in gradients])) / world.size
    for p, mean in zip(learned, means.split([p.numel() for p in learned])):
        p.grad = mean.view_as(p)


def shard(model: Molmo, world: World, device: str, recompute: bool = False, half: bool = False) -> Molmo:
    """Cuts the model over all processes, block by block: gathered when used, gone when not. Parameters and the reduction of
    gradients stay float32; with `half` it computes in bfloat16. `recompute`: blocks keep their input only
    and run again in the backward pass (activation checkpointing)."""
    if recompute:
        for block in (*model.vit.blocks, *model.blocks):
            block.forward = _recomputed(block.forward)
    if world.context > 1:
        model.context = Context(world.group)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    uncast = replace(policy, cast_forward_inputs=False)  # the model's input is a Batch, whose loss weights stay float32
    for module in (*model.vit.blocks, model.vit, model.connector, *model.blocks, model):
        module.to(device, torch.promote_types(next(module.parameters()).dtype, torch.float32))  # one at a time, for memory
        if world.mesh is not None:
            for p in module.parameters():
                if not isinstance(p, DTensor):
                    dist.broadcast(p.detach(), 0)
            fully_shard(module, mesh=world.mesh, mp_policy=uncast if module is model else policy)
    register_fsdp_forward_method(model, "losses")
    return model


def _recomputed(forward: Callable) -> Callable:
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def full(x: Tensor) -> Tensor:
    """The whole of a tensor that may be in shards."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gather_model(model: Molmo, world: World) -> Molmo | None:
    """The model in the memory of process 0, tensor by tensor; all take part. Alone: the model itself."""
    if world.mesh is None:
        return model
    tensors = {}
    for name, p in model.state_dict().items():
        p = full(p)
        if world.rank == 0:
            tensors[name] = p.cpu().clone()
    if world.rank:
        return None
    with torch.device("meta"):
        copy = Molmo(model.config)
    copy.load_state_dict(tensors, assign=True)
    return copy.train(model.training)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save(folder: Path, moments: dict[str, Tensor], world: World, finish: Callable[..., None]) -> None:
    """A checkpoint of many processes. Process 0 writes the whole model with `finish(also=...)`, which is `weights.save`; the
    optimisers' moments, twice the model's size, are written in shards by all of them at once (none: the model is whole in
    every process, and `finish` writes them). Whole or not at all; the processes share the file system."""
    def shards(fresh: Path) -> None:
        world.wait()  # until process 0 has made the folder
        try:
            if moments:
                dcp.save(moments, checkpoint_id=fresh / "shards")
        except dcp.api.CheckpointException as error:
            raise ValueError(f"{fresh}: cannot be written ({error})") from None

    if world.rank == 0:
        finish(also=shards)
    else:
        shards(weights.unfinished(folder))
    world.wait()


def load(shards: Path, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The moments that `save` was given, now cut as the parameters are, over however many processes there are now; also in one
    process alone. (torch's index of the shards is a pickle: only --resume reads it, in the folder of the own run.)"""
    try:
        stored = dcp.FileSystemReader(shards).read_metadata().state_dict_metadata
        moments = {}
        for name, entry in stored.items():
            p = parameters[name.split("/")[1]]
            moments[name] = torch.zeros_like(p.detach()) if entry.size == p.shape else torch.zeros(entry.size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process loads alone is meant
            dcp.load(moments, checkpoint_id=shards, no_dist=not dist.is_initialized())
    except (Exception, dcp.api.CheckpointException) as error:  # a damaged pickle can raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{shards}: not readable ({reason}): nothing to resume") from None
    return moments


def placed(value: Tensor, p: Tensor) -> Tensor:
    """A tensor of the shape of a parameter, cut and stored as that is."""
    if isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements) if isinstance(p, DTensor) else value.to(p.device)
