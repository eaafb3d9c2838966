"""The names of the package. ``tgdp_fast`` hands them on."""

from tgdp_fast._version import __version__
from tgdp_fast.diffusion.denoiser import Denoiser
from tgdp_fast.diffusion.guidance import GuidanceNetwork
from tgdp_fast.diffusion.guided import GuidedDenoiser
from tgdp_fast.diffusion.prior import EmpiricalPrior, GaussianPrior
from tgdp_fast.diffusion.schedule import NoiseSchedule
from tgdp_fast.diffusion.solvers import SOLVERS, SPACINGS, SolverTable, solver_table
from tgdp_fast.fit.density_ratio import fit_density_ratio
from tgdp_fast.fit.diagnostics import TransferDiagnostics
from tgdp_fast.fit.guidance import GuidanceFit, fit_guidance
from tgdp_fast.fit.model import TransferModel
from tgdp_fast.fit.training import Optimisation, TrainingDivergedError, train_denoiser
from tgdp_fast.models import SSSDECG, ScoreMLP
from tgdp_fast.ops.registry import BackendUnavailableError, use_backend
from tgdp_fast.runtime.checkpoint import CheckpointError
from tgdp_fast.sampling.sampler import SamplingDivergedError, sample
from tgdp_fast.sampling.to_file import sample_to_file

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
