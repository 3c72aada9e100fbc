"""Language models as files: made from a projection, started from others, merged into a checkpoint, exported."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from models.checkpoints import load_vlm, merge_layers, read_tensors, take_projection, take_statistics, vlm_tensors
from models.errors import UserError
from models.projection import Projection
from models.vlm import VisualLanguageModel
from models.weights.downloads import file_hash
from pipeline import artefacts, figures, ownership, program
from pipeline.training_log import LogLine, merge_log

SAME_PROJECTION = 2e-3  # of values near 1: what float16 and another machine's eigenvectors may change


def build_model(
    tensors: Mapping[str, torch.Tensor], layers: Sequence[str], seed: int, cell: str = "lstm"
) -> VisualLanguageModel:
    """A model with the projections of stage 2 and freshly drawn weights, every layer of one kind of `models.vlm.CELLS`.

    Raises:
        UserError: a projection does not fit together.
    """
    tensors, source = dict(tensors), "projection.safetensors"
    projections = {layer: take_projection(tensors, layer, source) for layer in layers}
    vlm = VisualLanguageModel(projections, take_statistics(tensors, source), dict.fromkeys(layers, cell))
    vlm.initialise(seed)
    return vlm


def start_from(path: Path, vlm: VisualLanguageModel, backbone: str) -> str:
    """Give a model the weights of a checkpoint, whose sha256 is returned; the projections stay.

    Where they differ from the checkpoint's by more than rounding, the weights are expressed in the new basis.

    Raises:
        UserError: another backbone, another kind of recurrent model, or a layer that it lacks.
    """
    trained, notes = load_vlm(path)
    if changed := artefacts.differences(vars(notes), {"backbone": backbone}):
        raise UserError(f"{path} does not fit ({'; '.join(changed)}): give another --init")
    for name, layer in vlm.layers.items():
        if name not in trained.layers:
            raise UserError(f"{path} has no layer {name}: give another --init, or other --layers")
        ours, theirs = vlm.projections[name], trained.projections[name]
        if ours.components.shape != theirs.components.shape:
            raise UserError(f"{path} keeps {theirs.size} components of {name}, not {ours.size}: give another --init")
        if layer.cell != trained.layers[name].cell:
            raise UserError(f"{path} has a {trained.layers[name].cell} for {name}: give --cell so, or another --init")
        if not is_same_projection(ours, theirs):
            trained.layers[name].change_basis(ours.change_to(theirs), theirs.change_to(ours))
            print(f"{name}: the weights of {path} are expressed in the new projection", flush=True)
        layer.load_state_dict(trained.layers[name].state_dict())
    return file_hash(path)


def is_same_projection(one: Projection, other: Projection) -> bool:
    """Whether two projections differ by no more than rounding."""
    return all(
        torch.allclose(a, b, rtol=0, atol=SAME_PROJECTION * max(1.0, float(a.abs().max())))
        for a, b in zip(one.buffers(), other.buffers(), strict=True)
    )


def check_projection(path: Path, noted: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise a UserError if the layers of a checkpoint, of which `noted` tells, stand on another projection."""
    if changed := artefacts.differences(noted, {key: wanted[key] for key in ("backbone", "projection_sha256")}):
        raise UserError(
            f"{path} is of another projection ({'; '.join(changed)}): use another --root or --out, or --overwrite "
            "to replace it"
        )


@contextmanager
def merging(root: Path) -> Iterator[None]:
    """Wait until no other process merges layers in a workspace, then keep others out."""
    folder = root / "train_state"
    folder.mkdir(parents=True, exist_ok=True)
    ownership.check_lock(folder / "merge.lock")
    with FileLock(folder / "merge.lock"):
        yield


def merge_checkpoint(
    out: Path,
    tensors: Mapping[str, torch.Tensor],
    configuration: artefacts.Facts,
    log: Sequence[LogLine],
    picture: Path,
) -> None:
    """Put the layers of `configuration["training"]` into the checkpoint `out`, beside those it holds already.

    A checkpoint of another projection is replaced (`check_projection` refused it before the training). The sidecar,
    which states the sha256 of the checkpoint, comes last.
    """
    training = configuration["training"]
    if out.is_file():
        earlier, noted = read_tensors(out)
        if noted.get("projection_sha256") == configuration["projection_sha256"]:
            tensors = merge_layers(earlier, tensors, list(training))
            training = noted["training"] | training
    layers = [name for name in configuration["all_layers"] if name in training]
    configuration = {**configuration, "training": {name: training[name] for name in layers}, "layers": layers}
    artefacts.write_tensors(out, tensors, configuration)
    figures.loss_curves(log, picture)
    described = {**configuration, "sha256": file_hash(out), "versions": program.versions()}
    artefacts.write_json(artefacts.sidecar_path(out), described)


def merge_files(files: Sequence[Path], out: Path, root: Path, overwrite: bool) -> None:
    """Add the layers of other checkpoints, trained on the same projection, to `out`; what is there stays.

    Raises:
        UserError: another projection, or a layer that two of the files hold with other weights (`overwrite`: the
            last one counts).
    """
    for path in files:
        vlm, notes = load_vlm(path)
        tensors = vlm_tensors(vlm)
        with merging(root):
            if out.is_file():
                earlier, noted = read_tensors(out)
                check_projection(path, notes.configuration, noted)
                for name, value in () if overwrite else tensors.items():
                    if name in earlier and not torch.equal(earlier[name], value):
                        raise UserError(
                            f"{path} and {out} hold other weights of {name.split('.')[0]}: "
                            "use --overwrite to take the former"
                        )
            log = merge_log(root / "log.csv", [], [])
            merge_checkpoint(out, tensors, notes.configuration, log, root / "figures" / "loss.png")
        print(f"{out}: {', '.join(vlm.layers)} of {path}")


def export(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint with all weights as float16; means and deviations stay float32."""
    vlm, notes = load_vlm(checkpoint)
    artefacts.write_tensors(out, vlm_tensors(vlm, torch.float16), {**notes.configuration, "dtype": "float16"})
    print(f"{out}: {', '.join(vlm.layers)} of {checkpoint} as float16")
