"""The Caffe reader against an independent encoder, the official runtimes where installed, and damage."""

import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.errors import UserError
from models.weights.caffe import match_parameters, read_binaryproto, read_caffemodel

VALUES = np.arange(24, dtype=np.float32).reshape(4, 1, 3, 2) / 7


def varint(value: int) -> bytes:
    out = b""
    while True:
        out += bytes([value & 127 | (128 if value > 127 else 0)])
        value >>= 7
        if not value:
            return out


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def blob(array: np.ndarray, shape: str = "legacy", data: str = "packed", *, floats: bool = True) -> bytes:
    out = b""
    if shape == "legacy":
        dims = (1,) * (4 - array.ndim) + array.shape
        out += b"".join(field(n, d) for n, d in zip((1, 2, 3, 4), dims, strict=True))
    elif shape == "packed":
        out += field(7, field(1, b"".join(varint(d) for d in array.shape)))
    elif shape == "unpacked":
        out += field(7, b"".join(field(1, d) for d in array.shape))
    flat = array.ravel()
    if data == "packed":
        out += field(5, flat.astype("<f4").tobytes())
    elif data == "unpacked":
        out += b"".join(varint(5 << 3 | 5) + struct.pack("<f", v) for v in flat)
    elif data == "pieces":
        out += field(5, flat[:5].astype("<f4").tobytes())
        out += b"".join(varint(5 << 3 | 5) + struct.pack("<f", v) for v in flat[5:9])
        out += field(5, flat[9:].astype("<f4").tobytes())
    elif data == "double":
        out += field(8, flat.astype("<f8").tobytes())
    elif data == "unpacked double":
        out += b"".join(varint(8 << 3 | 1) + struct.pack("<d", v) for v in flat)
    if not floats:
        return out
    return out + field(6, flat.astype("<f4").tobytes()) + b"".join(b"\x35" + b"\0\0\xc0\x7f" for _ in flat)  # diff


def network(layers: dict[str, list[bytes]], form: str) -> bytes:
    out = field(1, b"a network")
    for name, blobs in layers.items():
        if form == "layer":
            content = field(1, name.encode()) + field(2, b"Convolution") + b"".join(field(7, b) for b in blobs)
            out += field(100, content)
        elif form == "V1":
            out += field(2, field(4, name.encode()) + field(5, 4) + b"".join(field(6, b) for b in blobs))
        else:
            inner = field(1, name.encode()) + field(2, b"conv") + b"".join(field(50, b) for b in blobs)
            out += field(2, field(1, inner))
    return out


@pytest.mark.parametrize("form", ["layer", "V1", "V0"])
@pytest.mark.parametrize("shape", ["legacy", "packed", "unpacked"])
@pytest.mark.parametrize("data", ["packed", "unpacked", "pieces", "double", "unpacked double"])
def test_every_form(tmp_path: Path, form: str, shape: str, data: str) -> None:
    path = tmp_path / "net.caffemodel"
    bias = np.array([1.5, -2.0, 3.0], np.float32)
    layers = {"conv1": [blob(VALUES, shape, data), blob(bias, shape, data)], "relu1": []}
    path.write_bytes(network(layers, form))
    found = read_caffemodel(path)
    assert list(found) == ["conv1"]
    assert found["conv1"][0].dtype == np.float32
    np.testing.assert_array_equal(found["conv1"][0], VALUES)
    np.testing.assert_array_equal(found["conv1"][1].ravel(), bias)
    assert read_caffemodel(path, wanted={"other"}) == {}


def test_mean_image(tmp_path: Path) -> None:
    path = tmp_path / "mean.binaryproto"
    path.write_bytes(blob(VALUES.reshape(1, 3, 4, 2)))
    assert read_binaryproto(path).shape == (3, 4, 2)
    path.write_bytes(blob(VALUES, "none"))
    assert read_binaryproto(path).shape == (24,)


def test_parameters_of_legacy_blobs(tmp_path: Path) -> None:
    weight, bias = np.ones((1, 1, 4, 6), np.float32), np.zeros((1, 1, 1, 4), np.float32)
    blobs = {"fc6": [weight, bias]}
    shapes = {"fc6.weight": (4, 6), "fc6.bias": (4,)}
    matched = match_parameters(blobs, shapes, path=Path("x"))
    assert matched["fc6.weight"].shape == (4, 6) and matched["fc6.bias"].shape == (4,)
    with pytest.raises(UserError, match=r"weight of layer 'fc6' should be \(6, 4\), found \(1, 1, 4, 6\)"):
        match_parameters(blobs, {"fc6.weight": (6, 4)}, path=Path("x"))
    with pytest.raises(UserError, match="there is no layer 'fc7'"):
        match_parameters(blobs, {"fc7.weight": (6, 4)}, path=Path("x"))
    with pytest.raises(UserError, match="layer 'fc6' has no bias"):
        match_parameters({"fc6": [weight]}, shapes, path=Path("x"))
    with pytest.raises(UserError, match="layer 'fc6' should have a weight and a bias, found"):
        match_parameters({"fc6": [weight, bias, bias]}, shapes, path=Path("x"))
    for shape in [(4, 6, 1, 1), (4, 1, 6, 1), (2, 2, 1, 6), (24,)]:  # as many values, other dimensions
        with pytest.raises(UserError, match="x: weight of layer 'fc6' should be"):
            match_parameters({"fc6": [weight.reshape(shape), bias]}, shapes, path=Path("x"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xd8\xff\xe0 a JPEG", "no whole caffemodel but a JPEG"),
        (b"PK\x03\x04 a zip", "no whole caffemodel but a zip"),
        (b"<!DOCTYPE html><html>404</html>", "no whole caffemodel but a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "but a Git LFS pointer"),
        (b"Some notes on networks.\n", "no whole caffemodel: "),
        (field(2, field(4, b"a")), None),
        (
            network({"a": [field(7, field(1, b"\x03")) + field(5, b"1234" * 2)]}, "layer"),
            r"layer 'a'.*\(3,\) should hold 3 values, found 2",
        ),
        (network({"a": [blob(VALUES)]}, "layer") * 2, "layer 'a': it is there twice"),
        (network({"a": [blob(np.array([np.nan], np.float32))]}, "layer"), "no finite numbers"),
        (network({"a": [field(7, field(1, 2**62)) + field(5, b"1234")]}, "layer"), "dimensions should be 1 to"),
        (network({"a": [field(7, field(1, 2**64 - 3)) + field(5, b"1234")]}, "layer"), r"shape \(-3,\)"),
        (network({"a": [field(1, 2**64 - 3) + field(5, b"1234")]}, "V1"), r"shape \(-3, 1, 1, 1\)"),
        (network({"a": [field(7, field(1, 0) + field(1, 2**40))]}, "V0"), "layer 'a': a blob holds no values"),
        (network({"a": [field(7, field(1, b"\x01" * 33)) + field(5, b"1234")]}, "V0"), "more than 32 dimensions"),
        (network({"a": [field(5, b"12345")]}, "V1"), "layer 'a': 5 bytes are no whole number"),
        (network({"a": [field(5, 1)]}, "V1"), "layer 'a': a blob's data should have wire type"),
        (network({"a": [blob(np.full(2, 1e300), data="double", floats=False)]}, "V1"), "no finite numbers"),
        (network({"a": [b"\x2a" + varint(2**63 - 1) + b"1234"]}, "V1"), "layer 'a': .*announced where 4 are left"),
        (field(2, field(4, b"a") + b"\x32\x7f1234"), "layer 'a': .*127 bytes is announced where 4 are left"),
        (field(2, b"/snapshots/net_1000.caffemodel"), "no whole caffemodel"),
        (field(100, 3), "a layer should have wire type 2, found 0"),
        (field(2, field(4, b"\xff\xfe")), "no UTF-8 text"),
        (b"\x00\x00", "field of number 0"),
        (b"\x0b\x0c" * 9, "wire type 3"),
        (b"\x80" * 30, "longer than 64 bits"),
        (field(1, b"x"), "lists no layers"),
    ],
)
def test_refusals_are_one_clear_line(tmp_path: Path, content: bytes, message: str | None) -> None:
    path = tmp_path / "net.caffemodel"
    path.write_bytes(content)
    if message is None:
        assert read_caffemodel(path) == {}
        return
    with pytest.raises(UserError, match=message) as caught:
        read_caffemodel(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert "another file with --weights" in str(caught.value)


def test_truncation_and_flipped_bytes(tmp_path: Path) -> None:
    """Cut anywhere, 10,000 random flips: a refusal or arrays, never another exception, never a huge allocation."""
    path = tmp_path / "net.caffemodel"
    small = np.ones((2, 1, 2, 2), np.float32)
    whole = network({"conv1": [blob(small), blob(small[0], "packed")], "b": [blob(small, data="pieces")]}, "V1")
    random = np.random.default_rng(0)
    damaged = [whole[:length] for length in range(len(whole))]
    for _ in range(10_000):
        flipped = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            flipped[random.integers(len(whole))] ^= 1 << random.integers(8)
        damaged.append(bytes(flipped))
    refused, start = 0, time.process_time()
    with path.open("wb") as file:  # one open file: opening it anew takes longer than reading it
        for content in damaged:
            file.seek(0)
            file.write(content)
            file.truncate()
            file.flush()
            try:
                for arrays in read_caffemodel(path).values():
                    assert all(isinstance(a, np.ndarray) and a.nbytes <= len(whole) for a in arrays)
            except UserError:
                refused += 1
    assert refused > 1500 and time.process_time() - start < 60


def test_a_large_file_cut_at_every_percent_and_flipped(tmp_path: Path) -> None:
    """No read takes more memory than a fraction of the file: values are views of it."""
    path = tmp_path / "net.caffemodel"
    random = np.random.default_rng(3)
    layers = {f"conv{i}": random.normal(size=(64, 32, 3, 5 * i)).astype("f4") for i in range(1, 6)}
    whole = network(
        {name: [blob(a, floats=False), blob(a[:, 0, 0, 0], floats=False)] for name, a in layers.items()}, "V1"
    )
    assert len(whole) > 1_800_000
    damaged = [(len(whole) * percent // 100, None) for percent in range(100)]
    damaged += [(len(whole), int(place)) for place in random.integers(len(whole), size=100)]
    damaged += [(len(whole), int(place)) for place in random.integers(60, size=50)]  # the first tags and lengths
    refused = 0
    for size, place in damaged:
        content = bytearray(whole[:size])
        if place is not None:
            content[place] ^= 1 << int(random.integers(8))
        path.write_bytes(content)
        tracemalloc.start()
        try:
            found = read_caffemodel(path)
            assert place is not None and sum(a.size for blobs in found.values() for a in blobs) <= len(whole) // 4
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < len(whole) / 2, (size, place, peak)
    assert 100 <= refused < len(damaged)


def test_random_bytes_and_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "any.binaryproto"
    random = np.random.default_rng(1)
    for content in [b"", blob(VALUES)[:-3], network({"a": [blob(VALUES)]}, "V1"), random.bytes(5000)]:
        path.write_bytes(content)
        with pytest.raises(UserError, match="give another file") as caught:
            read_binaryproto(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    for _ in range(300):
        path.write_bytes(random.bytes(int(random.integers(1, 400))))
        with pytest.raises(UserError):
            read_caffemodel(path)
    with pytest.raises(UserError, match="is not a file"):
        read_caffemodel(tmp_path)


def test_time_and_memory_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    """Half a million unpacked values, in one run or cut by other fields, are read or refused at once."""
    path = tmp_path / "net.caffemodel"
    values = np.random.default_rng(2).normal(size=500_000).astype("<f4")
    records = np.zeros(len(values), [("tag", "u1"), ("value", "<f4")])
    records["tag"], records["value"] = 5 << 3 | 5, values
    start = time.process_time()
    path.write_bytes(network({"a": [records.tobytes()]}, "V1"))
    np.testing.assert_array_equal(read_caffemodel(path)["a"][0], values)

    cut = b"".join(records[i : i + 100].tobytes() + b"\x50\x01" for i in range(0, len(records), 100))
    path.write_bytes(network({"a": [cut]}, "V1"))
    np.testing.assert_array_equal(read_caffemodel(path)["a"][0], values)

    alternating = b"".join(records[i : i + 1].tobytes() + b"\x50\x01" for i in range(200_000))
    for content in (network({"a": [alternating]}, "V1"), b"\x50\x01" * 3_000_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match="more than 100000 fields"):
            read_caffemodel(path)
    assert time.process_time() - start < 10  # about 1 s; quadratic code takes minutes


def test_a_layer_twice_counts_only_where_it_has_blobs(tmp_path: Path) -> None:
    """The data layer of training and of testing have one name and no blobs; a shape in two messages is merged."""
    path = tmp_path / "net.caffemodel"
    merged = b"".join(field(7, field(1, d)) for d in VALUES.shape) + field(5, VALUES.tobytes())
    path.write_bytes(network({"data": []}, "V1") * 2 + network({"a": [merged]}, "layer"))
    np.testing.assert_array_equal(read_caffemodel(path)["a"][0], VALUES)
    path.write_bytes(network({"a": [merged]}, "layer") * 2)
    with pytest.raises(UserError, match="layer 'a': it is there twice"):
        read_caffemodel(path, wanted=["b"])


def test_wanted_layers_alone_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "net.caffemodel"
    path.write_bytes(network({"a": [blob(VALUES)], "b": [field(5, b"12345")]}, "V1"))
    np.testing.assert_array_equal(read_caffemodel(path, wanted={"a"})["a"][0], VALUES)
    with pytest.raises(UserError, match="layer 'b'"):
        read_caffemodel(path, wanted={"b"})


def test_doubles_replace_floats_as_in_caffe(tmp_path: Path) -> None:
    path = tmp_path / "mean.binaryproto"
    path.write_bytes(field(5, b"12341234") + field(8, struct.pack("<2d", 0.5, -2.0)))
    np.testing.assert_array_equal(read_binaryproto(path), [0.5, -2.0])


def official_network():
    """An empty NetParameter of the official protobuf runtime; ImportError where that is not installed."""
    from google.protobuf import descriptor_pb2 as descriptor
    from google.protobuf import descriptor_pool, message_factory

    file = descriptor.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    types = descriptor.FieldDescriptorProto
    repeated, optional = types.LABEL_REPEATED, types.LABEL_OPTIONAL
    messages = {
        "BlobShape": [("dim", 1, types.TYPE_INT64, repeated, None, True)],
        "BlobProto": [
            ("num", 1, types.TYPE_INT32, optional, None, False),
            ("channels", 2, types.TYPE_INT32, optional, None, False),
            ("height", 3, types.TYPE_INT32, optional, None, False),
            ("width", 4, types.TYPE_INT32, optional, None, False),
            ("data", 5, types.TYPE_FLOAT, repeated, None, True),
            ("shape", 7, types.TYPE_MESSAGE, optional, "BlobShape", False),
            ("double_data", 8, types.TYPE_DOUBLE, repeated, None, True),
        ],
        "V1LayerParameter": [
            ("name", 4, types.TYPE_STRING, optional, None, False),
            ("blobs", 6, types.TYPE_MESSAGE, repeated, "BlobProto", False),
        ],
        "LayerParameter": [
            ("name", 1, types.TYPE_STRING, optional, None, False),
            ("blobs", 7, types.TYPE_MESSAGE, repeated, "BlobProto", False),
        ],
        "NetParameter": [
            ("layers", 2, types.TYPE_MESSAGE, repeated, "V1LayerParameter", False),
            ("layer", 100, types.TYPE_MESSAGE, repeated, "LayerParameter", False),
        ],
    }
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind, label, of, packed in fields:
            added = message.field.add(name=field_name, number=number, type=kind, label=label)
            if of:
                added.type_name = f".caffe.{of}"
            if packed:
                added.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.NetParameter"))()


def test_against_the_official_protobuf_runtime(tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf")
    net = official_network()
    old = net.layers.add(name="old").blobs.add(num=4, channels=1, height=3, width=2)
    old.data.extend(VALUES.ravel().tolist())
    new = net.layer.add(name="new").blobs.add()
    new.shape.dim.extend(VALUES.shape)
    new.double_data.extend(VALUES.ravel().astype(float).tolist())
    path = tmp_path / "net.caffemodel"
    path.write_bytes(net.SerializeToString())
    found = read_caffemodel(path)
    for name in ("old", "new"):
        np.testing.assert_array_equal(found[name][0], VALUES)


PROTOTXT = """
input: "data" input_dim: 1 input_dim: 4 input_dim: 9 input_dim: 8
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 6 kernel_size: 3 pad: 1 group: 2 } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "relu" }
layer { name: "norm" type: "LRN" bottom: "relu" top: "norm" lrn_param { local_size: 5 alpha: 0.0001 beta: 0.75 } }
layer { name: "pool" type: "Pooling" bottom: "norm" top: "pool"
  pooling_param { pool: MAX kernel_size: 3 stride: 2 } }
layer { name: "fc" type: "InnerProduct" bottom: "pool" top: "fc" inner_product_param { num_output: 5 } }
"""


def test_against_opencv(tmp_path: Path) -> None:
    """OpenCV reads the same file into its own engine; the input has a size at which all pooling modes agree."""
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2.dnn, "readNetFromCaffe"):
        pytest.skip("this OpenCV has no Caffe importer")
    random = np.random.default_rng(0)
    arrays = {
        "conv": (random.normal(size=(6, 2, 3, 3)), random.normal(size=6)),
        "fc": (random.normal(size=(5, 6 * 4 * 4)), random.normal(size=5)),
    }
    prototxt, path = tmp_path / "net.prototxt", tmp_path / "net.caffemodel"
    prototxt.write_text(PROTOTXT.replace("input_dim: 8", "input_dim: 9"))
    layers = {n: [blob(a.astype(np.float32), "packed") for a in pair] for n, pair in arrays.items()}
    path.write_bytes(network(layers, "layer"))
    x = random.normal(size=(1, 4, 9, 9)).astype(np.float32) * 50
    net = cv2.dnn.readNetFromCaffe(str(prototxt), str(path))
    net.setInput(x)
    expected = net.forward("fc")
    blobs = {n: [torch.from_numpy(np.array(b)) for b in found] for n, found in read_caffemodel(path).items()}
    y = F.conv2d(torch.from_numpy(x), *blobs["conv"], padding=1, groups=2).relu()
    y = F.max_pool2d(F.local_response_norm(y, 5, 1e-4, 0.75, 1.0), 3, 2).flatten(1)
    np.testing.assert_allclose(F.linear(y, *blobs["fc"]).numpy(), expected, rtol=1e-3, atol=1e-2)
