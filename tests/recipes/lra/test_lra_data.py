"""Every task's files read as written, prepared folders, and one sentence for each kind of bad file."""

from __future__ import annotations

import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared_data import require_shared_data

from recipes.common.errors import RecipeError
from recipes.lra import data
from recipes.lra.data import LISTOPS_SYMBOLS, TASKS, Sequences, Split, encode_listops, load, read_folder
from recipes.lra.prepare import prepare

ROOT = Path(__file__).parents[3]


def options(**changed):
    values = {"source": None, "train": None, "valid": None, "test": None, "seed": 0, "processes": 1, "images": "png", "overwrite": False}
    return values | changed


def write_listops(folder: Path, rows: str, name: str = "basic_train.tsv") -> Path:
    folder.mkdir(exist_ok=True)
    for file in ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv"):
        text = rows if file == name else "Source\tTarget\n( [SM 1 ) 2 ) ]\t3\n"
        (folder / file).write_text(text, encoding="utf-8")
    return folder


def write_retrieval(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for split, count in (("train", 4), ("eval", 2), ("test", 2)):
        lines = [f"{i % 2}.0\tA{i}\tB{i}\tfirst text {i}\tsecond, longer text {i} " + "x" * 5000 for i in range(count)]
        (folder / f"new_aan_pairs.{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_pathfinder(folder: Path, side: int = 32, as_array: bool = False) -> Path:
    root = folder / f"pathfinder{side}" / "curv_contour_length_14"
    rng = np.random.default_rng(0)
    for part in range(2):
        (root / "imgs" / str(part)).mkdir(parents=True)
        (root / "metadata").mkdir(exist_ok=True)
        rows = []
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).save(root / "imgs" / str(part) / f"sample_{i}.png")
            rows.append([f"imgs/{part}", f"sample_{i}.png", str(i), str(i % 2), "1.0", "14", "4", "2", "0.5", "1", "1"])
        if as_array:
            np.save(root / "metadata" / f"{part}.npy", np.array(rows))
        else:
            (root / "metadata" / f"{part}.npy").write_text("".join(" ".join(row) + "\n" for row in rows))
    return root


def jpegs(path: Path, images: list[np.ndarray], labels: list[int], cut: int = 0) -> None:
    files = []
    for pixels in images:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    if cut:
        files[cut] = files[cut][: len(files[cut]) // 2]
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(path, jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=np.array(labels))


# -- formats ---------------------------------------------------------------------------------------------------------


def test_listops_tokens_are_the_words_without_parentheses(tmp_path):
    source = "( ( ( [MED 7 ) ( ( ( [SM 1 ) 9 ) ] ) ) ] )"
    assert [LISTOPS_SYMBOLS[code] for code in encode_listops(source)] == ["[MED", "7", "[SM", "1", "9", "]", "]"]
    folder = write_listops(tmp_path / "l", f"Extra\tTarget\tSource\nx\t3\t{source}\nx\t0\t( ( [MIN 0 ) 1 ) ]\n")
    splits = read_folder(TASKS["listops"], folder)
    assert [len(splits[name]) for name in data.SPLITS] == [2, 1, 1]
    assert splits["train"].labels.tolist() == [3, 0]
    assert splits["train"].towers[0][1].tolist() == encode_listops("[MIN 0 1 ]").tolist()


def test_retrieval_pairs_are_cut_to_4000_bytes(tmp_path):
    train = read_folder(TASKS["retrieval"], write_retrieval(tmp_path / "r"))["train"]
    assert train.labels.tolist() == [0, 1, 0, 1]
    first, second = train.towers
    assert first[2].tobytes() == b"first text 2"
    assert second.lengths.tolist() == [4000] * 4 and second[1].tobytes().startswith(b"second, longer text 1 xxx")


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("task", ["pathfinder", "pathx"])
def test_pathfinder_images_in_the_release_layout(tmp_path, task, as_array):
    root = write_pathfinder(tmp_path, TASKS[task].side, as_array)
    splits = read_folder(TASKS[task], tmp_path)
    assert [len(splits[name]) for name in data.SPLITS] == [16, 2, 2]
    whole = data.read_pathfinder(root, TASKS[task])
    pixels = np.asarray(Image.open(root / "imgs" / "1" / "sample_3.png")).reshape(-1)
    assert np.array_equal(whole.towers[0][13], pixels) and whole.labels[13] == 1
    seen = {split.towers[0][i].tobytes() for split in splits.values() for i in range(len(split))}
    assert len(seen) == 20


def test_text_as_bytes_and_a_tenth_held_out(tmp_path):
    rows = [{"id": i, "label": i % 2, "text": f"é{i} " + "z" * (5000 * (i == 3)), "rating": 1} for i in range(20)]
    for half in ("train", "test"):
        with lzma.open(tmp_path / f"imdb_{half}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    splits = read_folder(TASKS["text"], tmp_path)
    assert [len(splits[name]) for name in data.SPLITS] == [18, 2, 20]
    texts = [splits[name].towers[0][i].tobytes() for name in ("train", "valid") for i in range(len(splits[name]))]
    assert len(set(texts)) == 20 and "é7 ".encode() in texts
    assert splits["test"].towers[0].lengths[3] == 4000 and splits["test"].labels.tolist() == [0, 1] * 10


def test_images_are_grey_by_luma(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)] + [(i, i, i) for i in range(17)]
    for half in ("train", "test"):
        jpegs(tmp_path / f"cifar10_{half}_jpeg.npz", [np.full((32, 32, 3), c, np.uint8) for c in colours], [i % 10 for i in range(20)])
    test = read_folder(TASKS["image"], tmp_path)["test"]
    greys = [int(np.median(test.towers[0][i])) for i in range(3)]
    assert np.allclose(greys, [0.299 * 255, 0.587 * 255, 0.114 * 255], atol=2)
    assert test.towers[0].lengths.tolist() == [1024] * 20


def test_a_hub_set_is_read_by_its_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for split, count in (("train", 20), ("test", 4)):
        datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(count)], "label": [i % 2 for i in range(count)]}).to_parquet(
            tmp_path / "set" / f"{split}.parquet"
        )
    prepare("text", tmp_path / "out", **options(source=f"hub:{tmp_path / 'set'}"))
    splits = load(TASKS["text"], tmp_path / "out")
    assert [len(splits[name]) for name in data.SPLITS] == [18, 2, 4]
    assert splits["test"].towers[0][3].tobytes() == b"text 3"
    with pytest.raises(RecipeError, match="column Source and Target is missing"):
        prepare("listops", tmp_path / "no", **options(source=f"hub:{tmp_path / 'set'}"))


def test_the_real_reviews_and_images(tmp_path):
    text = data.read_jsonl(require_shared_data("lra", "imdb_test.jsonl.xz"), TASKS["text"])
    assert len(text) == 25_000 and text.labels.sum() == 12_500
    with np.load(require_shared_data("lra", "cifar10_test_jpeg.npz")) as arrays:
        chosen = np.arange(0, 10_000, 50)
        jpeg, starts, labels = (arrays[name] for name in ("jpeg", "offsets", "labels"))
        files = [jpeg[starts[i] : starts[i + 1]] for i in chosen]
        offsets = np.cumsum([0, *map(len, files)])
        np.savez(tmp_path / "some.npz", jpeg=np.concatenate(files), offsets=offsets, labels=labels[chosen])
    images = data.read_jpegs(tmp_path / "some.npz", TASKS["image"])
    assert np.bincount(labels).tolist() == [1000] * 10 and len(images) == 200
    assert 100 < images.towers[0].tokens.mean() < 150


def test_a_seed_leaves_out_the_same_examples_in_every_version():
    """A table's runs would else be tested on what others of it were trained on."""
    split = Split((Sequences.of(np.full(1 + i % 5, i, np.uint8) for i in range(100)),), np.arange(100) % 2)
    assert split.digest() == "41afd81193237b99"
    held, shared = data.hold_out(split, 3), data.shares(split, 3)
    assert {name: part.digest() for name, part in held.items()} == {"train": "74deee050199cd92", "valid": "838c849d5a8bfbd4"}
    assert [shared[name].digest() for name in data.SPLITS] == ["09730c58549cc0b0", "aa7f873dc8904396", "fc1bb82ab4f35a54"]
    assert data.shortened(split, 10, 3).digest() == "0fa51f6076015e69"
    assert data.shortened(split, None, 3) is split is data.shortened(split, 100, 3)
    for count in (0, 101):
        with pytest.raises(RecipeError, match=f"{count} examples are asked for and there are 100; ask for 1 to 100"):
            data.shortened(split, count, 3)
    assert len(data.shortened(split, 1, 3)) == 1 and len(data.shortened(split, 99, 3)) == 99


# -- prepare ---------------------------------------------------------------------------------------------------------


def test_listops_in_the_release_files_reused_and_refused(tmp_path, capsys):
    out = tmp_path / "listops"
    prepare("listops", out, **options(train=6, valid=3, test=2, seed=1))
    compact = load(TASKS["listops"], out)
    for name in ("prepared.json", "train.npz", "valid.npz", "test.npz"):
        (out / name).rename(tmp_path / name)
    released = load(TASKS["listops"], out)
    for name, count in zip(data.SPLITS, (6, 3, 2), strict=True):
        assert len(compact[name]) == count
        assert np.array_equal(compact[name].towers[0].tokens, released[name].towers[0].tokens)
        assert np.array_equal(compact[name].labels, released[name].labels)
    for name in ("prepared.json", "train.npz", "valid.npz", "test.npz"):
        (tmp_path / name).rename(out / name)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    prepare("listops", out, **options(train=6, valid=3, test=2, seed=1))
    assert "is ready: 6 train, 3 valid, 2 test" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(RecipeError, match="holds other data .counts"):
        prepare("listops", out, **options(train=7, valid=3, test=2, seed=1))
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_pathfinder_by_several_processes_is_the_same_and_no_image_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.lra.prepare.IMAGES_PER_FOLDER", 8)
    prepare("pathfinder", tmp_path / "a", **options(train=20, valid=6, test=6))
    prepare("pathfinder", tmp_path / "b", **options(train=20, valid=6, test=6, images="npz"))
    a, b = (load(TASKS["pathfinder"], tmp_path / name) for name in "ab")
    seen = set()
    for name in data.SPLITS:
        assert np.array_equal(a[name].towers[0].tokens, b[name].towers[0].tokens)
        assert 2 * a[name].labels.sum() == len(a[name])
        seen |= {a[name].towers[0][i].tobytes() for i in range(len(a[name]))}
    assert len(seen) == 32 and not list((tmp_path / "b").rglob("*.png"))
    released = data.read_pathfinder(tmp_path / "a", TASKS["pathfinder"])
    together = np.concatenate([a[name].towers[0].tokens for name in data.SPLITS])
    assert np.array_equal(released.towers[0].tokens, together)
    assert released.labels.tolist() == [0, 1] * 16


def test_an_image_that_comes_twice_is_drawn_anew(tmp_path, monkeypatch):
    from recipes.lra import pathfinder

    drawn = pathfinder.make_scene

    def repeat(rules, seed, number, attempt=0):
        return drawn(rules, seed, number if attempt else number % 2, attempt)

    monkeypatch.setattr(pathfinder, "make_scene", repeat)
    prepare("pathfinder", tmp_path / "a", **options(train=4, valid=2, test=2))
    splits = load(TASKS["pathfinder"], tmp_path / "a")
    assert len({split.towers[0][i].tobytes() for split in splits.values() for i in range(len(split))}) == 8
    released = data.read_pathfinder(tmp_path / "a", TASKS["pathfinder"])
    assert np.array_equal(released.towers[0].tokens, np.concatenate([splits[name].towers[0].tokens for name in data.SPLITS]))


def test_retrieval_and_path_x_are_prepared_from_the_release(tmp_path):
    prepare("retrieval", tmp_path / "out", **options(source=str(write_retrieval(tmp_path / "r")), train=3))
    splits = load(TASKS["retrieval"], tmp_path / "out")
    assert [len(splits[name]) for name in data.SPLITS] == [3, 2, 2] and len(splits["train"].towers) == 2
    write_pathfinder(tmp_path / "x", 128)
    prepare("pathx", tmp_path / "px", **options(source=str(tmp_path / "x")))
    assert load(TASKS["pathx"], tmp_path / "px")["train"].towers[0].lengths.tolist() == [16384] * 16


def test_killed_half_way_nothing_stands_at_the_output(tmp_path, monkeypatch):
    def fail(self, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Split, "save", fail)
    with pytest.raises(RecipeError, match="No space left on device"):
        prepare("listops", tmp_path / "out", **options(train=2, valid=1, test=1))
    assert list(tmp_path.iterdir()) == []


# -- bad input -------------------------------------------------------------------------------------------------------

BAD_LISTOPS = {
    "Source\n[SM 1 2 ]\n": r"basic_train.tsv, line 1: the column Target is missing",
    "Source\tTarget\n[SM 1 2 ]\t3\n[SM 1 2 ]\n": r"basic_train.tsv, line 3: 1 columns, expected 2",
    "Source\tTarget\n[SM 1 2 ]\t3\n\n[SUM 1 2 ]\t3\n": r"line 4: unknown token '\[SUM'",
    "Source\tTarget\n[SM 12 ]\t3\n": r"line 2: unknown token '12'",
    "Source\tTarget\n[SM a ]\t3\n": r"line 2: unknown token 'a'",
    "Source\tTarget\n[SM 1 é ]\t3\n": r"line 2: unknown token 'é'",
    "Source\tTarget\n[SM 1 2 ]\t10\n": r"line 2: the label is '10', expected a whole number from 0 to 9",
    "Source\tTarget\n[SM 1 2 ]\tnan\n": r"line 2: the label is 'nan'",
    "Source\tTarget\n\t3\n": r"line 2: the expression has 0 tokens",
    "Source\tTarget\n[SM " + "1 " * 2000 + "]\t3\n": r"line 2: the expression has 2002 tokens, expected 1 to 2000",
    "": r"there is no example",
}


@pytest.mark.parametrize("rows", BAD_LISTOPS, ids=range(len(BAD_LISTOPS)))
def test_bad_listops(tmp_path, rows):
    with pytest.raises(RecipeError, match=BAD_LISTOPS[rows]) as error:
        load(TASKS["listops"], write_listops(tmp_path / "l", rows))
    assert "\n" not in str(error.value)


def test_bad_retrieval(tmp_path):
    folder = write_retrieval(tmp_path / "r")
    path = folder / "new_aan_pairs.eval.tsv"
    path.write_text(path.read_text() + "1.0\tA\tB\tonly one text\n")
    with pytest.raises(RecipeError, match="new_aan_pairs.eval.tsv, line 3: 4 columns, expected 5"):
        load(TASKS["retrieval"], folder)
    path.write_text("2.0\tA\tB\tone\ttwo\n")
    with pytest.raises(RecipeError, match="line 1: the label is '2.0', expected a whole number from 0 to 1"):
        load(TASKS["retrieval"], folder)
    path.unlink()
    with pytest.raises(RecipeError, match="new_aan_pairs.eval.tsv is missing"):
        load(TASKS["retrieval"], folder)


def test_bad_pathfinder(tmp_path):
    root = write_pathfinder(tmp_path)
    image = root / "imgs" / "0" / "sample_4.png"
    whole = image.read_bytes()
    for content, message in {
        whole[: len(whole) // 2]: "metadata/0.npy, line 5, .*sample_4.png: the image cannot be read",
        b"": "metadata/0.npy, line 5, .*: the image cannot be read",
    }.items():
        image.write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            load(TASKS["pathfinder"], tmp_path)
    Image.new("L", (16, 16)).save(image)
    with pytest.raises(RecipeError, match="the image is 16 x 16 pixels, expected 32 x 32"):
        load(TASKS["pathfinder"], tmp_path)
    image.unlink()
    with pytest.raises(RecipeError, match="line 5, .*is missing"):
        load(TASKS["pathfinder"], tmp_path)
    (root / "metadata" / "0.npy").write_text("imgs/0 sample_0.png 0\n")
    with pytest.raises(RecipeError, match="metadata/0.npy, line 1: 3 columns, expected at least 4"):
        load(TASKS["pathfinder"], tmp_path)
    with pytest.raises(RecipeError, match="no metadata folder"):
        load(TASKS["pathx"], tmp_path / "pathfinder32" / "curv_contour_length_14" / "imgs")


def test_bad_text_and_images(tmp_path):
    good = json.dumps({"text": "a", "label": 0}) + "\n"
    for line, message in {
        "{": "line 2: ",
        '{"text": "a"}': "line 2: label is missing",
        '{"text": 3, "label": 0}': "line 2: text is a int",
        '["a"]': "line 2: text and label is missing",
    }.items():
        (tmp_path / "imdb_train.jsonl").write_text(good + line + "\n")
        (tmp_path / "imdb_test.jsonl").write_text(good)
        with pytest.raises(RecipeError, match="imdb_train.jsonl, " + message):
            load(TASKS["text"], tmp_path)
    (tmp_path / "imdb_train.jsonl.xz").write_bytes(lzma.compress(good.encode() * 1000)[:-30])
    with pytest.raises(RecipeError, match="compressed file is damaged or cut short"):
        load(TASKS["text"], tmp_path)
    jpegs(tmp_path / "cifar10_train_jpeg.npz", [np.zeros((32, 32, 3), np.uint8)] * 12, [0] * 12, cut=7)
    with pytest.raises(RecipeError, match="cifar10_train_jpeg.npz, image 7: the image cannot be read"):
        load(TASKS["image"], tmp_path)
    (tmp_path / "cifar10_train_jpeg.npz").write_bytes(b"PK no zip")
    with pytest.raises(RecipeError, match="expected an .npz with jpeg"):
        load(TASKS["image"], tmp_path)


def test_bad_prepared_folders(tmp_path):
    out = tmp_path / "out"
    prepare("listops", out, **options(train=3, valid=1, test=1))
    with pytest.raises(RecipeError, match="holds the data of listops, not of text"):
        load(TASKS["text"], out)
    whole = (out / "train.npz").read_bytes()
    (out / "train.npz").write_bytes(whole[:100])
    with pytest.raises(RecipeError, match="train.npz: not a whole prepared split"):
        load(TASKS["listops"], out)
    with np.load(io.BytesIO(whole)) as arrays:
        np.savez(out / "train.npz", **{**arrays, "tokens0": arrays["tokens0"] + np.uint8(20)})
    with pytest.raises(RecipeError, match="is outside the 15 tokens"):
        load(TASKS["listops"], out)
    with pytest.raises(RecipeError, match="no such folder; make it with"):
        load(TASKS["listops"], tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "is no task; choose one of listops"),
        (["retrieval"], "give --source FOLDER"),
        (["text", "--source", "nowhere"], "no such folder"),
        (["listops", "--train", "0"], "--train is 0"),
    ],
)
def test_a_bad_command_is_one_sentence_and_status_2(tmp_path, arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "recipes.lra.prepare", *arguments, "--out", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def split_of(lengths: list[int], token: int, labels: list[int], towers: int = 1) -> Split:
    return Split(tuple(Sequences.of(np.full(length, token, np.uint8) for length in lengths) for _ in range(towers)), np.array(labels))


@pytest.mark.parametrize(
    ("task", "lengths", "token", "labels", "message"),
    [
        ("listops", [1, 2000], 14, [0, 9], None),
        ("listops", [1, 2000], 15, [0, 9], "token 15 is outside the 15 tokens of listops"),
        ("listops", [1, 2001], 14, [0, 9], "sequences have 1 to 2001 tokens, listops allows 1 to 2000"),
        ("listops", [0, 2000], 14, [0, 9], "sequences have 0 to 2000 tokens"),
        ("listops", [1, 2], 14, [0, 10], "labels reach from 0 to 10, listops has classes 0 to 9"),
        ("listops", [1, 2], 14, [-1, 9], "labels reach from -1 to 9"),
        ("listops", [], 14, [], "there is no example"),
        ("image", [1024, 1024], 255, [0, 9], None),
        ("image", [1023, 1024], 255, [0, 9], "sequences have 1023 to 1024 tokens, image allows exactly 1024"),
        ("text", [1, 4000], 255, [0, 1], None),
        ("text", [1, 4000], 255, [0, 2], "labels reach from 0 to 2"),
    ],
)
def test_what_a_task_allows_and_one_more(task, lengths, token, labels, message):
    if message is None:
        data.check(TASKS[task], split_of(lengths, token, labels), "here")
        return
    with pytest.raises(RecipeError, match=f"here: .*{message}"):
        data.check(TASKS[task], split_of(lengths, token, labels), "here")


def test_what_is_read_into_a_class():
    for text, label in (("0", 0), ("9.0", 9), (3, 3), ("9", 9)):
        assert data.parse_label(text, 10) == label
    for text in ("-1", "10", "0.5", "nan", "x", None):
        with pytest.raises(ValueError, match="expected a whole number from 0 to 9"):
            data.parse_label(text, 10)
    assert data.encode_text("", 5).tobytes() == b" " and data.encode_text("abcdef", 5).tobytes() == b"abcde"


def test_words_for_labels_and_the_longest_line(tmp_path, monkeypatch):
    rows = [{"text": "ab", "label": label} for label in ("neg", "pos", 0, "1")]
    lines = [json.dumps(row) for row in rows]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    assert data.read_jsonl(path, TASKS["text"]).labels.tolist() == [0, 1, 0, 1]
    longest = max(map(len, lines)) + 1  # with its end
    monkeypatch.setattr(data, "LONGEST_LINE", longest)
    assert len(data.read_jsonl(path, TASKS["text"])) == 4
    monkeypatch.setattr(data, "LONGEST_LINE", longest - 1)
    with pytest.raises(RecipeError, match=f"rows.jsonl, line 1: the line has more than {longest - 1} characters"):
        data.read_jsonl(path, TASKS["text"])


def test_pictures_and_labels_that_do_not_fit_and_objects_in_arrays(tmp_path):
    path = tmp_path / "cifar10_test_jpeg.npz"
    jpegs(path, [np.zeros((32, 32, 3), np.uint8)] * 3, [0, 1, 2])
    with np.load(path) as arrays:
        whole = dict(arrays)
    assert data.read_jpegs(path, TASKS["image"]).labels.tolist() == [0, 1, 2]
    for change in ({"labels": whole["labels"][:2]}, {"offsets": whole["offsets"][:3]}, {"jpeg": whole["jpeg"][:-1]}):
        np.savez(path, **{**whole, **change})
        with pytest.raises(RecipeError, match="the file is damaged"):
            data.read_jpegs(path, TASKS["image"])
    objects = np.array([{"x": 1}], dtype=object)
    np.savez(path, **{**whole, "labels": objects})
    with pytest.raises(RecipeError, match="expected an .npz with jpeg, offsets and labels"):
        data.read_jpegs(path, TASKS["image"])
    np.savez(tmp_path / "split.npz", tokens0=whole["jpeg"], offsets0=whole["offsets"], labels=objects)
    with pytest.raises(RecipeError, match="not a whole prepared split"):
        Split.load(tmp_path / "split.npz", TASKS["image"])
    for change in ({"labels": np.zeros(2)}, {"tokens0": whole["jpeg"][:-1]}):
        np.savez(tmp_path / "split.npz", **{"tokens0": whole["jpeg"], "offsets0": whole["offsets"], "labels": np.zeros(3), **change})
        with pytest.raises(RecipeError, match="do not fit each other"):
            Split.load(tmp_path / "split.npz", TASKS["image"])
    np.save(tmp_path / "metadata", objects)
    with pytest.raises(RecipeError, match="not a metadata file"):
        data.read_metadata(tmp_path / "metadata.npy")


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_pathfinder_is_found_from_any_folder_above_it_and_needs_four_columns(tmp_path, depth):
    root = write_pathfinder(tmp_path)
    assert data.pathfinder_root([root, root.parent, tmp_path][depth], TASKS["pathfinder"]) == root
    lines = (root / "metadata" / "1.npy").read_text().splitlines()
    (root / "metadata" / "1.npy").write_text("\n".join(" ".join(line.split()[:4]) for line in lines))
    assert len(data.read_pathfinder(tmp_path, TASKS["pathfinder"])) == 20


@pytest.mark.parametrize("column", ["img", "image"])
def test_a_hub_set_of_pictures_with_splits_of_its_own(tmp_path, column):
    datasets = pytest.importorskip("datasets")
    for split, count in (("train", 4), ("validation", 3), ("test", 2)):
        pictures = [Image.fromarray(np.full((32, 32, 3), i, np.uint8)) for i in range(count)]
        made = datasets.Dataset.from_dict({column: pictures, "label": list(range(count))})
        made.to_parquet(tmp_path / "set" / f"{split}.parquet")
    found = data.read_hub(TASKS["image"], str(tmp_path / "set"))
    assert [len(found[name]) for name in data.SPLITS] == [4, 3, 2]
    assert found["valid"].towers[0][2].tolist() == [2] * 1024 and found["valid"].labels.tolist() == [0, 1, 2]
    (tmp_path / "set" / "test.parquet").unlink()
    with pytest.raises(RecipeError, match="there is no test split; it has train, validation"):
        data.read_hub(TASKS["image"], str(tmp_path / "set"))
    with pytest.raises(RecipeError, match="neither a folder nor a data set's id"):
        data.read_hub(TASKS["image"], str(tmp_path / "absent"))
