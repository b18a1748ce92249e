"""A device without hardware: its tensors say that they are on `emulated:0` and hold their numbers on the CPU.

As on a GPU, an operation on tensors of two devices is an error. Of what makes the host wait for the device it
notices reading a number, a blocking copy, nonzero, masked_select and an index with a mask or from the host. For
the tests of test_cuda.py where there is no GPU; importing this module changes torch for the whole process.
"""

import timm
import torch
from torch.utils import backend_registration as registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
COPIES = (aten._to_copy.default, aten.copy_.default)


class Backend(registration._DummyBackendModule):
    """What torch asks of a device's module: torch.manual_seed and autocast call these."""

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


registration._setup_privateuseone_for_python_backend("emulated", Backend())
DEVICE = torch.device("emulated:0")
waits_are_errors = False


def waited(reason):
    """Called where a GPU's host would wait."""
    if waits_are_errors:
        raise RuntimeError(f"the host waits for the device: {reason}")


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype,
                                                   device=DEVICE, storage_offset=held.storage_offset())

    def __init__(self, held):
        self.held = held

    def tolist(self):
        waited("tolist")
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("a tensor of the device has no numpy(); use cpu() before")

    def __deepcopy__(self, memo):
        copied = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Emulation(TorchDispatchMode):
    """Sees the operations that have no tensor of the device among their arguments, as torch.zeros."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def check(function, args, kwargs, to_device):
    """Refuse what a GPU refuses, and tell `waited` where it would make the host wait."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, OnDevice)]
    indices = [x for x in args[1] if x is not None] if function in INDEXED else []
    others = [x for x in tensors if not isinstance(x, OnDevice) and not any(x is index for index in indices)]
    if function in READS and ours:
        waited(function)
    elif function in COPIES:
        source = args[1] if function is aten.copy_.default else args[0]
        blocks = not (kwargs.get("non_blocking") or args[2:] == (True,))
        if isinstance(source, OnDevice) != to_device and (blocks or not to_device):
            waited(f"{function} of {tuple(source.shape)}")
    elif ours and any(x.ndim or "foreach" in str(function) for x in others):
        raise RuntimeError(f"tensors of two devices in {function}: {[(x.device, x.shape) for x in tensors]}")
    elif ours and any(x.dtype == torch.bool or not isinstance(x, OnDevice) for x in indices):
        waited("an index with a mask or from the host")


def on_host(tree):
    """The same lists and dicts with the numbers held, and the CPU for the device."""
    def replaced(x):
        if isinstance(x, OnDevice):
            return x.held
        return torch.device("cpu") if isinstance(x, torch.device) else x
    return tree_map(replaced, tree)


def run(function, args, kwargs):
    """The operation on the numbers held; its results are on the device if an argument is or `device` says so."""
    if "device" in kwargs:
        to_device = torch.device(kwargs["device"] or "cpu") == DEVICE
    else:
        to_device = any(isinstance(x, OnDevice) for x in tree_leaves((args, kwargs)))
    if function is aten.copy_.default:
        to_device = isinstance(args[0], OnDevice)
    check(function, args, kwargs, to_device)
    host_args, host_kwargs = on_host((args, kwargs))
    result = function(*host_args, **host_kwargs)
    if not to_device or function in READS[:2]:
        return result
    result = tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, result)
    return return_and_correct_aliasing(function, args, kwargs, result)


def through_host(make):
    """torch.tensor and torch.as_tensor, which would ask the device for memory."""
    def made(data, *args, device=None, **kwargs):
        tensor = make(data, *args, **kwargs)
        return tensor if device is None else tensor.to(device)
    return made


def watch(mode):
    """torch.cuda.set_sync_debug_mode"""
    global waits_are_errors
    waits_are_errors = mode == "error"


generator, save = torch.Generator, torch.save
torch.Generator = lambda device="cpu": generator("cpu")
torch.save = lambda content, file: save(on_host(content), file)
torch.tensor, torch.as_tensor = through_host(torch.tensor), through_host(torch.as_tensor)
torch.inference_mode = torch.no_grad                    # tensors made under it are not seen here
torch.cuda.mem_get_info = lambda: (2 ** 37, 2 ** 37)
torch.cuda.set_sync_debug_mode = watch
torch.autograd.set_multithreading_enabled(False)        # a thread of its own would not see Emulation
timm.layers.set_fused_attn(False)                       # has no kernel for the device
Emulation().__enter__()
