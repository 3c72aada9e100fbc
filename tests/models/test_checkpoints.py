"""Faults in safetensors files: CNN weights, language models, projections and the states of interrupted runs.

The files are built byte by byte, so that their headers can lie. Whatever the fault: one line that names the file, and
nothing is taken over from it.
"""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import train_vlm
from models import checkpoints
from models.backbones import ARCHITECTURES, Backbone, random_parameters
from models.descent import Adam, Pixels
from models.errors import UserError
from models.projection import Projection
from models.vlm import VisualLanguageModel
from models.weights.read import read_weights
from pipeline import reconstruction, targets
from pipeline.features import Features, Provenance
from pipeline.language_models import build_model
from pipeline.training_runs import Run, TrainingFacts
from pipeline.views import Views
from tests.tiny import TINY

Entry = tuple[str, list[int], bytes]  # type, shape and bytes of a tensor
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "C64": 8}
SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5, "F6_E2M3": 0.75, "NONSENSE": 4}
NOT_FINITE = (np.nan, np.inf, -np.inf)


def entry(values: Tensor) -> Entry:
    return "F32", list(values.shape), values.detach().numpy().astype("<f4").tobytes()


def encode(entries: dict[str, Entry], metadata: dict | None, **changes: object) -> bytes:
    """A safetensors file; `changes` replace parts of the header."""
    header, values = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, (kind, shape, raw) in entries.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(values), len(values) + len(raw)]}
        values += raw
    text = json.dumps(header | changes).encode()
    return struct.pack("<Q", len(text)) + text + values


class Case:
    """A kind of file: its tensors, its configuration (None: without) and what reads it."""

    def __init__(self, tensors: dict[str, Tensor], configuration: dict | None, read: Callable[[Path], object]):
        self.entries = {name: entry(values) for name, values in tensors.items()}
        self.configuration = configuration
        self.read = read

    def metadata(self, **changes: object) -> dict | None:
        if self.configuration is None:
            return None
        return {"configuration": json.dumps({"format": checkpoints.FORMAT, **self.configuration, **changes})}

    def whole(self) -> bytes:
        return encode(self.entries, self.metadata())


def tiny_model() -> VisualLanguageModel:
    random = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random) + 0.1

    projections = {
        "conv1": Projection(values(6), values(6), values(2, 6), values(6)),
        "conv2": Projection(values(20), values(20), values(3, 20), values(20)),
    }
    taps = {"data": 3, "fc3": 5}
    vlm = VisualLanguageModel(projections, {t: {"mean": values(c), "std": values(c)} for t, c in taps.items()})
    vlm.initialise(0)
    return vlm


@pytest.fixture(params=["weights", "model", "projection", "training", "reconstruction"])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Case:
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)
    return {
        "weights": weights_case,
        "model": model_case,
        "projection": projection_case,
        "training": training_case,
        "reconstruction": reconstruction_case,
    }[request.param](tmp_path)


def weights_case(folder: Path) -> Case:
    return Case(random_parameters(TINY, 0), None, lambda path: read_weights(path, TINY))


def model_case(folder: Path) -> Case:
    configuration = {"backbone": "tiny", "layers": ["conv1", "conv2"], "training": {"conv1": {"seed": 0}}}
    return Case(checkpoints.vlm_tensors(tiny_model()), configuration, checkpoints.load_vlm)


def projection_case(folder: Path) -> Case:
    """What stages 3 and 4 read of stage 2's file."""
    tensors = {n: v for n, v in checkpoints.vlm_tensors(tiny_model()).items() if ".projection." in n or "stat" in n}

    def read(path: Path) -> object:
        found, configuration = checkpoints.read_tensors(path)
        layers = checkpoints.listed_layers(configuration, path)
        model = build_model(found, layers, 0)
        return model, targets.read_statistics(path, "tiny")

    return Case(tensors, {"backbone": "tiny", "layers": ["conv1", "conv2"]}, read)


def training_run(root: Path) -> Run:
    provenance = Provenance("tiny", "", "0", "2", "1", None, ("conv1",))
    stored = {"conv1": np.ones((12, 3, 3, 2), np.float32)}
    features = Features(stored, {}, provenance, Views(), [str(i) for i in range(12)], [])
    facts = TrainingFacts(
        **features.facts(),
        iterations=8,
        batch_size=1,
        learning_rate=0.1,
        momentum=0.9,
        decay_at=(2, 4, 6),
        decay_factor=0.1,
        seed=0,
        held_out=1,
        held_out_names=("3",),
    )
    return Run(root, root / "vlm.safetensors", tiny_model(), features, facts)


def make_update(run: Run) -> None:
    """One update on the first row, and its note."""

    class Made(Exception):
        """The one that was asked for."""

    def callback(losses: dict[str, float]) -> None:
        run.add(losses)
        raise Made

    with pytest.raises(Made):
        layers, stored, draw = run.vlm.layers, run.features.stored, lambda i: np.zeros(1, int)
        train_vlm.train(layers, stored, draw, run.optimizer, run.schedule, 8, callback, run.iteration)


def training_case(folder: Path) -> Case:
    run = training_run(folder)
    run.merge = lambda: None
    make_update(run)
    run.write_log_lines(np.array([3]), "cpu")
    make_update(run)
    run.save()
    tensors, noted = checkpoints.read_tensors(run.state)
    weights = [p.clone() for p in training_run(folder).optimizer.parameters]

    def read(path: Path) -> object:
        again = training_run(folder)
        path.replace(again.state)
        try:
            again.resume(False)
        except UserError:
            assert again.iteration == 0 and not again.log
            for parameter, weight, velocity in zip(
                again.optimizer.parameters, weights, again.optimizer.velocities, strict=True
            ):
                assert torch.equal(parameter, weight) and not velocity.any()
            raise
        assert again.iteration == 2 and len(again.log) == 1 and len(again.losses["conv1"]) == 1
        return again

    return Case(tensors, noted, read)


def reconstruction_restart(folder: Path) -> reconstruction.Restart:
    backbone = Backbone(TINY, random_parameters(TINY, 0))
    image = Pixels(torch.full((1, 3, 24, 24), 7.0))
    facts = {"iterations": 3, "target": "fc3"}
    return reconstruction.Restart(0, folder, backbone, image, Adam(image.parameters, 1.0), facts)


def reconstruction_case(folder: Path) -> Case:
    restart = reconstruction_restart(folder)
    restart.curves = [{"total": 3.0, "feature": 2.0}, {"total": 2.0, "feature": 1.5}]
    restart.snapshot()
    tensors, noted = checkpoints.read_tensors(restart.state)

    def read(path: Path) -> object:
        again = reconstruction_restart(folder)
        path.replace(again.state)
        try:
            again.resume()
        except UserError:
            assert not again.curves and bool((again.image() == 7).all()) and not again.optimizer.velocities[0].any()
            raise
        assert len(again.curves) == 2
        return again

    return Case(tensors, noted, read)


def refused(case: Case, path: Path, content: bytes, what: object) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        case.read(path)
        pytest.fail(f"accepted: {what}")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700, message
    return message


def faulty_tensors(case: Case) -> Iterator[tuple[str, dict[str, Entry]]]:
    """A tensor missing, under another name or of another shape, for every one (of many: every seventh); one too many.

    Values that are not finite and every other type: all in the first tensor, some in each of the others.
    """
    step = 7 if len(case.entries) > 50 else 1
    for place, (name, (_, shape, raw)) in enumerate(list(case.entries.items())[::step]):
        others = {other: value for other, value in case.entries.items() if other != name}
        count = len(raw) // 4
        yield f"{name} missing", others
        yield f"{name} renamed", others | {f"{name}x": case.entries[name]}
        for other in {(count + 1,), (1, *shape), (0, *shape[1:])} - {tuple(shape)}:
            size = 4 * int(np.prod(other))
            yield f"{name} {other}", others | {name: ("F32", list(other), (raw + b"\0\0\0\0")[:size])}
        for value in NOT_FINITE if not place else NOT_FINITE[place % 3 :][:1]:
            yield f"{name} {value}", others | {name: ("F32", shape, raw[:-4] + struct.pack("<f", value))}
        beyond = np.full(count, 1e300, "<f8").tobytes()
        yield f"{name} beyond float32", others | {name: ("F64", shape, beyond)}
        for kind, size in SIZES.items() if not place else list(SIZES.items())[place % len(SIZES) :][:1]:
            if float(size * count).is_integer():
                yield f"{name} {kind}", others | {name: (kind, shape, bytes(int(size * count)))}
    for extra in ("extra", "extra.weight", "statistics.conv1.other", "conv1.projection.mean.x", "conv1.extra"):
        yield f"{extra} added", case.entries | {extra: entry(torch.ones(6))}


def test_faulty_tensors_are_refused(case: Case, tmp_path: Path) -> None:
    tried = 0
    partial = case.read.__qualname__.startswith("projection_case")  # it takes what it needs and may hold more
    for what, entries in faulty_tensors(case):
        if partial and ("added" in what or what.endswith("renamed")):
            continue
        message = refused(case, tmp_path / "x.safetensors", encode(entries, case.metadata()), what)
        assert "safetensors" in message, (what, message)
        tried += 1
    assert tried > 30


def test_whole_files_are_read_in_every_precision(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(case.whole())
    case.read(path)
    values = {name: np.frombuffer(raw, "<f4") for name, (_, _, raw) in case.entries.items()}
    for kind, dtype in (("F16", "<f2"), ("F64", "<f8")):
        entries = {n: (kind, case.entries[n][1], v.astype(dtype).tobytes()) for n, v in values.items()}
        path.write_bytes(encode(entries, case.metadata()))
        case.read(path)


def test_lying_headers_are_refused(case: Case, tmp_path: Path) -> None:
    path, whole = tmp_path / "x.safetensors", case.whole()
    (length,) = struct.unpack_from("<Q", whole)
    name, other = list(case.entries)[:2]
    size = len(case.entries[name][2])

    def described(shape: list, offsets: list, kind: object = "F32") -> bytes:
        return encode(case.entries, case.metadata(), **{name: {"dtype": kind, "shape": shape, "data_offsets": offsets}})

    lies = [
        *(
            struct.pack("<Q", n) + whole[8:]
            for n in (0, 1, length - 1, length + 1, len(whole), 2**31, 2**63, 2**64 - 1)
        ),
        described([2**40], [0, 2**42]),
        described([2**62, 4], [0, size]),
        described([size // 4], [0, size + 4]),
        described([size // 4], [size, 0]),
        described([-size // 4], [0, size]),
        described([size / 4], [0, size]),
        described([size // 4], [0, size], 7),
        described(["a"], [0, size]),
        described([size // 4], [4, size + 4]),
        encode(
            case.entries, case.metadata(), **{other: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
        ),
        encode(case.entries, case.metadata(), **{name: None}),
        encode(case.entries, {"configuration": 3}),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 5) + b'{"a":',
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        whole + b"\0",
        whole[:8],
        b"",
        b"\x80\x04N.",
    ]
    for number, content in enumerate(lies):
        refused(case, path, content, f"lie {number}")
    step = max(1, len(whole) // 100)
    for cut in range(0, len(whole), step):
        refused(case, path, whole[:cut], f"cut at {cut}")


@pytest.mark.parametrize("kind", [model_case, training_case, reconstruction_case])
def test_flipped_bytes_never_raise_anything_else(
    kind: Callable[[Path], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)
    case, random = kind(tmp_path), np.random.default_rng(0)
    whole, refusals = case.whole(), 0
    (length,) = struct.unpack_from("<Q", whole)
    for _ in range(100):
        content = bytearray(whole)
        content[random.integers(8 + length)] ^= 1 << random.integers(8)
        (tmp_path / "x.safetensors").write_bytes(content)
        try:
            case.read(tmp_path / "x.safetensors")
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
        except AssertionError:  # the notes say something else that they might have said
            pass
    assert refusals > 30


CONFIGURATIONS = [
    ("none at all", None),
    ("no JSON", {"configuration": "{"}),
    ("a list", {"configuration": "[]"}),
    ("deep", {"configuration": "[" * 100_000}),
    ("an earlier format", {"configuration": json.dumps({"format": "cnn-vlm 0"})}),
    ("a later format", {"configuration": json.dumps({"format": "cnn-vlm 2"})}),
    ("a format that is none", {"configuration": json.dumps({"format": ["cnn-vlm 1"]})}),
    ("only the format", {"configuration": json.dumps({"format": checkpoints.FORMAT})}),
]


@pytest.mark.parametrize("case", ["model", "projection", "training", "reconstruction"], indirect=True)
def test_other_configurations_are_refused(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for what, metadata in CONFIGURATIONS:
        message = refused(case, path, encode(case.entries, metadata), what)
        if "er format" in what:
            assert f"not {checkpoints.FORMAT!r}: it was not written by this version" in message
    for key in case.configuration:
        for value in (None, 3, -1, True, "x", [], [1], ["a.b"], [""], ["keys"], ["training"], ["conv1"] * 2, {"a": 1}):
            if key == "facts" and isinstance(value, dict) or key == "backbone" and isinstance(value, str):
                continue  # not this run's state; another backbone is refused where it is looked up
            if (key, value) in (("iteration", 3), ("curves", []), ("log", [])):
                continue  # so it might be
            refused(case, path, encode(case.entries, case.metadata(**{key: value})), (key, value))


@pytest.mark.parametrize("kind", [training_case, reconstruction_case])
def test_damaged_notes_of_a_state_are_refused(
    kind: Callable[[Path], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)
    case = kind(tmp_path)
    if kind is training_case:
        (line,) = case.configuration["log"]
        changes = [{"log": [log]} for log in (line[:-1], [*line, 1.0], "abcdefgh", ["other", *line[1:]], None)]
        changes += [{"log": [[line[0], value, *line[2:]]]} for value in ("1", 1.5, None)]
        changes += [{"losses": losses} for losses in ({}, {"conv1": 1}, {"conv1": ["1"]}, {"conv1": [], "conv2": []})]
        changes += [{"facts": {**case.configuration["facts"], "decay_at": at}} for at in (3, "246", [None], {"a": 2})]
        changes += [{"iteration": value} for value in (-1, 9, 2**70, 1.0)]
    else:
        terms = {"total": 1.0, "feature": 1.0}
        curves = [[terms] * 4, [terms, {"total": 1.0}], [{"total": 1.0}], [terms, 3], [3], [{**terms, "total": "1"}]]
        changes = [{"curves": value} for value in curves]
    for change in changes:
        message = refused(case, tmp_path / "x.safetensors", encode(case.entries, case.metadata(**change)), change)
        assert "--overwrite" in message


def test_a_small_file_that_announces_a_large_model_costs_no_memory(tmp_path: Path) -> None:
    """A projection to 8192 components fits into some bytes of float16; its language model would take 9 GB."""
    import resource

    size, path = 1500, tmp_path / "x.safetensors"
    tensors = {"mean": torch.zeros(size), "std": torch.ones(size), "pca_mean": torch.zeros(size)}
    entries = {f"conv1.projection.{name}": entry(values) for name, values in tensors.items()}
    entries["conv1.projection.components"] = ("F16", [size, size], bytes(2 * size * size))
    path.write_bytes(encode(entries, Case({}, {"backbone": "x", "layers": ["conv1"]}, print).metadata()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="should be .*, found None"):
        checkpoints.load_vlm(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KB; the model: 580 MB


@pytest.mark.parametrize(
    ("layer", "channels", "message"),
    [
        ("conv1", 7, "reads 7 channels of conv1, tiny has 6"),
        ("relu1", 6, "describes 'relu1', which tiny has not"),
        ("conv9", 6, "describes 'conv9', which tiny has not"),
    ],
)
def test_models_of_another_network_are_refused(
    layer: str, channels: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)
    parts = (torch.ones(channels), torch.ones(channels), torch.ones(1, channels), torch.ones(channels))
    vlm = VisualLanguageModel({layer: Projection(*parts)}, {})
    path = tmp_path / "x.safetensors"
    checkpoints.write_tensors(path, checkpoints.vlm_tensors(vlm), {"backbone": "tiny", "layers": [layer]})
    with pytest.raises(UserError, match=message):
        checkpoints.load_vlm(path)
