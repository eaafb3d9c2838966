"""``python -m tgdp_fast``: the command line."""

import sys

from tgdp_fast.cli.main import main

sys.exit(main())
