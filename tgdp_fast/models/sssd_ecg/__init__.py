"""SSSD-ECG: its layers, the network, and the network compiled for sampling."""

from tgdp_fast.models.sssd_ecg.network import SSSDECG

__all__ = ["SSSDECG"]
