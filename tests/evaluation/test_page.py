"""The page of an evaluation."""

import json
from pathlib import Path

from PIL import Image

from evaluation import page
from tests.conftest import make_photo

TABLES = """Naturalness of 3 images, with 95% bootstrap intervals over images.

- language model: the checkpoint's
- predict nothing: the energy of the same features

Where the measure fails:

- conv5 calls *more* natural: blur 1

### alexnet-conv5

Share of copies (ties count half; chance .5).

| spoiled copy | language model       | predict nothing |
| ------------ | -------------------- | --------------- |
| noise 5      | 1.000 [1.000, 1.000] | 0.667           |
| blur 1       | –                    | 0.000           |

| other | AUC |
| ----- | --- |
| a     | 1   |
"""


def test_tables_and_what_is_said_of_them() -> None:
    notes, tables, meanings = page.parse_tables(TABLES)
    first, second = tables
    assert first.title == "alexnet-conv5: Share of copies" and first.note.endswith("chance .5).")
    assert first.head == ["spoiled copy", "language model", "predict nothing"]
    assert first.rows == [["noise 5", "1.000 [1.000, 1.000]", "0.667"], ["blur 1", "–", "0.000"]]
    assert second.rows == [["a", "1"]]
    assert meanings == {"language model": "the checkpoint's", "predict nothing": "the energy of the same features"}
    assert notes[0].startswith("Naturalness of 3 images") and "conv5 calls more natural: blur 1" in notes


def test_page_holds_tables_pictures_and_what_was_compared_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "table.md").write_text(TABLES, encoding="utf-8")
    summary = {"images": 3, "models": {}, "differences": [], "confidence": 0.95, "versions": {"torch": "2"}}
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "settings": {"vlm": {"tv": 10}}}), encoding="utf-8")
    Image.fromarray(make_photo(0, 60, 90)).save(tmp_path / "pictures.png")
    page.write_page(tmp_path, "reconstruction")
    written = tmp_path / "report.html"
    text, time = written.read_text(encoding="utf-8"), written.stat().st_mtime_ns
    assert text.count("<table") == 2 and text.count("data:image/png;base64") == 1
    assert "vlm tv 10" in text and "Reconstructions against their originals" in text
    page.write_page(tmp_path, "reconstruction")
    assert written.stat().st_mtime_ns == time
