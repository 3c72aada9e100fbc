"""Coverage-guided fuzzing of what reads files from the internet; run by hand, what it finds becomes a test.

    pip install atheris protobuf
    python tests/fuzz.py caffe -max_total_time=1800 -rss_limit_mb=2048 CORPUS
    python tests/fuzz.py metadata -max_total_time=1800 -rss_limit_mb=2048 CORPUS
    python tests/fuzz.py pickles -max_total_time=1800 -rss_limit_mb=2048 CORPUS
    python tests/fuzz.py tables -max_total_time=1800 -rss_limit_mb=2048 CORPUS

Whatever the bytes: a UserError of one line, or values that fit. The Caffe reader's are compared with the official
protobuf runtime's. CORPUS is a folder; where it is empty it is filled with whole files to start from.
"""

import io
import json
import pickle
import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np
from scipy.io import savemat

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch  # not to be instrumented

with atheris.instrument_imports(include=["models", "pipeline", "numpy.lib", "train_vlm"]):
    from evaluation import fixations
    from models import checkpoints
    from models.backbones import ARCHITECTURES
    from models.errors import UserError
    from models.weights import caffe
    from models.weights.read import read_weights
    from pipeline import array_files, artefacts
    from pipeline.features import open_features
    from pipeline.targets import read_statistics

from tests.evaluation.test_fixations import STIMULI, cells, osie
from tests.models.test_checkpoints import (
    Case,
    encode,
    model_case,
    reconstruction_case,
    reconstruction_restart,
    training_case,
    training_run,
)
from tests.models.weights.test_caffe import VALUES, blob, network, official_network
from tests.tiny import TINY

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


def named(whole: Case, configuration: str) -> bytes:
    """A file with the tensors of another and this text as its configuration; layers are called as that says."""
    try:
        layers = json.loads(configuration)["layers"]
        names = [name for name in layers if isinstance(name, str)][:3]
    except (ValueError, KeyError, TypeError, RecursionError):
        names = []
    entries = dict(whole.entries)
    for name in names if whole is MODEL else ():
        entries |= {n.replace("conv1", name, 1): e for n, e in whole.entries.items() if n.startswith("conv1.")}
    return encode(entries, {"configuration": configuration})


ARCHITECTURES["tiny"] = TINY
MODEL, TRAINING, RECONSTRUCTION = (case(FOLDER) for case in (model_case, training_case, reconstruction_case))
MODEL.entries = {name: entry for name, entry in MODEL.entries.items() if not name.startswith("conv2")}
MODEL.configuration["layers"] = ["conv1"]
RUN, RESTART = training_run(FOLDER), reconstruction_restart(FOLDER)
FACTS = {"stage": "x", "seed": 0}


def fuzz_metadata(data: bytes) -> None:
    """By the first byte: a sidecar, an array, a checkpoint, its configuration, a note of progress, states' notes."""
    kind, data = data[:1], data[1:]
    path = FOLDER / "x.npy"
    if kind in b"0":
        artefacts.sidecar_path(path).write_bytes(data)
        path.write_bytes(ARRAY)
        found = refused(array_files.open_array, path, "it")
        assert found is None or (found[0].shape == (2, 3) and isinstance(found[1], dict))
        refused(artefacts.reuse, path, FACTS, False)
    elif kind in b"1":
        artefacts.sidecar_path(path).write_text(json.dumps({"shape": [2, 3], "dtype": "float32"}))
        path.write_bytes(data)
        found = refused(array_files.open_array, path, "it")
        assert found is None or (found[0].shape == (2, 3) and found[0].dtype == np.float32)
    elif kind in b"23":
        path = FOLDER / "projection.safetensors"
        path.write_bytes(data if kind == b"2" else named(MODEL, data.decode("utf-8", "replace")))
        artefacts.sidecar_path(path).write_text("{}")
        refused(checkpoints.load_vlm, path)
        refused(read_statistics, path, "tiny")
        refused(open_features, FOLDER, None)
    elif kind in b"4":
        (FOLDER / "y.npy.partial").write_bytes(ARRAY)
        (FOLDER / "y.npy.progress").write_bytes(data)
        writer = array_files.ArrayWriter(FOLDER / "y.npy", (2, 3), "float32", FACTS)
        assert 0 <= writer.done <= 2 and isinstance(writer.state, dict)
    elif kind in b"5":
        RUN.state.write_bytes(named(TRAINING, data.decode("utf-8", "replace")))
        RUN.iteration, RUN.log = 0, []
        refused(RUN.resume, False)
        assert 0 <= RUN.iteration <= 8 and all(line.layer == "conv1" for line in RUN.log)
    elif kind in b"6":
        RESTART.state.write_bytes(named(RECONSTRUCTION, data.decode("utf-8", "replace")))
        RESTART.curves = []
        refused(RESTART.resume)
        assert all(isinstance(terms["total"], int | float) for terms in RESTART.curves)


def fuzz_pickles(data: bytes) -> None:
    """Weights of any kind: parameters of the network, or refused."""
    path = FOLDER / "weights"
    path.write_bytes(data)
    found = refused(read_weights, path, TINY)
    assert found is None or found.keys() <= TINY.parameter_shapes().keys()


def fuzz_tables(data: bytes) -> None:
    """By the first byte: a MATLAB file or a table of fixations; all that are kept lie in their image."""
    path = FOLDER / ("x.csv" if data[:1] in b"c" else "x.mat")
    path.write_bytes(data[1:])
    found = refused(fixations.read_fixations, path, STIMULI)
    if found is not None:
        height, width = found.sizes[found.image_index].T
        assert ((found.x >= 0) & (found.x < width) & (found.y >= 0) & (found.y < height)).all()


def npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    array_files.write_array(FOLDER / "a.npy", array)
    return (FOLDER / "a.npy").read_bytes()


ARRAY = npy(np.ones((2, 3), np.float32))


def corpus_metadata() -> list[bytes]:
    """Whole files of every kind."""
    described = {"shape": [2, 3], "dtype": "float32", **FACTS}
    progress = {"done": 1, "facts": described, "state": {"rejected": {"0": "x"}}}
    texts = [case.metadata()["configuration"].encode() for case in (MODEL, TRAINING, RECONSTRUCTION)]
    return [
        b"0" + json.dumps(described).encode(),
        b"1" + ARRAY,
        b"1" + npy(np.asfortranarray(np.ones((2, 3), ">f8"))),
        b"2" + MODEL.whole(),
        b"3" + texts[0],
        b"4" + json.dumps(progress).encode(),
        b"5" + texts[1],
        b"6" + texts[2],
    ]


def corpus_pickles() -> list[bytes]:
    """The package's form in two protocols, torch's in two, and safetensors."""
    arrays = {"a": np.ones((2, 3), "f4"), "b": {"c": np.asfortranarray(np.ones((2, 3), ">f8"))}, "d": [1, None, "e"]}
    whole = {name: torch.from_numpy(np.frombuffer(raw, "<f4").copy()) for name, (_, _, raw) in MODEL.entries.items()}
    files = [pickle.dumps(arrays, protocol=protocol) for protocol in (2, 3, 4)]
    for zipped in (True, False):
        with io.BytesIO() as stream:
            torch.save(dict(list(whole.items())[:2]), stream, _use_new_zipfile_serialization=zipped)
            files.append(stream.getvalue())
    return [*files, MODEL.whole()]


def corpus_tables() -> list[bytes]:
    """OSIE's and Toronto's form, and a table."""
    spot, files = (np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])), []
    for variables in ({"fixations": osie(("a.jpg", [spot, spot]))}, {"white": cells(np.eye(10), np.eye(10))}):
        for packed in (False, True):
            with io.BytesIO() as stream:
                savemat(stream, variables, do_compression=packed)
                files.append(b"m" + stream.getvalue())
    return [*files, b"cimage,subject,x,y\na.jpg,1,2,3\nb.png,,1.5,nan\n"]


TARGETS = {
    "caffe": (fuzz_caffe, corpus_caffe),
    "metadata": (fuzz_metadata, corpus_metadata),
    "pickles": (fuzz_pickles, corpus_pickles),
    "tables": (fuzz_tables, corpus_tables),
}


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
