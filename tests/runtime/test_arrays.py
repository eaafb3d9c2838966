"""Users' arrays: what is accepted, what is refused and in which words; standardisation; the digits."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tgdp_fast.runtime import arrays
from tgdp_fast.runtime.arrays import (
    CheckedArray,
    Standardizer,
    as_float64,
    check_labels,
    check_samples,
    load_array,
)
from tgdp_fast.runtime.checkpoint import signature_of


def samples(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# --------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("mapped", [False, True])
def test_load_npy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool) -> None:
    if mapped:
        monkeypatch.setattr(arrays, "_MAPPED_BYTES", 0)
    expected = samples(17, 3)
    np.save(tmp_path / "x.npy", expected)
    loaded = load_array(tmp_path / "x.npy", "source")
    np.testing.assert_array_equal(loaded, expected)
    loaded[0, 0] = 99.0  # copy-on-write: the file must not change
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)


def test_a_large_file_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", samples(17, 3))
    assert not isinstance(load_array(tmp_path / "x.npy", "source").base, np.memmap)
    monkeypatch.setattr(arrays, "_MAPPED_BYTES", 100)
    assert isinstance(load_array(tmp_path / "x.npy", "source").base, np.memmap)


def test_load_npz(tmp_path: Path) -> None:
    expected = samples(5, 2)
    np.savez(tmp_path / "one.npz", expected)
    np.testing.assert_array_equal(load_array(tmp_path / "one.npz", "source"), expected)
    np.savez(tmp_path / "two.npz", a=expected, b=expected)
    with pytest.raises(ValueError, match=r"source: .*two\.npz cannot be read: it holds 2 arrays \(a, b\)"):
        load_array(tmp_path / "two.npz", "source")


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_objects_are_never_unpickled(tmp_path: Path, suffix: str) -> None:
    fuse, file = tmp_path / "exploded", tmp_path / f"x{suffix}"
    (np.save if suffix == ".npy" else np.savez)(file, np.array([Bomb(fuse)], dtype=object))
    with pytest.raises(ValueError, match="target: .* never unpickled"):
        load_array(file, "target")
    import pickle

    file.write_bytes(pickle.dumps(Bomb(fuse)))
    with pytest.raises(ValueError, match="target: .* never unpickled"):
        load_array(file, "target")
    assert not fuse.exists()


def test_damaged_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", samples(50, 3))
    np.savez(tmp_path / "x.npz", samples(50, 3))
    for name in ("x.npy", "x.npz"):
        content = (tmp_path / name).read_bytes()
        for length in (0, 40, len(content) // 2):
            (tmp_path / name).write_bytes(content[:length])
            with pytest.raises(ValueError, match=rf"source: .*{name} cannot be read"):
                load_array(tmp_path / name, "source")


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", "x,y\n1,2\n3,4\n"), ("b.csv", "1,2\n3,4\n"), ("c.TSV", "1\t2\n3\t4\n")],
)
def test_the_line_that_converts_a_table_converts_it(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"convert it with numpy\.save, as in numpy") as refused:
        load_array(tmp_path / name, "source")
    line = re.search(r"as in (numpy.*\));", str(refused.value))
    assert line
    exec(line[1], {"numpy": np})
    made = load_array((tmp_path / name).with_suffix(".npy"), "source")
    assert np.array_equal(made, [[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize("value", [object(), {"x": 1}, torch.nn.Linear(2, 2), (i for i in range(3))])
def test_what_is_no_array_is_called_by_its_name(value: object) -> None:
    text = f"source must be an array or a tensor of samples .*, got an object of type {type(value).__name__}"
    with pytest.raises(ValueError, match=text):
        CheckedArray.samples("source", value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("absent.npy", r"source: .*absent\.npy does not exist; expected a \.npy or \.npz"),
        ("", "is a folder"),
        ("table.csv", r"got \.csv; convert it with numpy\.save"),
        ("text.npy", r"source must hold real numbers, got dtype <U3; convert .* array\.astype\(float\)"),
        ("complex.npy", r"source must hold real numbers, got dtype complex128; .*x\.real, x\.imag"),
        ("renamed.npy", r"source: .* it is not a NumPy file.* starts with b'1\.0,2\.'.* numpy\.loadtxt"),
    ],
)
def test_refused_files(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / "table.csv").write_text("1,2")
    (tmp_path / "renamed.npy").write_text("1.0,2.0\n")
    np.save(tmp_path / "text.npy", np.array(["abc"]))
    np.save(tmp_path / "complex.npy", np.array([1j]))
    with pytest.raises(ValueError, match=message):
        load_array(tmp_path / file, "source")


# ---------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8, np.bool_])
def test_samples_become_contiguous_float32(dtype: type) -> None:
    array: np.ndarray = (samples(9, 8, 4) > 0).astype(dtype)[::2, :, 1::2]
    result = check_samples("source", array)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, array.astype(np.float32))
    for tensor in (torch.from_numpy(array.copy()), torch.from_numpy(array.copy()).to(torch.bfloat16)):
        np.testing.assert_array_equal(check_samples("source", tensor), result)
    assert check_samples("source", result) is result, "no copy of what is right already"


def with_values(**values: float) -> np.ndarray:
    """Zeros [6, 3] with values at flat positions p0, p1, ..."""
    array = np.zeros((6, 3))
    for position, value in values.items():
        array.flat[int(position[1:])] = value
    return array


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros(5),
            r"target must have shape \[N, \.\.\.\].*got \[5\]; .* use array\.reshape\(-1, 1\)",
        ),
        (np.zeros(()), r"at least 2 dimensions, got \[\]"),
        (np.zeros((0, 3)), "at least 2 samples, but it is empty"),
        (np.zeros((1, 3)), "at least 2 samples, but it holds one sample"),
        (np.zeros((4, 0)), r"empty shape \[4, 0\]"),
        (np.zeros((4, 2)), r"target holds samples of shape \[2\], but the source has \[3\]"),
        (np.array([["a", "b"]] * 3), "target must hold real numbers, got dtype <U1"),
        (
            with_values(p7=math.nan),
            "target must be finite, but of its 18 values 1 is NaN, in 1 of 6 rows, first in row 2",
        ),
        (
            with_values(p16=math.nan, p17=math.nan, p4=math.inf, p5=-math.inf, p9=1e300),
            "2 are NaN and 2 are infinite and 1 is beyond float32, in 3 of 6 rows, first in row 1",
        ),
        (with_values(p0=math.inf, p1=-math.inf), "2 are infinite"),
    ],
)
def test_refused_samples(array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_samples("target", array, event_shape=(3,))


def test_minimum_and_names() -> None:
    assert check_samples("x", np.zeros((1, 3)), minimum=1).shape == (1, 3)
    with pytest.raises(ValueError, match="at least 5 samples, but it holds 4 samples"):
        check_samples("x", np.zeros((4, 3)), minimum=5)
    with pytest.raises(ValueError, match=r"but the denoiser has \[8, 1000\]"):
        check_samples("x", np.zeros((4, 3)), event_shape=(8, 1000), event_of="the denoiser")


# ----------------------------------------------------------------------------------------------------- labels


def test_labels() -> None:
    classes = check_labels("labels", np.array([0, 9, 2, 9, 1], dtype=np.uint8)[::2], 3, 3)
    assert classes.dtype == np.int64
    assert classes.tolist() == [0, 2, 1]
    assert check_labels("labels", torch.tensor([True, False]), 2).tolist() == [1, 0]
    for array in (np.eye(3, dtype=int), torch.eye(3, dtype=torch.float64), np.eye(3, dtype=bool)):
        multi_hot = check_labels("labels", array, 3, 3)
        assert multi_hot.dtype == np.float32
        np.testing.assert_array_equal(multi_hot, np.eye(3))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2], "target_labels holds 3 labels for 4 samples"),
        ([0, 1, 2, 3], r"must be in 0\.\.2 \(3 classes\), got 3 in row 3"),
        ([0, -1, 2, 0], r"got -1 in row 1"),
        ([0.0, 1.0, 2.0, 0.0], r"must be integers, got float64; convert with labels\.astype\(int\)"),
        (np.zeros((4, 2)), "has 2 columns, expected one for each of 3 classes"),
        (np.array([[0, 1, 0], [0, 1, 2], [0, 0, 0], [1, 1, 1]]), r"in \[0, 1\], got 2\.0 in row 1, column 2"),
        (np.full((4, 3), math.nan), r"in \[0, 1\], got nan in row 0, column 0"),
        (np.zeros((4, 3, 1)), r"got \[4, 3, 1\]"),
        (["a", "b", "c", "d"], "real numbers, got dtype <U1"),
    ],
)
def test_refused_labels(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_labels("target_labels", labels, 4, 3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("s.npy", r"source must be an array, got the path 's\.npy'; read it with numpy\.load"),
        (Path("s.npy"), r"got the path 's\.npy'; read it with numpy\.load"),
        (None, "source must be an array, got None"),
        ([[1.0, 2.0], [3.0]], "source must be an array, got a list of rows of unequal shapes"),
        (np.array([[1.0], [None]]), "got dtype object; convert with"),
    ],
)
def test_what_is_no_array(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_samples("source", value)


def test_negative_labels_without_a_class_count() -> None:
    with pytest.raises(ValueError, match="labels must be >= 0, got -2 in row 1"):
        check_labels("labels", [1, -2], 2)


# ------------------------------------------------------------------------------------------------
# standardizer


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(2, 30),
    event=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_standardizer(count: int, event: list[int], scale: float, seed: int) -> None:
    array = np.random.default_rng(seed).normal(3 * scale, scale, (count, *event))
    standardizer = Standardizer.fit(array)
    assert standardizer.mean.shape == (event[0], *[1] * (len(event) - 1))
    axes = (0, *range(2, array.ndim))
    result = standardizer.apply(array)
    np.testing.assert_allclose(result.mean(axis=axes), 0, atol=1e-10)
    np.testing.assert_allclose(result.std(axis=axes), 1, atol=1e-10)
    np.testing.assert_allclose(standardizer.invert(result), array, rtol=1e-12, atol=1e-12 * scale)
    # float32: three roundings of relative size 2^-24, of values up to |mean| + |x|, in units of the
    # deviation.
    single = array.astype(np.float32)
    bound = 4 * 2**-24 * float((np.abs(array).max() / standardizer.std.min()) * 2 + 10)
    np.testing.assert_allclose(standardizer.apply(single), result, rtol=0, atol=bound)
    tensor = torch.from_numpy(single)
    assert torch.equal(standardizer.apply(tensor), torch.from_numpy(standardizer.apply(single)))
    assert standardizer.apply(single).dtype == np.float32
    restored = Standardizer.from_tensors(standardizer.to_tensors())
    np.testing.assert_array_equal(restored.apply(array), result)


def test_statistics_of_chunks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    array = samples(37, 3, 5).astype(np.float32) + 1000
    whole = Standardizer.fit(array)
    monkeypatch.setattr(arrays, "_ROWS", 4)
    parts = Standardizer.fit(torch.from_numpy(array))
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(parts.std, whole.std, rtol=1e-12, atol=0)
    np.testing.assert_allclose(whole.std[:, 0], array.std(axis=(0, 2), dtype=np.float64), rtol=1e-12)


def test_constant_features_stay_put() -> None:
    """0.1 is not representable, so that its computed spread may be rounding instead of zero."""
    array = np.stack([np.full(1001, 0.1), np.zeros(1001), np.linspace(-1, 1, 1001)], axis=1).astype(np.float32)
    standardizer = Standardizer.fit(array)
    assert standardizer.std[:2].tolist() == [1.0, 1.0]
    assert np.abs(standardizer.apply(array)[:, :2]).max() < 1e-6
    np.testing.assert_allclose(standardizer.invert(standardizer.apply(array)), array, atol=1e-7)


def test_identity_and_bad_arguments() -> None:
    array = samples(5, 4, 7)
    np.testing.assert_array_equal(Standardizer.identity((4, 7)).apply(array), array)
    np.testing.assert_array_equal(Standardizer.identity((7,)).invert(array[0]), array[0])
    standardizer = Standardizer.fit(array)
    for wrong in (array[0], array[:, :3]):
        with pytest.raises(ValueError, match=r"samples must have shape \[N, 4, \.\.\.\]"):
            standardizer.apply(wrong)
    with pytest.raises(ValueError, match="std is missing"):
        Standardizer.from_tensors({"mean": torch.zeros(2)})
    with pytest.raises(ValueError, match="std must be positive"):
        Standardizer(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"of one shape, got \[2\] and \[3\]"):
        Standardizer(torch.zeros(2), torch.ones(3))


# ----------------------------------------------------------------------------------------------------- digits


def test_digits() -> None:
    pytest.importorskip("sklearn")
    from tgdp_fast.data.digits import load_digits_arrays

    digits = load_digits_arrays((1, 7), num_target=21, seed=3)
    assert digits.source.shape == (1198, 64)
    assert digits.held_out.shape == (599, 64)
    assert digits.source.dtype == digits.target.dtype == digits.held_out.dtype == np.float32
    assert (digits.source.min(), digits.source.max()) == (-1.0, 1.0)
    # 174 to 183 images of each digit: a third of them, to within one, is held out.
    shares = np.bincount(digits.held_out_labels) / np.bincount(digits.source_labels)
    np.testing.assert_allclose(shares, 0.5, atol=0.02)
    together = np.concatenate([digits.source, digits.held_out])
    assert len(np.unique(together, axis=0)) == len(together) == 1797
    assert np.bincount(digits.target_labels, minlength=10).tolist() == [0, 11, 0, 0, 0, 0, 0, 10, 0, 0]
    # Every target image is a source image with that label, and none is drawn twice.
    match = (digits.target[:, None] == digits.source[None]).all(axis=2)
    assert match.any(axis=1).all()
    assert len(np.unique(match.argmax(axis=1))) == 21
    np.testing.assert_array_equal(digits.source_labels[match.argmax(axis=1)], digits.target_labels)
    assert np.array_equal(load_digits_arrays((1, 7), 21, 3).target, digits.target)
    other = load_digits_arrays((1, 7), 21, 4)
    assert not np.array_equal(other.target, digits.target)
    assert np.array_equal(other.source, digits.source)
    assert np.array_equal(other.held_out, digits.held_out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3, 3),), "distinct digits 0 to 9"),
        (((3, 10),), "distinct digits 0 to 9"),
        (((),), "distinct digits 0 to 9"),
        (((3, 8), 1), "num_target must be an integer >= 2, got 1"),
        (((3, 8), 1000), "asks for 500 images of digit 3, but 122 exist beside the held-out ones"),
    ],
)
def test_refused_digits(arguments: tuple, message: str) -> None:
    pytest.importorskip("sklearn")
    from tgdp_fast.data.digits import load_digits_arrays

    with pytest.raises(ValueError, match=message):
        load_digits_arrays(*arguments)


def test_digit_judge() -> None:
    """The judge must be good enough that its errors do not blur a comparison of models."""
    pytest.importorskip("sklearn")
    from tgdp_fast.data.digits import digit_judge, load_digits_arrays

    judge, digits = digit_judge(), load_digits_arrays((3, 8))
    assert judge.accuracy > 0.97
    assert judge.num_held_out == 599
    # Fitted on the source alone: its verdicts there are all right, on the held-out images as many as it says.
    assert (judge.predict(digits.source) == digits.source_labels).all()
    assert (judge.predict(digits.held_out) == digits.held_out_labels).mean() == judge.accuracy < 1.0
    share = np.isin(digits.held_out_labels, (3, 8)).mean()
    assert judge.fraction(digits.held_out, (3, 8)) == pytest.approx(share, abs=0.01)
    assert judge.fraction(digits.target, (3, 8)) > 0.9
    with pytest.raises(ValueError, match=r"a digit has \[64\]"):
        judge.predict(np.zeros((2, 8, 8)))


def test_missing_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    from tgdp_fast.data import digits

    call: Callable[[], object] = digits.load_digits_arrays
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="the digits need scikit-learn, .* run: pip install scikit-learn$"):
        call()


# ------------------------------------------------------------------------------------------------ checked once


def test_a_checked_array_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    array = samples(9, 3)
    checked = CheckedArray.samples("source", array)
    assert CheckedArray.samples("other", checked) is checked
    assert check_samples("other", checked) is checked.values
    np.testing.assert_array_equal(checked.values, array.astype(np.float32))
    checked.values[0, 0] = np.nan  # What nobody may do shows that nobody looks.
    assert CheckedArray.samples("other", checked) is checked
    # Its shape is, though.
    with pytest.raises(ValueError, match=r"other holds samples of shape \[3\], but the source has \[2\]"):
        CheckedArray.samples("other", checked, event_shape=(2,))
    with pytest.raises(ValueError, match="other must hold at least 10 samples"):
        check_samples("other", checked, minimum=10)


def test_checked_labels_fit_some_models_and_not_others() -> None:
    classes = CheckedArray.labels("labels", [0, 2, 1], 3)
    rows = CheckedArray.labels("labels", np.eye(3)[:2], 2)
    assert (classes.num_classes, rows.num_classes, len(rows)) == (3, 3, 2)
    for checked, count in ((classes, 3), (rows, 2)):
        assert CheckedArray.labels("labels", checked, count, 3) is checked
        assert check_labels("labels", checked, count) is checked.values
    assert CheckedArray.labels("labels", classes, 3, 5) is classes
    with pytest.raises(ValueError, match=r"labels must be in 0..1 \(2 classes\), got 2 in row 1"):
        CheckedArray.labels("labels", classes, 3, 2)
    with pytest.raises(ValueError, match="labels has 3 columns, expected one for each of 5 classes"):
        CheckedArray.labels("labels", rows, 2, 5)
    with pytest.raises(ValueError, match="labels holds 3 labels for 4 samples"):
        CheckedArray.labels("labels", classes, 4)


def test_the_digest_tells_arrays_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    array = samples(6, 4).astype(np.float32)
    same, *others = (
        CheckedArray.samples("x", value)
        for value in (array.astype(np.float64), array.reshape(8, 3), -array, array[::-1])
    )
    checked = CheckedArray.samples("x", array)
    assert checked.digest == same.digest
    assert len({checked.digest, *(other.digest for other in others)}) == 4
    assert signature_of(checked) == signature_of(same) != signature_of(others[0])
    monkeypatch.setattr(arrays.hashlib, "sha256", None)  # Once.
    assert checked.digest == same.digest


def test_a_tensor_of_a_checked_array_shares_its_memory_where_it_may() -> None:
    checked = CheckedArray.samples("x", samples(6, 4).astype(np.float32))
    assert checked.tensor().data_ptr() == checked.values.ctypes.data
    checked.values.flags.writeable = False
    assert torch.equal(checked.tensor("cpu"), torch.from_numpy(checked.values.copy()))


# ------------------------------------------------------------------------------------------------ kinds of arrays

MASK = np.arange(12).reshape(4, 3) == 4  # the value in row 1, column 1
RECORDS = np.zeros(4, dtype=[("a", "f4"), ("b", "f4")])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ma.array(samples(4, 3), mask=MASK), "must not hold masked values, but 1 of 12 are masked, first in row 1"),
        (list(np.ma.array(samples(4, 3), mask=MASK)), "must not hold masked values, but 1 of 3 are masked"),
        ([[1.0, np.ma.masked], [1.0, 2.0]], "must not hold masked values"),
        (np.ma.array(RECORDS, mask=[(0, 1), (0, 0), (0, 0), (0, 0)]), "must not hold masked values"),
        (RECORDS, r"must hold real numbers, got dtype .* choose its columns and stack them"),
        (samples(4, 3) + 0j, "must hold real numbers, got dtype complex128"),
        (torch.zeros(4, 3, dtype=torch.complex64).conj(), "must hold real numbers, got dtype torch.complex64"),
        (torch.ones(4, 3).to_sparse(), "must be a dense array of numbers, got a torch.sparse_coo tensor"),
        (torch.ones(4, 3).to_sparse_csr(), "must be a dense array of numbers, got a torch.sparse_csr tensor"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "got a nested tensor"),
        (torch.empty(4, 3, device="meta"), "on the device meta, which holds no values"),
        ([[10**400, 1], [1, 2]], "must hold real numbers, got dtype object"),
        (samples(4, 3).astype("M8[s]"), "must hold real numbers, got dtype datetime64"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_arrays_that_would_lose_their_meaning_are_refused(value: Any, message: str) -> None:
    for check in (
        lambda: check_samples("source", value),
        lambda: check_labels("source", value, 4),
        lambda: Standardizer.fit(value),
        lambda: as_float64("source", value),
    ):
        with pytest.raises(ValueError, match=message):
            check()


def test_tables_with_nullable_columns() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"a": pandas.array([1, 2, 3], dtype="Int64"), "b": [0.5, 1.0, 1.5]})
    np.testing.assert_array_equal(check_samples("source", table), [[1, 0.5], [2, 1], [3, 1.5]])
    np.testing.assert_array_equal(check_labels("y", table["a"], 3, 4), [1, 2, 3])
    table.loc[1, "a"] = pandas.NA
    with pytest.raises(ValueError, match="1 is NaN, in 1 of 3 rows, first in row 1"):
        check_samples("source", table)
    with pytest.raises(ValueError, match="y must be integers"):
        check_labels("y", table["a"], 3)


def test_every_form_of_the_same_numbers_gives_these_numbers() -> None:
    x = np.round(8 * samples(6, 3)) / 8  # exact in 16 bits
    read_only = x.copy()
    read_only.flags.writeable = False
    forms = [
        *(x.astype(dtype) for dtype in (np.float16, np.float32, np.longdouble, ">f4", ">f8")),
        x[::-1].copy()[::-1],
        np.asfortranarray(x),
        read_only,
        np.ma.array(x, mask=np.zeros(x.shape, bool)),
        torch.from_numpy(x).bfloat16(),
        torch.from_numpy(x).half(),
        torch.from_numpy(x).requires_grad_() * 1.0,
        torch.from_numpy(-1j * x).conj().imag,  # a lazily negated view
        [torch.from_numpy(row).requires_grad_() for row in x],
        x.tolist(),
    ]
    for form in forms:
        np.testing.assert_array_equal(check_samples("source", form), x.astype(np.float32))
        np.testing.assert_array_equal(as_float64("source", form).numpy(), x)
        np.testing.assert_array_equal(Standardizer.fit(form).mean.numpy(), Standardizer.fit(x).mean.numpy())


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_integers_do_not_wrap(dtype: str) -> None:
    largest = 1 if dtype == "bool" else int(min(np.iinfo(dtype).max, 2**24))
    x = np.array([[0, largest], [largest, 0], [largest, largest], [0, 0]]).astype(dtype)
    right = np.sign(x.astype(float) - 0.5)
    np.testing.assert_allclose(check_samples("source", x), x.astype(np.float64))
    for form in (x, torch.from_numpy(x)):
        found = Standardizer.fit(x).apply(form)
        assert str(found.dtype).removeprefix("torch.") == "float32"
        np.testing.assert_allclose(np.asarray(found), right)


def test_half_precision_is_standardized_without_overflow() -> None:
    x = 6e4 + 100 * np.sign(samples(50, 2))
    standardizer = Standardizer.fit(x)
    right = (x.astype(np.float16).astype(float) - x.mean(0)) / x.std(0)
    found = standardizer.apply(x.astype(np.float16))
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, right, rtol=1e-3)
    np.testing.assert_allclose(standardizer.invert(found).astype(float), x, rtol=2e-3)


# -------------------------------------------------------------------------------------- offsets that float32 loses


def stamps(count: int = 400) -> np.ndarray:
    """One ordinary feature, and times in seconds: 1.7e9 +- 5, where float32 has steps of 128."""
    x = samples(count, 2)
    return np.stack([x[:, 0], 1.7e9 + 5.0 * x[:, 1]], axis=1)


@pytest.mark.parametrize(
    "form", [stamps(), torch.from_numpy(stamps()), stamps().astype(np.int64), 1e-50 * samples(9, 2)]
)
def test_a_spread_that_float32_loses_is_told(form: Any) -> None:
    with pytest.warns(UserWarning, match=r"source is rounded to float32.*feature \d has mean .*, standard deviation"):
        check_samples("source", form)


def test_float32_data_that_are_constant_for_their_size_are_told() -> None:
    with pytest.warns(UserWarning, match="standard deviation 0 and steps of 1.3e"):
        check_samples("source", stamps().astype(np.float32))


def test_offsets_survive_standardization() -> None:
    x = stamps()
    standardizer = Standardizer.fit(x)
    z = standardizer.apply(x).astype(np.float32)
    right = (x - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(z, right, atol=1e-6)
    back = standardizer.invert(z)
    assert back.dtype == np.float64
    np.testing.assert_allclose(back, x, rtol=0.0, atol=1e-6 * 5.0 * 4.0)
    assert standardizer.invert(torch.from_numpy(z)).dtype == torch.float64


def test_ordinary_data_are_standardized_in_their_own_type() -> None:
    x = (7.0 * samples(50, 2) + 3.0).astype(np.float32)
    standardizer = Standardizer.fit(x)
    mean, std = (value.numpy().astype(np.float32) for value in (standardizer.mean, standardizer.std))
    np.testing.assert_array_equal(standardizer.apply(x), (x - mean) / std)
    np.testing.assert_array_equal(standardizer.invert(x), x * std + mean)
    assert standardizer.invert(x).dtype == np.float32


def test_an_overflow_is_an_error() -> None:
    huge = Standardizer(torch.zeros(1), torch.full((1,), 1e300, dtype=torch.float64))
    np.testing.assert_allclose(huge.invert(np.ones((1, 1), np.float32)), 1e300)  # float64 holds it
    with pytest.raises(OverflowError, match="samples in data units are not finite"):
        huge.invert(np.full((1, 1), 1e20, np.float32))
    with pytest.raises(OverflowError, match="samples in data units are not finite"):
        Standardizer(torch.zeros(1), torch.ones(1) * 1e30).invert(torch.full((1, 1), 1e20))


def test_distinct_rows() -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, -0.0], [2.0, 1.0], [2.0, 0.0]])
    assert arrays.distinct_rows(x).tolist() == [0, 1, 3]
