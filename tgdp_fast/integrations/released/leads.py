"""Twelve leads of the eight that released code stores."""

from __future__ import annotations

from torch import Tensor

from tgdp_fast.ecg.records.leads import STORED_LEADS, TWELVE_LEADS, find_leads, twelve_leads
from tgdp_fast.runtime.checks import check_choice

#: Order of the twelve leads in released code: the stored eight are at positions 0, 2 to 7 and 11.
RELEASED_LEADS = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6", "III", "aVR", "aVL", "aVF")


def generate_four_leads(tensor: Tensor, *, order: str = "released") -> Tensor:
    """Twelve leads of the eight: II = aVF + I/2, III = aVF - I/2, aVR = -3/4 I - aVF/2, aVL = 3/4 I - aVF/2.

    Args:
        tensor: [B, 8, L], leads I, V1 to V6, aVF.
        order: of the result. "released" (:data:`RELEASED_LEADS`: I, II, V1 to V6, III, aVR, aVL, aVF), or "standard",
            that of PTB-XL and of the rest of this package (:data:`tgdp_fast.ecg.records.leads.TWELVE_LEADS`).

    Returns:
        [B, 12, L].

    Raises:
        ValueError: another number of leads; an unknown order.
    """
    check_choice("order", order, ("released", "standard"))
    if tensor.ndim != 3 or tensor.shape[1] != len(STORED_LEADS):
        raise ValueError(
            f"tensor must have shape [B, 8, L] with the leads {', '.join(STORED_LEADS)}, got {list(tensor.shape)}"
        )
    leads = twelve_leads(tensor)
    return leads if order == "standard" else leads[:, find_leads(TWELVE_LEADS, RELEASED_LEADS)]
