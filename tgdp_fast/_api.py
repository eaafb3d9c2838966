"""The names of the package. ``tgdp_fast`` hands them on."""

from tgdp_fast._version import __version__
from tgdp_fast.checkpoint import CheckpointError
from tgdp_fast.denoiser import Denoiser
from tgdp_fast.density_ratio import TransferDiagnostics, fit_density_ratio
from tgdp_fast.guidance import GuidanceNetwork, GuidedDenoiser
from tgdp_fast.models import SSSDECG, ScoreMLP
from tgdp_fast.ops._dispatch import BackendUnavailableError, use_backend
from tgdp_fast.prior import EmpiricalPrior, GaussianPrior
from tgdp_fast.sampling import SamplingDivergedError, sample, sample_to_file
from tgdp_fast.schedule import NoiseSchedule
from tgdp_fast.solvers import SOLVERS, SPACINGS, SolverTable, solver_table
from tgdp_fast.training import Optimisation, TrainingDivergedError, train_denoiser
from tgdp_fast.transfer import GuidanceFit, fit_guidance
from tgdp_fast.transfer_model import TransferModel

__all__ = [
    "SOLVERS",
    "SPACINGS",
    "SSSDECG",
    "BackendUnavailableError",
    "CheckpointError",
    "Denoiser",
    "EmpiricalPrior",
    "GaussianPrior",
    "GuidanceFit",
    "GuidanceNetwork",
    "GuidedDenoiser",
    "NoiseSchedule",
    "Optimisation",
    "SamplingDivergedError",
    "ScoreMLP",
    "SolverTable",
    "TrainingDivergedError",
    "TransferDiagnostics",
    "TransferModel",
    "__version__",
    "fit_density_ratio",
    "fit_guidance",
    "sample",
    "sample_to_file",
    "solver_table",
    "train_denoiser",
    "use_backend",
]
