"""One decode step: a token for each running row goes through the network, behind what is cached.

On CUDA a step over few rows takes as long as the host takes to launch its dozens of kernels a
layer. A CUDA graph launches all of them at once; it reads and writes the same memory each time.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
Letters: B rows that take the step, D hidden size.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from llama_lightning.model.kv_cache import GROWTH, KVCache
from llama_lightning.model.llama import Backbone

# Work on memory that stays where it is; its result lies in such memory too.
Step = Callable[[], Tensor]
# Makes of a step one that does the same work on the same memory, faster.
Capture = Callable[[Step], Step]

# Row counts are rounded up to this part of all rows, and slots to GROWTH times a power of two: for
# 32 rows of up to 2,048 tokens there are at most 8 x 4 shapes, and so many graphs.
ROW_COUNTS = 8
# The step of a shape at which it is captured. If a capture takes the time of so many steps, which
# is a guess, a shape seen less often never pays for one, and at worst both are paid.
CAPTURE_AT = 8
WARM_UP = 3  # torch's recipe: libraries choose and load their kernels outside the capture


class CudaGraphs:
    """Captures steps that are replayed one at a time, so that their graphs may share memory.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()  # only good as long as a graph of it lives

    def __call__(self, step: Step) -> Step:
        """Capture a step that may be run several times over, for it will be.

        Raises:
            RuntimeError: it does what a graph cannot, or memory is short.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            # Around the capture too: one that fails leaves its stream current.
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    step()
                # Other threads, such as a data loader's, may go on with what they do.
                with torch.cuda.graph(
                    graph, self._pool, self._stream, capture_error_mode="thread_local"
                ):
                    result = step()
            torch.cuda.current_stream().wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def cuda_graphs(device: torch.device) -> Capture | None:
    """Capture steps on a CUDA device; None, elsewhere, runs each as it is."""
    return CudaGraphs(device) if device.type == "cuda" else None


def no_graphs(device: torch.device) -> Capture | None:
    """Run each step as it is."""
    return None


class DecodeStep:
    """Runs decode steps over the first rows of a cache, for as long as its memory stays in place.

    With `capture`, a few rows and slots more than needed are computed, so that there are few
    shapes. A row behind the running ones then gets a key and value behind its length, which stays.

    Args:
        network: in eval mode.
        cache: of all rows.
        capture: for steps of one shape; without, each step has just the shape it needs.
    """

    def __init__(self, network: Backbone, cache: KVCache, capture: Capture | None) -> None:
        self._network, self._cache, self._capture = network, cache, capture
        self._size, self._slots = cache.keys[0].shape[0], cache.keys[0].shape[2]
        self._tokens_B = torch.zeros_like(cache.lengths_B)
        self._hidden_BD: Tensor | None = None
        self._steps_at: Counter[tuple[int, int]] = Counter()
        self._captured: dict[tuple[int, int], Step] = {}

    def __call__(self, tokens_B: Tensor, lengths: Sequence[int]) -> Tensor:
        """Append a token to each of the first rows; return its hidden state, until the next call.

        Args:
            tokens_B: of the first B rows.
            lengths: of all rows, as in the cache, which is not asked: the host would wait for it.

        Returns:
            (B, D)
        """
        num = len(tokens_B)
        if self._capture is None:
            view = self._cache.view(0, num, max(lengths[:num]) + 1)
            hidden_BD: Tensor = self._network(tokens_B[:, None], cache=view).squeeze(1)
        else:
            self._tokens_B[:num] = tokens_B
            hidden_BD = self._shaped(num, lengths)()[:num]
        self._cache.lengths_B[:num] += 1
        return hidden_BD

    def _shaped(self, num: int, lengths: Sequence[int]) -> Step:
        """Find the step, captured or not, whose shape has room for these rows."""
        rows = min(num + -num % -(-self._size // ROW_COUNTS), self._size)
        slots, longest = GROWTH, max(lengths[:rows])
        while slots <= longest:
            slots *= 2
        shape = rows, min(slots, self._slots)
        self._steps_at[shape] += 1
        if self._steps_at[shape] == CAPTURE_AT:
            self._try_to_capture(shape)
        return self._captured.get(shape) or partial(self._run, *shape)

    def _try_to_capture(self, shape: tuple[int, int]) -> None:
        assert self._capture is not None
        try:
            self._captured[shape] = self._capture(partial(self._run, *shape))
        except RuntimeError as error:
            # What was run of it wrote what the step itself will write again. The graphs that there
            # are hold memory, which may be what was missing.
            self._capture = None
            self._captured.clear()
            first: BaseException = error
            while first.__context__ is not None:  # the end of a capture complains of its beginning
                first = first.__context__
            reason = str(first).partition("\n")[0]
            warnings.warn(
                f"generation: no CUDA graph of a decode step ({reason}); the steps go on without, "
                "slower and with the same result. If CUDA complains later in this run, set "
                "model.generation.cuda_graphs to false",
                stacklevel=2,
            )

    def _run(self, rows: int, slots: int) -> Tensor:
        """Run the rows' tokens; lengths stay, so that doing it again changes nothing."""
        device = self._tokens_B.device.type
        # The casts of weights that autocast keeps end with it, and a graph would go on reading.
        with torch.autocast(
            device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,
        ):
            view = self._cache.view(0, rows, slots)
            hidden_BD: Tensor = self._network(self._tokens_B[:rows, None], cache=view).squeeze(1)
        if self._hidden_BD is None:
            self._hidden_BD = hidden_BD.new_empty(self._size, hidden_BD.shape[1])
        # One place for the results of all shapes: graphs keep nothing each for itself.
        return self._hidden_BD[:rows].copy_(hidden_BD)
