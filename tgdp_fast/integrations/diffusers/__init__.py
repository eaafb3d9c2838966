"""TGDP inside diffusers: a pipeline's model guided for any scheduler, and solver tables as a scheduler."""

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"tgdp_fast.integrations.diffusers needs diffusers, which cannot be imported ({error}); run: "
        "pip install 'tgdp_fast[diffusers]'"
    ) from error

from tgdp_fast.integrations.diffusers.guide import GuidedModel, guide
from tgdp_fast.integrations.diffusers.scheduler import TableScheduler, TableSchedulerOutput

__all__ = ["GuidedModel", "TableScheduler", "TableSchedulerOutput", "guide"]
