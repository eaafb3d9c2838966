"""TGDP inside diffusers: a pipeline's model guided for any scheduler, and solver tables as a scheduler."""

from tgdp_fast.runtime.optional import optional

# Before the modules that extend its classes.
optional("diffusers", "tgdp_fast.integrations.diffusers needs")

from tgdp_fast.integrations.diffusers.guide import GuidedModel, guide  # noqa: E402
from tgdp_fast.integrations.diffusers.scheduler import TableScheduler, TableSchedulerOutput  # noqa: E402

__all__ = ["GuidedModel", "TableScheduler", "TableSchedulerOutput", "guide"]
