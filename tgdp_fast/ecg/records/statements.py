"""The 71 SCP-ECG statements that are the labels of PTB-XL, and the nine classes of ICBEB2018 among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

import numpy as np

#: Statements and their meaning: the rows of PTB-XL's ``scp_statements.csv`` (Wagner et al., Scientific Data 7:154,
#: 2020).
DESCRIPTIONS = {
    "1AVB": "first degree AV block",
    "2AVB": "second degree AV block",
    "3AVB": "third degree AV block",
    "ABQRS": "abnormal QRS",
    "AFIB": "atrial fibrillation",
    "AFLT": "atrial flutter",
    "ALMI": "anterolateral myocardial infarction",
    "AMI": "anterior myocardial infarction",
    "ANEUR": "ST-T changes compatible with ventricular aneurysm",
    "ASMI": "anteroseptal myocardial infarction",
    "BIGU": "bigeminal pattern (unknown origin, SV or Ventricular)",
    "CLBBB": "complete left bundle branch block",
    "CRBBB": "complete right bundle branch block",
    "DIG": "digitalis-effect",
    "EL": "electrolytic disturbance or drug (former EDIS)",
    "HVOLT": "high QRS voltage",
    "ILBBB": "incomplete left bundle branch block",
    "ILMI": "inferolateral myocardial infarction",
    "IMI": "inferior myocardial infarction",
    "INJAL": "subendocardial injury in anterolateral leads",
    "INJAS": "subendocardial injury in anteroseptal leads",
    "INJIL": "subendocardial injury in inferolateral leads",
    "INJIN": "subendocardial injury in inferior leads",
    "INJLA": "subendocardial injury in lateral leads",
    "INVT": "inverted T-waves",
    "IPLMI": "inferoposterolateral myocardial infarction",
    "IPMI": "inferoposterior myocardial infarction",
    "IRBBB": "incomplete right bundle branch block",
    "ISCAL": "ischemic in anterolateral leads",
    "ISCAN": "ischemic in anterior leads",
    "ISCAS": "ischemic in anteroseptal leads",
    "ISCIL": "ischemic in inferolateral leads",
    "ISCIN": "ischemic in inferior leads",
    "ISCLA": "ischemic in lateral leads",
    "ISC_": "non-specific ischemic",
    "IVCD": "non-specific intraventricular conduction disturbance (block)",
    "LAFB": "left anterior fascicular block",
    "LAO/LAE": "left atrial overload/enlargement",
    "LMI": "lateral myocardial infarction",
    "LNGQT": "long QT-interval",
    "LOWT": "low amplitude T-waves",
    "LPFB": "left posterior fascicular block",
    "LPR": "prolonged PR interval",
    "LVH": "left ventricular hypertrophy",
    "LVOLT": "low QRS voltages in the frontal and horizontal leads",
    "NDT": "non-diagnostic T abnormalities",
    "NORM": "normal ECG",
    "NST_": "non-specific ST changes",
    "NT_": "non-specific T-wave changes",
    "PAC": "atrial premature complex",
    "PACE": "normal functioning artificial pacemaker",
    "PMI": "posterior myocardial infarction",
    "PRC(S)": "premature complex(es)",
    "PSVT": "paroxysmal supraventricular tachycardia",
    "PVC": "ventricular premature complex",
    "QWAVE": "Q waves present",
    "RAO/RAE": "right atrial overload/enlargement",
    "RVH": "right ventricular hypertrophy",
    "SARRH": "sinus arrhythmia",
    "SBRAD": "sinus bradycardia",
    "SEHYP": "septal hypertrophy",
    "SR": "sinus rhythm",
    "STACH": "sinus tachycardia",
    "STD_": "non-specific ST depression",
    "STE_": "non-specific ST elevation",
    "SVARR": "supraventricular arrhythmia",
    "SVTAC": "supraventricular tachycardia",
    "TAB_": "T-wave abnormality",
    "TRIGU": "trigeminal pattern (unknown origin, SV or Ventricular)",
    "VCLVH": "voltage criteria (QRS) for left ventricular hypertrophy",
    "WPW": "Wolf-Parkinson-White syndrome",
}
#: In alphabetical order: the columns of multi-hot labels, as a multi-label binarizer sorts them.
STATEMENTS = tuple(DESCRIPTIONS)
_PLACES = {name: index for index, name in enumerate(STATEMENTS)}
#: Other names of statements. The conversion of ICBEB2018 for the PTB-XL benchmark has VPC for PVC.
ALIASES = {"VPC": "PVC"}
#: The classes of ICBEB2018's ``REFERENCE.csv`` (Liu et al. 2018) as statements of PTB-XL.
ICBEB_STATEMENTS = {
    1: "NORM",
    2: "AFIB",
    3: "1AVB",
    4: "CLBBB",
    5: "CRBBB",
    6: "PAC",
    7: "PVC",
    8: "STD_",
    9: "STE_",
}
#: The same classes by SNOMED CT code, as headers of the PhysioNet/CinC Challenge 2020 and 2021 name them.
SNOMED_STATEMENTS = {
    "426783006": "NORM",
    "164889003": "AFIB",
    "270492004": "1AVB",
    "164909002": "CLBBB",
    "59118001": "CRBBB",
    "284470004": "PAC",
    "164884008": "PVC",
    "429622005": "STD_",
    "164931005": "STE_",
}


def check_statements(names: Iterable[str], vocabulary: Sequence[str] = STATEMENTS) -> tuple[str, ...]:
    """Statements in the vocabulary's order, each once, :data:`ALIASES` replaced.

    Raises:
        ValueError: a name is not in the vocabulary.
    """
    place = _PLACES if vocabulary is STATEMENTS else {name: index for index, name in enumerate(vocabulary)}
    found = set()
    for name in names:
        name = name if name in place else ALIASES.get(name, name)
        if name not in place:
            near = get_close_matches(str(name), vocabulary, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"unknown label {name!r}{hint}; expected some of the {len(place)} statements")
        found.add(name)
    return tuple(sorted(found, key=place.__getitem__))


def multi_hot(labels: Iterable[Iterable[str]], vocabulary: Sequence[str] = STATEMENTS) -> np.ndarray:
    """Labels as uint8 [N, K], one column for each name of the vocabulary.

    Args:
        labels: names of each record.
        vocabulary: K names.

    Raises:
        ValueError: a name is not in the vocabulary; says in which record.
    """
    records = list(labels)
    place = {name: index for index, name in enumerate(vocabulary)}
    result = np.zeros((len(records), len(place)), np.uint8)
    for row, names in enumerate(records):
        if isinstance(names, str):
            raise ValueError(f"labels must hold a list of names for each record, got the text {names!r} in row {row}")
        try:
            result[row, [place[name] for name in check_statements(names, vocabulary)]] = 1
        except ValueError as error:
            raise ValueError(f"labels, row {row}: {error}") from None
    return result


def label_names(labels: np.ndarray, vocabulary: Sequence[str] = STATEMENTS) -> list[tuple[str, ...]]:
    """Names of multi-hot labels [N, K]: the inverse of :func:`multi_hot`."""
    array = np.asarray(labels)
    if array.ndim != 2 or array.shape[1] != len(vocabulary):
        raise ValueError(f"labels must have shape [N, {len(vocabulary)}], got {list(array.shape)}")
    return [tuple(vocabulary[int(column)] for column in np.flatnonzero(row)) for row in array]
