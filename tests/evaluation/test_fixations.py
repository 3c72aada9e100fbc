"""Reading fixations: tables, the two data sets' MATLAB files, and files that are damaged or mean harm."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from evaluation import fixations as reading
from evaluation import matlab
from models.errors import UserError
from pipeline.names import Names

STIMULI = {"a.jpg": (60, 80), "b.png": (30, 40), "c.jpg": (10, 10)}
HEADER = "image,subject,x,y,duration_ms\n"


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_csv_is_read_in_full(tmp_path):
    rows = "b.png,3,39.5,0,120\na.jpg,0,1,2,9\nb.png,3,39.5,0,120\n\nfolder/a.jpg,,79.99,59.99,\na,-1,5,6,1\n"
    found = reading.read_csv(write(tmp_path / "f.csv", HEADER + rows), STIMULI)
    assert found.names == ("a.jpg", "b.png", "c.jpg") and found.sizes.tolist() == [[60, 80], [30, 40], [10, 10]]
    assert found.image_index.tolist() == [1, 0, 1, 0, 0]
    assert found.x.tolist() == [39.5, 1, 39.5, 79.99, 5] and found.y.tolist() == [0, 2, 0, 59.99, 6]
    assert found.subject.tolist() == [3, 0, 3, -1, -1]
    assert (found.outside, found.not_finite, found.unknown, len(found)) == (0, 0, 0, 5)
    assert found.images_without() == ("c.jpg",)
    assert [part.tolist() for part in found.of_image(1)] == [[39.5, 39.5], [0, 0], [3, 3]]
    assert [part.size for part in found.of_image(2)] == [0, 0, 0]
    x, y = found.elsewhere(1)
    np.testing.assert_allclose(x, [0.5, 79.99 / 2, 2.5])
    np.testing.assert_allclose(y, [1, 59.99 / 2, 3])
    with pytest.raises(ValueError):
        found.x[0] = 1
    with pytest.raises(AttributeError):
        found.x = None


def test_csv_columns_may_be_in_any_order_with_others_among_them(tmp_path):
    text = '\ufeffy, note ,x,subject,image\r\n2,"left, then right",7,4,c.jpg\r\n'
    found = reading.read_csv(write(tmp_path / "f.csv", text), STIMULI)
    assert (found.x.tolist(), found.y.tolist(), found.subject.tolist()) == ([7.0], [2.0], [4])


def test_what_lies_outside_or_is_lost_or_unknown_is_counted(tmp_path):
    rows = (
        "a.jpg,0,80,1,\na.jpg,0,1,60,\na.jpg,0,-0.001,1,\na.jpg,0,nan,1,\na.jpg,0,1,inf,\nz.jpg,0,1,1,\na.jpg,0,1,1,\n"
    )
    found = reading.read_csv(write(tmp_path / "f.csv", HEADER + rows), STIMULI)
    assert (len(found), found.outside, found.not_finite, found.unknown) == (1, 3, 2, 1)


def test_all_fixations_outside_leave_an_empty_set(tmp_path):
    found = reading.read_csv(write(tmp_path / "f.csv", HEADER + "a.jpg,0,800,1,\n"), STIMULI)
    assert len(found) == 0 and found.outside == 1 and len(found.images_without()) == 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty: give a table of fixations with the columns image, subject, x, y"),
        ("<!DOCTYPE html>", "is a web page"),
        ("image,x\na.jpg,1\n", "lacks the column y: its first line must name image, x, y"),
        ("image x y\na.jpg 1 2\n", "it is 'image x y'"),
        ("image,subject,x,y,x\na.jpg,1,1,1,1\n", "column x twice"),
        (HEADER, "no fixations"),
        (HEADER + "a.jpg,0,one,2,\n", "line 2: x 'one' is not a number"),
        (HEADER + "a.jpg,0,1,2,\na.jpg,0,1,?,\n", "line 3: y '?' is not a number"),
        ("image;x;y\na.jpg;1;1.234,5\n", "line 2: y '1.234,5' is not a number"),
        (HEADER + "a.jpg,1,2\n", "line 2: 3 values under 5 columns"),
        (HEADER + "other.jpg,0,1,2,\n", "names none of the 3 stimuli (but 'other.jpg')"),
        (HEADER + 'a.jpg,0,"1,2,\n', "not a table"),
    ],
)
def test_csv_mistakes_cost_one_line(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        reading.read_csv(write(tmp_path / "f.csv", text), STIMULI)
    assert message in one_line(error)


@pytest.mark.parametrize(
    "text",
    [
        "image,subject,x,y\na.jpg,s1,1.5,2\nb.png,s2,3,4\na.jpg,s1,5,6\n",
        "Image;Subject;X;Y\r\na.jpg;s1;1,5;2\r\nb.png;s2;3;4\r\na.jpg;s1;5,0;6\r\n",
        "IMAGE\tSUBJECT\tX\tY\na.jpg\ts1\t1.5\t2\nb.png\ts2\t3\t4\na.jpg\ts1\t5\t6\n",
        'sep=;\n"image";"x";"y";"subject"\n"a.jpg";"1.5";"2";"s1"\n"b.png";"3";"4";"s2"\n"a.jpg";"5";"6";"s1"\n',
        "\ufeff\nimage|x|y|note, if any|subject\na.jpg|1.5|2||10\nb.png|3|4||30\na.jpg|5|6||10\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_tables_as_programs_write_them(tmp_path, text, encoding):
    """Commas, semicolons, tabs, bars; any case; decimal commas; subjects of any name; a mark of the encoding."""
    path = tmp_path / "f.csv"
    path.write_bytes((text if encoding == "utf-8" else text.removeprefix("\ufeff")).encode(encoding))
    found = reading.read_fixations(path, STIMULI)
    assert (found.x.tolist(), found.y.tolist()) == ([1.5, 3, 5], [2, 4, 6])
    assert found.image_index.tolist() == [0, 1, 0] and found.unknown == 0
    assert found.subject.tolist() == ([10, 30, 10] if "|" in text else [0, 1, 0])


def test_subjects_need_only_differ(tmp_path):
    def subjects(*names):
        lines = "".join(f"a.jpg,{name},1,2,\n" for name in names)
        return reading.read_csv(write(tmp_path / "f.csv", HEADER + lines), STIMULI).subject.tolist()

    assert subjects("3", "0", "-1", "") == [3, 0, -1, -1]
    assert subjects("01", "1", "NA", "1") == [0, 1, -1, 1]
    assert subjects("1.0", "2.0", "nan") == [0, 1, -1]
    assert subjects("Ann", "s01", "Ann", str(2**70)) == [1, 2, 1, 0]
    found = reading.read_csv(write(tmp_path / "f.csv", "image,x,y\na.jpg,1,2\n"), STIMULI)
    assert found.subject.tolist() == [-1]


def test_lost_samples(tmp_path):
    lost = ["", "NA", "N/A", "NaN", "nan", "null", "None", ".", "-", "inf"]
    lines = "".join(f"a.jpg,0,{x},2,\na.jpg,0,2,{x},\n" for x in lost)
    found = reading.read_csv(write(tmp_path / "f.csv", HEADER + lines + "a.jpg,0,1,2,\n"), STIMULI)
    assert (len(found), found.not_finite, found.outside) == (1, 2 * len(lost), 0)


def test_names_that_meet_and_names_that_do_not(tmp_path):
    """Forms of accents and of letters' case meet where one image is meant; extensions only where there are no two."""
    stimuli = dict.fromkeys(
        ["cafe\u0301.jpg", "1.jpg", "B.png", "b.PNG", "2.jpg", "2.png", "x.jpg.png", "x.jpg"], (9, 9)
    )
    meant = {
        "caf\u00e9.jpg": 0, "CAF\u00c9.JPG": 0, "caf\u00e9": 0, "1.JPG": 1, "C:\\photos\\1.jpg": 1, "1": 1, "B.png": 2,
        "b.PNG": 3, "b.png": None, "2": None, "2.jpg": 4, "2.PNG": 5, "2.gif": None, "x.jpg": 7, "x": 7, "X.JPG": 7,
    }  # fmt: skip
    assert {name: Names(list(stimuli)).find(name) for name in meant} == meant
    assert Names(["1.jpg"], stems=False).find("1") is None
    lines = "".join(f"{name},0,1,2,\n" for name in meant)
    found = reading.read_csv(write(tmp_path / "f.csv", HEADER + lines), stimuli)
    assert found.image_index.tolist() == [place for place in meant.values() if place is not None]
    assert found.unknown == 3


def test_csv_that_is_missing_binary_or_a_folder(tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"image,subject,x,y\n\xff\xfe\x00\x01")
    (tmp_path / "folder.csv").mkdir()
    for name in ("none.csv", "binary.csv", "folder.csv"):
        with pytest.raises(UserError) as error:
            reading.read_fixations(tmp_path / name, STIMULI)
        assert name in one_line(error)


def test_names_without_extension_only_where_unambiguous(tmp_path):
    stimuli = {"a.jpg": (9, 9), "a.png": (9, 9), "b.jpg": (9, 9)}
    found = reading.read_csv(write(tmp_path / "f.csv", HEADER + "a,0,1,1,\nb,0,1,1,\na.png,0,1,1,\n"), stimuli)
    assert found.image_index.tolist() == [2, 1] and found.unknown == 1


def cells(*values):
    array = np.empty((len(values), 1), dtype=object)
    array[:, 0] = values
    return array


def osie(*images):
    """Images (name, [(x, y) of each person]) in the form of the data set's own file."""
    return cells(
        *(
            {"img": name, "subjects": cells(*({"fix_x": x, "fix_y": y, "fix_duration": x} for x, y in people))}
            for name, people in images
        )
    )


@pytest.mark.parametrize("compressed", [False, True])
def test_osie_file(tmp_path, compressed):
    nobody = np.empty((0, 0))
    people = [(np.array([[1.5, 2, 300]]), np.array([[5.25, 6, 7]])), (nobody, nobody), (np.float64(9), np.float64(8))]
    path = tmp_path / "fixations.mat"
    images = osie(("a.jpg", people), ("c.jpg", people[2:]), ("d.jpg", people[2:]))
    savemat(path, {"fixations": images}, do_compression=compressed)
    found = reading.read_fixations(path, STIMULI)
    assert found.image_index.tolist() == [0, 0, 0, 2] and found.subject.tolist() == [0, 0, 2, 0]
    assert found.x.tolist() == [1.5, 2, 9, 9] and found.y.tolist() == [5.25, 6, 8, 8]
    assert (found.outside, found.unknown) == (1, 1)


@pytest.mark.parametrize("dtype", [np.uint8, bool, np.float64])
def test_toronto_file(tmp_path, dtype):
    maps = np.empty((1, 3), dtype=object)
    for i in range(3):
        maps[0, i] = np.zeros((4, 6), dtype)
    maps[0, 0][3, 5] = maps[0, 0][1, 0] = maps[0, 2][2, 4] = 1
    path = tmp_path / "origfixdata.mat"
    savemat(path, {"white": maps})
    stimuli = {"3.jpg": (4, 6), "1.jpg": (4, 6), "2.jpg": (4, 6)}
    found = reading.read_fixations(path, stimuli)
    assert found.image_index.tolist() == [1, 1, 0]
    assert (found.x.tolist(), found.y.tolist()) == ([0, 5, 4], [1, 3, 2])
    assert found.subject.tolist() == [-1, -1, -1] and found.images_without() == ("2.jpg",)
    with pytest.raises(UserError) as error:
        reading.read_fixations(path, stimuli | {"1.jpg": (6, 4)})
    assert "map 1 has 6×4 pixels and 1.jpg 4×6" in one_line(error)


def refused(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        reading.read_fixations(path, STIMULI)
    return one_line(error)


HEADER_OF_MAT = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM"


def cell_head(name=b"", rows=1, columns=1):
    """Flags, dimensions and name of a cell array, as MATLAB's format writes them."""
    padding = bytes(-len(name) % 8)
    flags, dimensions = struct.pack("<IIII", 6, 8, 1, 0), struct.pack("<IIii", 5, 8, rows, columns)
    return flags + dimensions + struct.pack("<II", 1, len(name)) + name + padding


def array_element(content):
    return struct.pack("<II", 14, len(content)) + content


def test_deeply_nested_cells_are_refused(tmp_path):
    levels = 100_000  # enough to overflow the stack of a reader that follows them all
    head = cell_head()
    sizes = [8 + (len(head) + 8) * k for k in range(levels, 0, -1)]
    nested = b"".join(struct.pack("<II", 14, size - 8) + head for size in sizes) + struct.pack("<II", 14, 0)
    content = HEADER_OF_MAT + array_element(cell_head(b"white") + nested)
    assert "nested too deeply" in refused(tmp_path / "x.mat", content)


def test_compression_bombs_and_false_sizes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(matlab, "LIMIT", 1 << 16)
    packed = zlib.compress(bytes(1 << 20))
    content = HEADER_OF_MAT + struct.pack("<II", 15, len(packed)) + packed
    assert "cut off or too large" in refused(tmp_path / "bomb.mat", content)
    harmless = zlib.compress(array_element(cell_head(b"other") + bytes(40_000)))
    twice = (struct.pack("<II", 15, len(harmless)) + harmless) * 2  # only together too large
    assert "cut off or too large" in refused(tmp_path / "bombs.mat", HEADER_OF_MAT + twice)
    content = HEADER_OF_MAT + array_element(cell_head(b"white", 2**31 - 1, 2**31 - 1))
    assert "a cell array is cut off" in refused(tmp_path / "x.mat", content)
    assert "more than" in refused(tmp_path / "large.mat", bytes((1 << 16) + 1))


def test_other_variables_of_the_file_do_not_matter(tmp_path):
    spot = osie(("a.jpg", [(np.ones(1), np.ones(1))]))
    many = np.zeros(3, dtype=[("field", "f8")])  # an array of structures, which is not read
    savemat(tmp_path / "x.mat", {"before": many, "fixations": spot, "after": 1j})
    assert len(reading.read_fixations(tmp_path / "x.mat", STIMULI)) == 1


def test_pickles_and_other_files_are_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    trap = pickle.dumps(Trap())
    array = io.BytesIO()
    np.save(array, np.array([Trap()], dtype=object), allow_pickle=True)
    hdf5 = b"MATLAB 7.3 MAT-file".ljust(124) + struct.pack("<H", 0x0200) + b"IM" + b"\x89HDF\r\n"
    for content in (trap, array.getvalue(), hdf5, b"", b"\0" * 500, HEADER_OF_MAT[:100], HEADER_OF_MAT + trap):
        refused(tmp_path / "x.mat", content)
    with pytest.raises(UserError) as error:
        reading.read_fixations(write(tmp_path / "x.npy", ""), STIMULI)
    assert "not a table of fixations" in one_line(error)


@pytest.mark.parametrize("compressed", [False, True])
def test_cut_and_altered_files_never_raise_anything_else(tmp_path, compressed):
    path, generator = tmp_path / "x.mat", np.random.default_rng(0)
    spot = (np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]))
    savemat(path, {"fixations": osie(("a.jpg", [spot, spot]), ("c.jpg", [spot]))}, do_compression=compressed)
    whole = path.read_bytes()
    refusals = 0
    for trial in range(200):
        content = bytearray(whole[: generator.integers(len(whole))] if trial % 4 == 0 else whole)
        if trial % 4:
            for place in generator.integers(128, len(content), 1 + trial % 3):
                content[place] = generator.integers(256)
        path.write_bytes(content)
        try:
            reading.read_fixations(path, STIMULI)
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 50


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"other": 1.0}, "neither the variable fixations (OSIE) nor white (Toronto)"),
        ({"fixations": 1.0}, "fixations is not a cell array"),
        ({"fixations": cells("a")}, "lacks the field img"),
        ({"fixations": cells({"img": 3.0, "subjects": cells()})}, "field img"),
        ({"fixations": cells({"img": "a.jpg", "subjects": 1.0})}, "field subjects"),
        ({"fixations": cells({"img": "a.jpg", "subjects": cells({"fix_x": 1.0})})}, "field fix_y"),
        ({"fixations": osie(("a.jpg", [(np.ones(2), np.ones(3))]))}, "2 fix_x and 3 fix_y"),
        ({"fixations": osie(("q.jpg", [(np.ones(2), np.ones(2))]))}, "names none"),
        ({"fixations": cells()}, "no fixations"),
        ({"fixations": cells(1j)}, "complex"),
        ({"white": cells("a")}, "map 1 is not a binary map"),
        ({"white": cells(np.full((2, 2), np.nan))}, "map 1 is not a binary map"),
    ],
)
def test_matlab_files_of_another_form(tmp_path, variables, message):
    savemat(tmp_path / "x.mat", variables)
    with pytest.raises(UserError) as error:
        reading.read_fixations(tmp_path / "x.mat", STIMULI)
    assert message in one_line(error)


def test_missing_variable_and_missing_file(tmp_path):
    savemat(tmp_path / "x.mat", {"other": 1.0})
    with pytest.raises(UserError, match="neither the variable fixations .* nor white"):
        reading.read_fixations(tmp_path / "x.mat", STIMULI)
    with pytest.raises(UserError, match="does not exist"):
        reading.read_fixations(tmp_path / "none.mat", STIMULI)


def test_image_sizes_are_those_of_the_pixels_read(tmp_path):
    Image.new("L", (7, 5)).save(tmp_path / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (70, 50)).save(tmp_path / "turned.jpg", exif=exif)
    assert reading.image_sizes(sorted(tmp_path.iterdir())) == {"grey.png": (5, 7), "turned.jpg": (70, 50)}
    (tmp_path / "sub").mkdir()
    Image.new("L", (7, 5)).save(tmp_path / "sub" / "grey.png")
    with pytest.raises(UserError, match="two stimuli are called grey.png"):
        reading.image_sizes([tmp_path / "grey.png", tmp_path / "sub" / "grey.png"])
    with pytest.raises(UserError, match="not an image"):
        reading.image_sizes([write(tmp_path / "text.png", "no")])
    with pytest.raises(UserError, match="no stimuli"):
        reading.image_sizes([])
