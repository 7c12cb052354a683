"""CUDA graphs: the kernels that a function launches are recorded once for each shape, then launched together."""

import pickle
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bdkd_dist.errors import UserError, first_line

WARM_UP = 3
"""Calls of a shape before it is recorded: torch asks for some, in which libraries choose and allocate."""


class Replayed:
    """A function of tensors on a GPU that returns one, run by Python at first and then replayed without it.

    Small networks are bound by the time that Python takes to launch their kernels; a replay launches all of them at
    once. A call computes what the function would: inputs are copied to where the recorded kernels read them, and what
    they wrote stands until the next call of any shape.

    Args:
        function: Launches the same kernels at every call with inputs of the same shapes, and does not wait for the
            device. What it changes beside its result (weights, running statistics) it changes in place; numbers that
            vary reach it as tensors.
        device: The GPU.
        setting: The recipe's key that asked for this, for the line where a function cannot be recorded.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device, setting: str):
        self._function, self._setting = function, setting
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # graphs never run at the same time, so they share memory
        self._calls: Counter[tuple[object, ...]] = Counter()
        self._graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the function's value.

        Raises:
            UserError: It cannot be recorded.
            torch.OutOfMemoryError: There is no room for it.
        """
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._graphs:
            if self._calls[key] < WARM_UP:
                self._calls[key] += 1
                return self._warm_up(inputs)
            self._graphs[key] = self._record(inputs)
        graph, places, result = self._graphs[key]
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        return result

    def _warm_up(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Run the function beside the default stream, which a recording must know nothing of."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._function(*inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        """Return the function's graph, where it reads its inputs, and where it writes its value; nothing runs yet."""
        places = tuple(tensor.clone() for tensor in inputs)
        graph, drawn = torch.cuda.CUDAGraph(), _host_generators()
        try:
            # Of this thread alone: those of loaders pin memory meanwhile, which a recording of all would not allow.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = self._function(*places)
        except RuntimeError as error:
            first = error.__context__ or error  # the end of a recording that broke off fails too
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise UserError(
                f"{self._setting}: the networks cannot be recorded as a CUDA graph ({first_line(first)}); "
                f"something in them waits for the GPU, or changes from call to call; leave {self._setting} out"
            ) from error
        if _host_generators() != drawn:
            raise UserError(
                f"{self._setting}: the networks cannot be recorded as a CUDA graph (they draw random numbers on the "
                f"CPU, of which a recording would repeat one); draw them on the GPU, or leave {self._setting} out"
            )
        return graph, places, result


def _host_generators() -> bytes:
    """Return the states of what a function may draw from on the CPU."""
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()))  # noqa: NPY002
