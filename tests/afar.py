"""A second device for machines that have none: `python tests/afar.py infer.py ... --device afar`.

Its tensors are computed on the CPU, but they say that they are elsewhere and refuse what a GPU refuses: to meet a tensor of
the CPU in one operation (numbers and indices may come from there), to index one, and, as Apple's, to hold float64. What runs
here puts every tensor on the right device; what is particular to CUDA (compiled attention, graphs, its kernels) is not run.
Of train.py the stages are shortened.
"""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

ops = torch.ops.aten
BETWEEN = {ops.copy_.default, ops._to_copy.default}  # what goes from one device to another
INDEXING = {ops.index.Tensor, ops.index_put.default, ops.index_put_.default, ops._index_put_impl_.default}


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Afar(torch.Tensor):
    """A tensor of the CPU, `inner`, that says it is on the other device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Afar":
        if inner.dtype == torch.float64:
            raise TypeError("no float64 on this device")
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
                                                   dtype=inner.dtype, layout=inner.layout, device=torch.device("afar", 0))

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args: tuple, kwargs: dict):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    afar = [x for x in tensors if isinstance(x, Afar)]
    meeting = [x for i, x in enumerate(args) if i != 1 and isinstance(x, torch.Tensor)] if operation in INDEXING else tensors
    if afar and operation not in BETWEEN and (near := [x for x in meeting if x.dim() > 0 and not isinstance(x, Afar)]):
        raise RuntimeError(f"{operation}: {[tuple(x.shape) for x in near]} on the CPU, the others afar")
    away = isinstance(args[0], Afar) if operation is ops.copy_.default else bool(afar)
    own = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if own.get("device") is not None:
        away, own["device"] = torch.device(own["device"]).type == "afar", "cpu"
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, Afar) else x, (args, own))
    known = {id(x.inner): x for x in afar}
    wrap = lambda x: (known[id(x)] if id(x) in known else Afar(x)) if away and isinstance(x, torch.Tensor) else x
    made = tree_map(wrap, operation(*inner_args, **inner_kwargs))
    return return_and_correct_aliasing(operation, args, kwargs, made) if away and afar and "device" not in own else made


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class Lists(TorchFunctionMode):
    """Between a list and a tensor torch copies where modes do not see it: through the CPU, then."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.tolist and isinstance(args[0], Afar):
            return args[0].inner.tolist()
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return function(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if function is torch.Tensor.new_tensor:
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(args[0].device)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in index), *args[2:]
        return function(*args, **kwargs)


def shortened(stages: dict) -> dict:
    """Rows of `train.STAGES` with less to read and to compute: what a step is made of stays."""
    return {key: replace(stage, packs=min(stage.packs, 2), pool=4) for key, stage in stages.items()}


def main(program: str, *words: str):
    backend_registration._setup_privateuseone_for_python_backend("afar", backend_module=Backend())
    torch.inference_mode = torch.no_grad  # in which these tensors cannot be views
    torch.is_inference_mode_enabled = lambda: not torch.is_grad_enabled()
    root = Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(root))
    for name in [path.stem for path in root.glob("*.py")]:
        sys.modules.pop(name, None)  # what was imported before has the old inference_mode
    sys.argv[1:] = words
    with Lists(), Operations():
        if program == "train.py":
            import train
            train.STAGES = shortened(train.STAGES)
            train.main()
        else:
            runpy.run_path(str(root / program), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
