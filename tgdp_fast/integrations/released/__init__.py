"""The calls of the released TGDP-ECG and SSSD-ECG code: a script that uses them changes only its imports.

    from tgdp_fast.integrations.released import SSSD_ECG, Bandit_Critic_Guide, sampling_label_guided

Two conventions: ``convention="paper"``, the default, follows the formulas of the papers; ``convention="released"``
follows the released code where it departs from them:

=====================  =================================================  =======================================
what                   "paper"                                            "released"
=====================  =================================================  =======================================
guided noise           eps - s sigma_t grad f   (TGDP, Theorem 3.1)       eps + s grad f
S4 kernels             sums over conjugate pairs, ``cauchy="pair"``       without the conjugates, ``cauchy="half"``
=====================  =================================================  =======================================

with f the guidance network, s the guidance scale and sigma_t = sqrt(1 - Alpha_bar_t).

Sources: TGDP (Ouyang et al., NeurIPS 2024, arXiv 2405.16876), section 4.2; SSSD-ECG (Alcaraz & Strodthoff, 2023, arXiv
2301.08227); DiffWave (Kong et al., ICLR 2021, arXiv 2009.09761), section 2, for the diffusion process.
"""

from tgdp_fast.integrations.released.leads import RELEASED_LEADS, generate_four_leads
from tgdp_fast.integrations.released.networks import CONVENTIONS, SSSD_ECG, Bandit_Critic_Guide, GuidanceQt
from tgdp_fast.integrations.released.samplers import calc_diffusion_hyperparams, sampling_label, sampling_label_guided

__all__ = [
    "CONVENTIONS",
    "RELEASED_LEADS",
    "SSSD_ECG",
    "Bandit_Critic_Guide",
    "GuidanceQt",
    "calc_diffusion_hyperparams",
    "generate_four_leads",
    "sampling_label",
    "sampling_label_guided",
]
