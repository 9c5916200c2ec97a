"""Safetensors files read and written with struct and json only: the independent side of the checkpoint tests."""

import json
import struct

import ml_dtypes
import numpy as np

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "U8": np.dtype(np.uint8), "F32": np.dtype(np.float32)}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def read_file(file):
    content = file.read_bytes()
    size, = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8:8 + size]), content[8 + size:]
    header.pop("__metadata__", None)
    return {name: np.frombuffer(data[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()}


def write_file(file, tensors):
    header, data = {}, b""
    for name, array in tensors.items():
        header[name] = {"dtype": CODES[array.dtype], "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def read_directory(path):
    return {name: array for file in path.glob("*.safetensors") for name, array in read_file(file).items()}


def random_weights(declared, seed=0):
    """Finite random bits for every declared weight; scale bytes stay where MXFP4 means ordinary numbers."""
    rng = np.random.default_rng(seed)

    def draw(name, weight):
        if weight.dtype == "uint8":
            return rng.integers(*((110, 135) if name.endswith("_scales") else (0, 256)), weight.shape, np.uint8)
        return rng.standard_normal(weight.shape, np.float32).astype(weight.dtype)

    return {name: draw(name, weight) for name, weight in declared.items()}


def assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        other = np.asarray(found[name])
        assert (other.dtype, other.shape) == (array.dtype, array.shape), name
        assert other.tobytes() == array.tobytes(), name
