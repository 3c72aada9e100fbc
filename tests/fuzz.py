"""Coverage-guided fuzzing of what reads files from the internet; run by hand, what it finds becomes a test.

    pip install atheris protobuf
    python tests/fuzz.py caffe -max_total_time=1800 -rss_limit_mb=2048 CORPUS
    python tests/fuzz.py metadata -max_total_time=1800 -rss_limit_mb=2048 CORPUS

Whatever the bytes: a UserError of one line, or values that fit. The Caffe reader's are compared with the official
protobuf runtime's. CORPUS is a folder; where it is empty it is filled with whole files to start from.
"""

import json
import struct
import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch  # noqa: F401 (not to be instrumented)

with atheris.instrument_imports(include=["models", "pipeline", "numpy.lib"]):
    import reconstruct
    import train_vlm
    from models import caffe, checkpoints
    from models.errors import UserError
    from pipeline import artefacts

from tests.test_caffe import VALUES, blob, network, official_network

OFFICIAL = type(official_network())
OFFICIAL_BLOB = type(official_network().layer.add().blobs.add())
FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm"))
MEMORY = 2.1  # bytes of arrays for each byte of a Caffe file: unpacked doubles become floats, floats stay


def refused(read, *arguments):
    """What a reader returns, or None where it refuses in one line."""
    try:
        return read(*arguments)
    except UserError as error:
        assert "\n" not in str(error)
        return None


def fuzz_caffe(data: bytes) -> None:
    """Network and mean image; what is read must be what the official runtime reads."""
    caffe._open = lambda path: memoryview(data)
    mean = refused(caffe.read_binaryproto, Path("x"))
    if mean is not None:
        assert mean.nbytes <= MEMORY * len(data)
        check_blob(mean, OFFICIAL_BLOB.FromString(data))
    found = refused(caffe.read_caffemodel, Path("x"))
    if found is None:
        return
    assert sum(array.nbytes for blobs in found.values() for array in blobs) <= MEMORY * len(data)
    official = OFFICIAL.FromString(data)
    named = {layer.name: layer.blobs for layer in (*official.layers, *official.layer) if layer.blobs}
    for name in found.keys() & named.keys():  # the oldest, nested layers are unknown to this one
        for array, other in zip(found[name], named[name], strict=False):
            check_blob(array, other)


def check_blob(array: np.ndarray, official) -> None:
    """An array of ours against the official runtime's message; a mean image has lost its first dimension."""
    assert array.dtype == np.float32 and np.isfinite(array).all()
    values = np.array(official.double_data or official.data, np.float64).astype(np.float32)
    assert np.array_equal(array.ravel(), values)
    legacy = [official.num, official.channels, official.height, official.width]
    shapes = (tuple(legacy), tuple(legacy[1:]), tuple(official.shape.dim), tuple(official.shape.dim)[1:])
    assert array.shape in (*shapes, (len(values),)) or 0 in legacy


def corpus_caffe() -> list[bytes]:
    """Networks in every form."""
    small = np.ones((2, 1, 2, 2), np.float32)
    layers = {"conv1": [blob(small), blob(small[0], "packed")], "b": [blob(small, "unpacked", "pieces")]}
    layers["c"] = [blob(small, "none", "double"), blob(small, "packed", "unpacked double")]
    means = [blob(VALUES), blob(VALUES, "packed", "double"), blob(small[:1], "unpacked", "pieces")]
    return [network(layers, form) for form in ("layer", "V1", "V0")] + means


def safetensors_bytes(metadata: str) -> bytes:
    """The file of a minimal language model with this text as its configuration."""
    header: dict = {"__metadata__": {"format": checkpoints.FORMAT, "configuration": metadata}}
    values = b""
    for name, value in checkpoints.vlm_tensors(MODEL).items():
        raw = value.numpy().tobytes()
        offsets = [len(values), len(values) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": offsets}
        values += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


def tiny_model():
    """A language model of one component."""
    from models.projection import Projection
    from models.vlm import VisualLanguageModel

    projection = Projection(torch.zeros(1), torch.ones(1), torch.ones(1, 1), torch.zeros(1))
    return VisualLanguageModel({"conv1": projection}, {"data": {"mean": torch.zeros(3), "std": torch.ones(3)}})


MODEL = tiny_model()
FACTS = {"stage": "x", "seed": 0}


def fuzz_metadata(data: bytes) -> None:
    """By the first byte: a sidecar, an array, a checkpoint, a checkpoint's configuration, a note of progress."""
    kind, data = data[:1], data[1:]
    path = FOLDER / "x.npy"
    if kind in b"0":
        artefacts.sidecar_path(path).write_bytes(data)
        path.write_bytes(ARRAY)
        found = refused(artefacts.open_array, path, "it")
        assert found is None or (found[0].shape == (2, 3) and isinstance(found[1], dict))
        refused(artefacts.is_finished, path, FACTS, False)
    elif kind in b"1":
        artefacts.sidecar_path(path).write_text(json.dumps({"shape": [2, 3], "dtype": "float32"}))
        path.write_bytes(data)
        found = refused(artefacts.open_array, path, "it")
        assert found is None or (found[0].shape == (2, 3) and found[0].dtype == np.float32)
    elif kind in b"23":
        path = FOLDER / "projection.safetensors"
        path.write_bytes(data if kind == b"2" else safetensors_bytes(data.decode("utf-8", "replace")))
        artefacts.sidecar_path(path).write_text("{}")
        refused(checkpoints.load_vlm, path)
        refused(reconstruct.read_statistics, path, "alexnet")
        refused(train_vlm.open_features, FOLDER, None)
        refused(train_vlm.open_features, FOLDER, ["conv1"])
    elif kind in b"4":
        (FOLDER / "y.npy.partial").write_bytes(ARRAY)
        (FOLDER / "y.npy.progress").write_bytes(data)
        writer = artefacts.ArrayWriter(FOLDER / "y.npy", (2, 3), "float32", FACTS)
        assert 0 <= writer.done <= 2 and isinstance(writer.state, dict)


def npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    artefacts.write_array(FOLDER / "a.npy", array)
    return (FOLDER / "a.npy").read_bytes()


ARRAY = npy(np.ones((2, 3), np.float32))


def corpus_metadata() -> list[bytes]:
    """Whole files of every kind."""
    described = {"shape": [2, 3], "dtype": "float32", **FACTS}
    progress = {"done": 1, "facts": described, "state": {"rejected": {"0": "x"}}}
    configuration = {"backbone": "alexnet", "layers": ["conv1"], "projection_sha256": "0", "training": {}}
    whole = json.dumps(configuration)
    return [
        b"0" + json.dumps(described).encode(),
        b"1" + ARRAY,
        b"1" + npy(np.asfortranarray(np.ones((2, 3), ">f8"))),
        b"2" + safetensors_bytes(whole),
        b"3" + whole.encode(),
        b"4" + json.dumps(progress).encode(),
    ]


TARGETS = {"caffe": (fuzz_caffe, corpus_caffe), "metadata": (fuzz_metadata, corpus_metadata)}


def main() -> None:
    """Fuzz the target named by the first argument; the others are libFuzzer's."""
    target, corpus = TARGETS[sys.argv.pop(1)]
    folder = Path(sys.argv[-1])
    if folder.is_dir() and not any(folder.iterdir()):
        for number, content in enumerate(corpus()):
            (folder / f"whole-{number}").write_bytes(content)
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
