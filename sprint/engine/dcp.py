"""What sprint adds to PyTorch's distributed checkpoints (DCP): copies to write from, and an index that runs nothing."""

import pickle
import threading
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from sprint.base.errors import SprintError

INDEX = ".metadata"  # the library's name
ALLOWED = {  # what an index of tensors is made of, besides dtypes
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class CopyingPlanner(DefaultSavePlanner):
    """Copies what this process is to write as soon as the plan says what that is, and no more.

    copies  by place in the checkpoint: filled again where they fit, replaced where they do not
    copied  set once the tensors may change again
    still   they do not change before all is written, so that nothing is copied, but from a GPU one at a time
    """

    def __init__(self, copies: dict[MetadataIndex, Tensor], copied: threading.Event, still: bool = False):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._copies, self._copied, self._still = copies, copied, still
        # The maker's stream: the library may call from another thread, which has a stream of its own.
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        if self._still:
            self._copies.clear()
            return plan
        with torch.cuda.stream(self._stream):
            copies = {item.index: self._copy(item) for item in plan.items}
        if self._stream is not None:
            self._stream.synchronize()
        self._copies.clear()
        self._copies.update(copies)
        self._copied.set()
        return plan

    def _copy(self, item: WriteItem) -> Tensor:
        source = self.lookup_object(item.index)
        copy = self._copies.get(item.index)
        if copy is None or (copy.shape, copy.dtype) != (source.shape, source.dtype):
            copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        return copy.copy_(source, non_blocking=True)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        if not self._still:
            return self._copies[write_item.index]
        with torch.cuda.stream(self._stream):
            return self.lookup_object(write_item.index).cpu()


class Writer(FileSystemWriter):
    """One flushed file per process. Raises OSError for a disk that is full."""

    def __init__(self, path: Path):
        super().__init__(path, per_thread_copy_ahead=0)  # the tensors are on the host already

    def write_data(
        self, plan: SavePlan, planner: DefaultSavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # how torch's archive writer reports a failed write
                raise error.__context__ from None
            raise

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # the library's holds the path, here a temporary one


class Reader(FileSystemReader):
    """Reads the index, which the library pickles, without running anything that it asks for.

    Raises SprintError for an index that asks for more than an index of tensors needs.
    """

    def read_metadata(self) -> Metadata:
        with open(self.path / INDEX, "rb") as file:
            return _IndexUnpickler(file).load()


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise SprintError(f"its index asks for {module}.{name}, which no checkpoint needs")
