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
#: What statements are called elsewhere (PhysioNet/CinC Challenges, MIT-BIH, common usage): suggested, never accepted.
SYNONYMS = {
    "1AVB": "AVB1 IAVB I-AVB 1DAVB",
    "2AVB": "AVB2 IIAVB II-AVB",
    "3AVB": "AVB3 IIIAVB III-AVB CHB",
    "AFIB": "AF AFB",
    "AFLT": "AFL AFLUT AFLUTTER",
    "CLBBB": "LBBB",
    "CRBBB": "RBBB",
    "INVT": "TINV TWI",
    "IVCD": "NSIVCB NSIVCD",
    "LAFB": "LANFB LAHB",
    "LAO/LAE": "LAE LAO",
    "LNGQT": "LQT LQTS",
    "LPFB": "LPHB",
    "LVOLT": "LQRSV",
    "NORM": "NORMAL SNR",
    "NST_": "NSSTTA",
    "PAC": "APB APC PAB SVPB SVPC SVEB",
    "PACE": "PACED",
    "PVC": "VPB VEB VES PVB",
    "QWAVE": "QAB",
    "RAO/RAE": "RAE RAO",
    "SARRH": "SA",
    "SBRAD": "SB BRADY BRADYCARDIA",
    "SR": "NSR",
    "STACH": "TACHY TACHYCARDIA",
    "STD_": "STD",
    "STE_": "STE",
    "SVTAC": "SVT",
    "TAB_": "TAB",
}
_MEANT = {other: name for name, others in SYNONYMS.items() for other in others.split()}
_MEANT |= {text.upper(): name for name, text in DESCRIPTIONS.items()}
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
#: Other diagnoses of these Challenges, for messages.
SNOMED_NAMES = {
    "10370003": "pacing rhythm",
    "111975006": "prolonged QT interval",
    "164861001": "myocardial ischemia",
    "164865005": "myocardial infarction",
    "164873001": "left ventricular hypertrophy",
    "164890007": "atrial flutter",
    "164917005": "abnormal Q wave",
    "164934002": "abnormal T wave",
    "164947007": "prolonged PR interval",
    "17338001": "ventricular premature beats",
    "251146004": "low QRS voltages",
    "365413008": "poor R wave progression",
    "39732003": "left axis deviation",
    "426177001": "sinus bradycardia",
    "426627000": "bradycardia",
    "427084000": "sinus tachycardia",
    "427172004": "premature ventricular contractions",
    "427393009": "sinus arrhythmia",
    "428750005": "nonspecific ST-T abnormality",
    "445118002": "left anterior fascicular block",
    "47665007": "right axis deviation",
    "59931005": "T wave inversion",
    "6374002": "bundle branch block",
    "63593006": "supraventricular premature beats",
    "698252002": "nonspecific intraventricular conduction disorder",
    "713426002": "incomplete right bundle branch block",
    "713427006": "complete right bundle branch block",
    "733534002": "complete left bundle branch block",
}


def in_words(label: str) -> str:
    """A label with its meaning where that is known: "39732003 (left axis deviation)"."""
    words = SNOMED_NAMES.get(label) or DESCRIPTIONS.get(SNOMED_STATEMENTS.get(label, label))
    return f"{label} ({words})" if words else label


def similar(name: str, vocabulary: Sequence[str] = STATEMENTS, most: int = 1) -> list[str]:
    """Names of the vocabulary that ``name`` may mean: what is called so elsewhere, then what is spelled alike."""
    text = str(name).strip().upper()
    meant = [_MEANT[text]] if _MEANT.get(text) in vocabulary else []
    return list(dict.fromkeys([*meant, *get_close_matches(text, vocabulary, n=most)]))[:most]


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
            near = similar(name, vocabulary)
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
