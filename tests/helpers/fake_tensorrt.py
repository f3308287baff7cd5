"""A TensorRT module and a GPU in Python: they keep shapes, addresses and allocations, and compute nothing."""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace

VERSION, CAPABILITY = "1.7.1.116", "sm89"


class Validity(IntEnum):
    """EngineInvalidityDiagnostics with TensorRT-RTX's numbers."""

    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32


class FakeDevice:
    """Device memory as a dictionary, address -> bytes. `unfreed`: addresses that were not freed.

    uploads: address -> the array that was last copied there.
    """

    stream = 7

    def __init__(self):
        self.memory, self.next, self.closed = {}, 1000, False
        self.uploads = {}

    @property
    def unfreed(self):
        return sorted(self.memory)

    def allocate(self, count_bytes):
        address = self.next = self.next + 1000
        self.memory[address] = count_bytes
        self.next += count_bytes
        return address

    def holds(self, pointer):
        return pointer in self.memory

    def free(self, pointer):
        del self.memory[pointer]

    def upload(self, pointer, array):
        base = max(address for address in self.memory if address <= pointer)
        assert pointer + array.nbytes <= base + self.memory[base]
        assert array.flags.c_contiguous
        self.uploads[pointer] = array.copy()

    def upload_rows(self, pointer, pitch, array):
        for number, row in enumerate(array):
            self.upload(pointer + number * pitch, row)

    def download(self, array, pointer):
        assert self.memory[pointer] >= array.nbytes
        array[...] = 0

    def synchronize(self):
        pass

    def capability(self):
        return CAPABILITY

    def close(self):
        self.memory.clear()
        self.closed = True


class FakeContext:
    """An execution context that stores shapes and addresses; `runs` holds the addresses of every execution."""

    def __init__(self, config, accepts=True):
        self.config, self.accepts, self.shapes, self.addresses, self.runs = config, accepts, {}, {}, []

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return self.accepts

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def get_tensor_shape(self, name):
        text = self.config.text
        return (*self.shapes["input_ids"], text.vocab_size) if name == "logits" else (1, text.hidden_size)

    def execute_async_v3(self, stream):
        assert stream == FakeDevice.stream
        self.runs.append(dict(self.addresses))
        return True


class FakeEngine:
    """An engine in float16 with float32 logits. context: its execution context, None when memory is short."""

    def __init__(self, context):
        self._context = context

    def get_tensor_dtype(self, name):
        half = name.startswith(("past_", "image_embeds", "pixel"))
        return SimpleNamespace(name="HALF" if half else "FLOAT" if name == "logits" else "INT64")

    def create_execution_context(self):
        return self._context


class FakeTensorRT:
    """The TensorRT module.

    plans: content of the plans it accepts. validity: result of its check of a plan, None for a TensorRT without that check.
    says: the error it logs. memory: whether there is memory for execution contexts.
    """

    __version__ = VERSION
    EngineInvalidityDiagnostics = Validity

    class ILogger:
        ERROR, INFO = 1, 3

    def __init__(self, config, plans=(), validity=None, says="Error Code 6: engine is not compatible", memory=True):
        self.contexts = [FakeContext(config) for _ in plans]
        engines = dict(zip(plans, map(FakeEngine, self.contexts if memory else [None] * len(plans)), strict=True))

        class Runtime:
            def __init__(self, logger):
                self._logger = logger

            def deserialize_cuda_engine(self, data):
                if data not in engines:
                    self._logger.log(FakeTensorRT.ILogger.INFO, "Loaded engine size: 0 MiB")
                    if says:
                        self._logger.log(FakeTensorRT.ILogger.ERROR, says)
                return engines.get(data)

        class CheckingRuntime(Runtime):
            def get_engine_validity(self, _):
                return None, validity

        self.Runtime = Runtime if validity is None else CheckingRuntime
