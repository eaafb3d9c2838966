"""Transfer Guided Diffusion Process: sample a target domain from a frozen source diffusion model and few target
samples.
"""

from typing import TYPE_CHECKING

from tgdp_fast._version import __version__ as __version__

if TYPE_CHECKING:
    from tgdp_fast._api import *  # noqa: F403
else:
    # Torch takes seconds to load. It comes with the first name that is used, so that the command line, which lies in
    # this package, can start without it: to answer --help at once, and Ctrl-C in one line.
    def __getattr__(name):
        from importlib import import_module
        from importlib.util import find_spec

        if name == "__all__" or not name.startswith("__"):
            if find_spec(f"{__name__}.{name}"):  # Modules of the package ask for each other while they load.
                return import_module(f"{__name__}.{name}")
            api = vars(import_module(f"{__name__}._api"))
            public = {each: api[each] for each in sorted(api) if not each.startswith("_")}
            globals().update(public, __all__=[*public, "__version__"])
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
