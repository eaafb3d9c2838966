"""Leads and statements by name; the leads that follow from others."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from ecg_files import real_data
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tgdp_fast.ecg.records.leads import (
    STORED_LEADS,
    TWELVE_LEADS,
    find_leads,
    lead_name,
    twelve_leads,
    twelve_leads_digital,
)
from tgdp_fast.ecg.records.statements import (
    DESCRIPTIONS,
    ICBEB_STATEMENTS,
    SNOMED_NAMES,
    SNOMED_STATEMENTS,
    STATEMENTS,
    SYNONYMS,
    check_statements,
    label_names,
    multi_hot,
)


def by_name(signals: np.ndarray) -> dict[str, np.ndarray]:
    return {name: signals[..., place, :] for place, name in enumerate(TWELVE_LEADS)}


# leads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_twelve_leads_obey_einthoven_and_goldberger(dtype: type) -> None:
    stored = np.random.default_rng(0).standard_normal((3, 2, 8, 17)).astype(dtype)
    found = twelve_leads(stored)
    assert found.shape == (3, 2, 12, 17)
    assert found.dtype == dtype
    lead = by_name(found)
    for place, name in enumerate(STORED_LEADS):
        assert np.array_equal(lead[name], stored[..., place, :])
    bound = 8 * np.finfo(dtype).eps * np.abs(found).max()
    assert np.abs(lead["I"] + lead["III"] - lead["II"]).max() <= bound
    assert np.abs(lead["aVR"] + (lead["I"] + lead["II"]) / 2).max() <= bound
    assert np.abs(lead["aVL"] - (lead["I"] - lead["III"]) / 2).max() <= bound
    assert np.abs(lead["aVF"] - (lead["II"] + lead["III"]) / 2).max() <= bound
    assert torch.equal(twelve_leads(torch.from_numpy(stored)), torch.from_numpy(found))


@given(arrays(np.float64, (8, 5), elements=st.floats(-16.0, 16.0)))
def test_relations_hold_in_the_stored_integers(stored: np.ndarray) -> None:
    digital = twelve_leads_digital(stored)
    assert digital.dtype == np.int16
    lead = {name: values.astype(np.int64) for name, values in by_name(digital).items()}
    assert np.array_equal(lead["I"] + lead["III"], lead["II"])
    assert np.abs(2 * lead["aVR"] + lead["I"] + lead["II"]).max() <= 1
    assert np.abs(2 * lead["aVL"] - lead["I"] + lead["III"]).max() <= 1
    assert np.abs(2 * lead["aVF"] - lead["II"] - lead["III"]).max() <= 1
    assert np.abs(lead["aVR"] + lead["aVL"] + lead["aVF"]).max() <= 1
    # What was generated is stored to half a unit. II = aVF + I/2 has errors of 1/2, 1/4 and 1/2, III = II - I has
    # 1/2 more.
    away = np.abs(digital - 1000.0 * twelve_leads(stored))
    kept = [TWELVE_LEADS.index(name) for name in STORED_LEADS]
    assert away[kept].max() <= 0.5 + 1e-9
    assert away.max() <= 1.75 + 1e-9


def test_digital_leads_refuse_what_int16_cannot_hold() -> None:
    stored = np.zeros((8, 3))
    stored[2, 1] = 32.767
    assert twelve_leads_digital(stored).max() == 32767
    stored[2, 1] = -32.768  # "no sample" in WFDB
    with pytest.raises(ValueError, match=r"within 32.767 mV.*reaches 32.77 mV"):
        twelve_leads_digital(stored)
    stored[2, 1] = np.nan
    with pytest.raises(ValueError, match="must be finite"):
        twelve_leads_digital(stored)
    stored[2, 1] = 0.0
    stored[[0, 7], 0] = 30.0  # each fits, II = 45 mV does not
    with pytest.raises(ValueError, match="reaches 45 mV"):
        twelve_leads_digital(stored)
    with pytest.raises(ValueError, match=r"shape \[\.\.\., 8, L\].*got \[7, 3\]"):
        twelve_leads(stored[:7])
    with pytest.raises(ValueError, match="floating point, got int16"):
        twelve_leads(stored.astype(np.int16))


def spelled(name: str) -> st.SearchStrategy[str]:
    prefix = st.sampled_from(["", "MDC_ECG_LEAD_", "Lead ", "ECG ", "ECG Lead ", "lead_", " "])
    cases = st.lists(st.booleans(), min_size=len(name), max_size=len(name))
    return st.builds(
        lambda start, upper: start + "".join(c.upper() if u else c.lower() for c, u in zip(name, upper, strict=True)),
        prefix,
        cases,
    )


@given(st.data())
@settings(max_examples=40)
def test_leads_are_found_in_any_order_and_spelling(data: st.DataObject) -> None:
    order = data.draw(st.permutations(TWELVE_LEADS))
    names = [data.draw(spelled(name)) for name in order]
    assert [lead_name(name) for name in names] == list(order)
    wanted = data.draw(st.lists(st.sampled_from(TWELVE_LEADS), unique=True))
    assert [order[place] for place in find_leads(names, wanted)] == wanted
    gone = data.draw(st.sampled_from(TWELVE_LEADS))
    left = [name for name, lead in zip(names, order, strict=True) if lead != gone]
    with pytest.raises(ValueError, match=f"the leads {gone} are missing"):
        find_leads(left, TWELVE_LEADS)
    with pytest.raises(ValueError, match=f"the leads {gone} are there more than once"):
        find_leads([*names, gone.lower()], TWELVE_LEADS)


@given(st.text())
def test_no_other_text_is_a_lead_by_accident(text: str) -> None:
    name = lead_name(text)
    assert name is None or text.strip().lower().endswith(name.lower())


def test_what_statements_are_called_elsewhere_names_statements() -> None:
    assert set(SYNONYMS) <= set(STATEMENTS)
    others = [other for names in SYNONYMS.values() for other in names.split()]
    assert len(set(others)) == len(others)
    assert not set(others) & set(STATEMENTS)
    assert all(other == other.upper() for other in others)
    assert not set(SNOMED_NAMES) & set(SNOMED_STATEMENTS)


def test_other_leads_are_found_by_their_own_name() -> None:
    assert lead_name("V7") is None
    assert find_leads(["V7", "X", "I"], ["x", "v7"]) == [1, 0]


# statements -------------------------------------------------------------------------------------------------


def test_statements_are_the_71_of_ptbxl_in_alphabetical_order() -> None:
    assert len(STATEMENTS) == len(set(STATEMENTS)) == 71
    assert list(STATEMENTS) == sorted(STATEMENTS)
    # Both ends, and the order of "_" behind letters.
    assert STATEMENTS[0] == "1AVB"
    assert STATEMENTS[-1] == "WPW"
    assert STATEMENTS.index("ISCLA") + 1 == STATEMENTS.index("ISC_")
    assert sorted(ICBEB_STATEMENTS) == list(range(1, 10))
    assert set(ICBEB_STATEMENTS.values()) == set(SNOMED_STATEMENTS.values())
    assert set(ICBEB_STATEMENTS.values()) <= set(STATEMENTS)


def test_statements_agree_with_the_real_table() -> None:
    with open(real_data("ptbxl") / "scp_statements.csv") as file:
        assert {row[""]: row["description"] for row in csv.DictReader(file)} == DESCRIPTIONS


@given(st.lists(st.lists(st.sampled_from(STATEMENTS))))
def test_multi_hot_and_names_are_inverse(labels: list[list[str]]) -> None:
    found = multi_hot(labels)
    assert found.dtype == np.uint8
    assert found.shape == (len(labels), 71)
    assert [set(names) for names in label_names(found)] == [set(names) for names in labels]
    assert found.sum(axis=1).tolist() == [len(set(names)) for names in labels]


@given(st.permutations(["AFIB", "NORM", "PVC"]), st.lists(st.sampled_from(["AFIB", "NORM", "PVC", "VPC"])))
def test_columns_follow_the_vocabulary(vocabulary: list[str], names: list[str]) -> None:
    row = multi_hot([names], vocabulary)[0]
    meant = {"PVC" if name == "VPC" else name for name in names}
    assert [vocabulary[column] for column in np.flatnonzero(row)] == [name for name in vocabulary if name in meant]


@given(st.text().filter(lambda text: text not in STATEMENTS and text != "VPC"))
def test_unknown_statements_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="labels, row 1: unknown label"):
        multi_hot([["NORM"], ["SR", text]])


def test_mistakes_with_labels() -> None:
    with pytest.raises(ValueError, match="did you mean 'NORM'"):
        check_statements(["NORMAL"])
    for name, meant in (("AF", "AFIB"), ("LBBB", "CLBBB"), ("sinus rhythm", "SR"), ("afib", "AFIB"), ("VEB", "PVC")):
        with pytest.raises(ValueError, match=f"unknown label '{name}' .did you mean '{meant}'"):
            check_statements([name])
    with pytest.raises(ValueError, match="got the text 'NORM' in row 0"):
        multi_hot(["NORM"])
    with pytest.raises(ValueError, match=r"shape \[N, 71\], got \[2, 3\]"):
        label_names(np.zeros((2, 3)))
