"""Other libraries' calling conventions: the released TGDP-ECG code, samplers with classifier guidance, diffusers."""
